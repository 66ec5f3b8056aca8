"""One thread for each process: tests use tensors that fit in cache, and several of them run side by side.

Whatever needs three ranks or more is marked ``long``: two show most of it in the time that a person waits
(``make test-long`` runs the rest).

Without a GPU Triton's kernels run in its interpreter, which Triton decides when it is imported.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before the selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        num_ranks = item.callspec.params.get("num_ranks") if hasattr(item, "callspec") else None
        if isinstance(num_ranks, int) and 3 <= num_ranks <= 8:
            item.add_marker(pytest.mark.long)
