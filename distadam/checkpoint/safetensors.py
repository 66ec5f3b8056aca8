"""The safetensors format, read memory-mapped and written tensor by tensor, so that no file has to fit in memory.

Eight bytes with the header's length (little-endian), the header as JSON (by name: dtype, shape, and the first and last
byte in what follows), then the tensors in row-major order.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from distadam.checkpoint.raw import as_bytes
from distadam.errors import CheckpointError

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_DTYPES = {code: getattr(torch, name) for name, code in _CODES.items()}


def write(path: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], values: Iterable[Tensor]) -> None:
    """Write a file; ``values`` come in the order of ``tensors``, which gives dtype and shape by name.

    Raises:
        CheckpointError: the format has no such dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _CODES:
            raise CheckpointError(f"{path}: safetensors has no dtype {dtype} (tensor {name!r}).")
        nbytes = prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            flat = value.contiguous()
            file.write(as_bytes(flat))
        file.flush()
        os.fsync(file.fileno())


def read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file, memory-mapped: bytes are read when they are used.

    Raises:
        CheckpointError: it is no such file, or it is cut.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise CheckpointError(f"{path}: expected a safetensors file; its header does not fit into {size} bytes.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: expected a safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise CheckpointError(f"{path}: expected {8 + length + end} bytes but got {size}: the file is cut.")
    data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        part = data[first:last]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors
