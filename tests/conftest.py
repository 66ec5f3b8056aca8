"""One thread for each process: tests use tensors that fit in cache, and several of them run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
