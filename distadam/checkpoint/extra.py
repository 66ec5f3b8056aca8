"""What the user adds to a checkpoint: schedulers, scalers, samplers, random states; anything with a state_dict."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from typing import Any

import torch

from distadam.errors import ConfigError


def pack(values: Any, what: str) -> bytes:
    """Return values as bytes that can be read without running code.

    Raises:
        ConfigError: ``torch.load(weights_only=True)`` would refuse them.
    """
    file = io.BytesIO()
    try:
        torch.save(values, file)
        unpack(file.getvalue())
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{what} expected numbers, strings, tensors and containers of them but got something that "
            f"torch.load(weights_only=True) would not read back: {error}"
        ) from error
    return file.getvalue()


def unpack(data: bytes) -> Any:
    """Return what `pack` was given."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def collect(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the state of every value that has a ``state_dict``, and the others as they are."""
    if extra is not None and not isinstance(extra, Mapping):
        raise ConfigError(f"save(extra=...) expected a dictionary but got {type(extra).__name__}.")
    return {
        str(key): value.state_dict() if hasattr(value, "state_dict") else value for key, value in (extra or {}).items()
    }


def restore(extra: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> None:
    """Load saved states into the values that can take them."""
    for key, value in (extra or {}).items():
        if hasattr(value, "load_state_dict"):
            value.load_state_dict(saved[key])


class RandomState:
    """Python's and torch's random numbers (CPU and CUDA) as something to put into ``extra``.

    Each rank saves its own. Loaded on as many ranks it goes on exactly; on another number every rank is seeded from
    the saved state and its rank, so that no two ranks repeat each other.

    Args:
        optimizer: knows this rank and how many there are.
    """

    def __init__(self, optimizer: Any) -> None:
        groups = optimizer.checkpoint_access().collectives.groups
        self._place = [groups.rank, groups.num_ranks]

    def state_dict(self) -> dict[str, Any]:
        """Return the states and whose they are."""
        version, words, gauss = random.getstate()
        return {
            "place": self._place,
            "python": [version, list(words), gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the states, or from seeds made of them."""
        if state["place"] == self._place:
            version, words, gauss = state["python"]
            random.setstate((version, tuple(words), gauss))
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            return
        generator = torch.Generator()
        generator.set_state(state["torch"])
        seed = int(torch.randint(2**62, (), generator=generator)) + self._place[0]
        random.seed(seed)
        torch.manual_seed(seed)
