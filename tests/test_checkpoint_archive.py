"""Where a tensor's bytes lie in what torch.save wrote, and that whatever lies elsewhere is still read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distadam import checkpoint
from distadam.checkpoint.archive import tensor_bytes
from tests.checkpoint_runs import build, digest, train

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


def _saved(value: Any, **options: Any) -> memoryview:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return memoryview(file.getvalue())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 10_000])
def test_bytes_of_a_tensor_are_found_where_torch_save_put_them(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.arange(numel).to(dtype)
    found = tensor_bytes(_saved(tensor), tensor.nbytes)
    assert found is not None
    assert torch.equal(torch.frombuffer(bytearray(found), dtype=dtype), tensor)


def test_bytes_are_found_nowhere_in_what_is_laid_out_otherwise() -> None:
    tensor = torch.arange(100.0)
    whole = _saved(tensor)
    big = bytes(whole).replace(b"little", b"bigger")
    others = [
        _saved(tensor[3:9]),  # torch.save writes the whole storage
        _saved(tensor[:6].clone(), _use_new_zipfile_serialization=False),
        whole[:-1],
        whole[1:],
        memoryview(b""),
        memoryview(bytes(1000)),
    ]
    assert [tensor_bytes(other, 24) for other in others] == [None] * len(others)
    assert tensor_bytes(whole, 400) is not None
    assert tensor_bytes(memoryview(big), 400) is None


def _legacy(save: Callable[..., None]) -> Callable[..., None]:
    return lambda value, file: save(value, file, _use_new_zipfile_serialization=False)


def test_items_laid_out_otherwise_are_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build("adamw", "fp32")
    train(model, optimizer, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _legacy(torch.save))
        checkpoint.save(tmp_path, model, optimizer)
    other = build("adamw", "fp32")
    checkpoint.load(tmp_path, *other)
    assert digest(*other) == digest(model, optimizer)
