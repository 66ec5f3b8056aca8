"""What saving, loading and converting hold beside the training state: a chunk, a shard, a parameter; never the whole.

Anonymous memory of real processes, looked at every millisecond; the state is 192 MB in tensors of 16 MB, a chunk is
8 MiB. The slack of 1 MB is for what a process takes once (imports, threads, pools), manifests and the allocator; 0.4 MB
were measured.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from benchmarks.memory import Peak
from distadam import checkpoint
from distadam.checkpoint.files import CHUNK_NBYTES
from tests.ranks import run_ranks

pytestmark = pytest.mark.long
COUNTS_BYTES = True

PARAM, NUM_PARAMS, SLACK = 4096 * 1024 * 4, 4, 1_000_000
WEIGHTS, WHOLE = NUM_PARAMS * PARAM, 3 * NUM_PARAMS * PARAM


def _trained() -> tuple[nn.Module, Any]:
    model = nn.ParameterList(torch.ones(4096, 1024) for _ in range(NUM_PARAMS))
    optimizer = distadam.AdamW(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _extra(call: Callable[[], object]) -> int:
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once; what is held counts
    with Peak(every_s=0.001) as peak:
        call()
    return peak.nbytes


def _save_and_load(rank: int, folder: str) -> dict[str, int]:
    model, optimizer = _trained()
    return {
        "sync": _extra(lambda: checkpoint.save(f"{folder}/a", model, optimizer)),
        "asynchronous": _extra(lambda: checkpoint.save(f"{folder}/b", model, optimizer, asynchronous=True).wait()),
        "load": _extra(lambda: checkpoint.load(f"{folder}/a", model, optimizer)),
    }


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_holds_a_chunk_while_it_saves_its_shard_asynchronously_and_both_while_it_loads(
    num_ranks: int, tmp_path: Path
) -> None:
    shard = WHOLE / num_ranks
    for extra in run_ranks(num_ranks, _save_and_load, str(tmp_path)):
        assert extra["sync"] < CHUNK_NBYTES
        assert 0.9 * shard < extra["asynchronous"] < shard + SLACK  # it was measured, and no chunk comes on top
        assert 0.9 * shard < extra["load"] < shard + CHUNK_NBYTES + SLACK


def _convert(rank: int, folder: str) -> dict[str, int]:
    path = f"{folder}/a"
    converted = {
        "describe": lambda: checkpoint.describe(path),
        "verify": lambda: checkpoint.verify(path),
        "reshard": lambda: checkpoint.reshard(path, f"{folder}/b", ranks=3),
        "safetensors": lambda: checkpoint.convert(path, f"{folder}/w.safetensors"),
        "torch": lambda: checkpoint.convert(path, f"{folder}/o.pt"),
        "from torch": lambda: checkpoint.convert(
            f"{folder}/o.pt", f"{folder}/c", weights=f"{folder}/w.safetensors", rule="adamw"
        ),
    }
    return {what: _extra(call) for what, call in converted.items()}


def test_conversions_hold_a_parameter_and_never_the_whole(tmp_path: Path) -> None:
    model, optimizer = _trained()
    checkpoint.save(tmp_path / "a", model, optimizer)
    (extra,) = run_ranks(1, _convert, str(tmp_path))
    most = {
        "describe": SLACK,
        "verify": CHUNK_NBYTES + SLACK,
        "reshard": 2 * CHUNK_NBYTES + SLACK,
        "safetensors": 2 * PARAM + CHUNK_NBYTES + SLACK,
        "torch": PARAM + CHUNK_NBYTES + SLACK,
        "from torch": SLACK,
    }
    assert max(most.values()) < WEIGHTS < WHOLE
    assert {what: nbytes for what, nbytes in extra.items() if nbytes > most[what]} == {}
