"""One thread for each process: tests use tensors that fit in cache, and several of them run side by side.

Some promises are about three ranks and more (``SHOWN_BY_MANY``). Elsewhere two show most of it in the time that a
person waits, and whatever needs more is marked ``long`` (``make test-long``).

Without a GPU Triton's kernels run in its interpreter, which Triton decides when it is imported.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.staggered import stagger_for

SHOWN_BY_MANY = {
    "test_losing_a_rank_is_a_comm_error_on_the_others_within_the_timeout",
    "test_random_runs_have_the_bits_of_the_unsharded_oracle",
    "test_training_has_the_bits_of_one_process_given_the_average",
    "test_training_has_the_bits_of_torch_given_the_average",
}


@pytest.hookimpl(tryfirst=True)  # before the selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        num_ranks = item.callspec.params.get("num_ranks") if hasattr(item, "callspec") else None
        if isinstance(num_ranks, int) and 3 <= num_ranks <= 8 and item.originalname not in SHOWN_BY_MANY:
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever OMP_NUM_THREADS says: threads that wait for a busy core cost 100 times the work of a small tensor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def staggered_buffers(request: pytest.FixtureRequest) -> None:
    """Stagger this process's buffers; `tests.ranks` does it in the ranks."""
    stagger_for(request.function)
