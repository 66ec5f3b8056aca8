"""One thread for each process: tests use tensors that fit in cache, and several of them run side by side.

Without a GPU Triton's kernels run in its interpreter, which Triton decides when it is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
