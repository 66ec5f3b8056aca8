"""The only importer of torch.distributed: groups, collectives, the order of asynchronous work, start-up."""

from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel

from distadam.comm.buffers import broadcast_buffers
from distadam.comm.clock import Clock, Mark
from distadam.comm.collectives import Collectives, CollectiveStats
from distadam.comm.groups import Groups
from distadam.comm.join import Join, Joinable, JoinHook
from distadam.comm.mpi import register_mpi_backend
from distadam.comm.start import RunInfo, init_process_group
from distadam.comm.streams import DONE, Pending, Streams

__all__ = [
    "DONE",
    "Clock",
    "CollectiveStats",
    "Collectives",
    "DistributedDataParallel",
    "Groups",
    "Join",
    "JoinHook",
    "Joinable",
    "Mark",
    "Pending",
    "ReduceOp",
    "RunInfo",
    "Streams",
    "broadcast_buffers",
    "init_process_group",
    "register_mpi_backend",
]
