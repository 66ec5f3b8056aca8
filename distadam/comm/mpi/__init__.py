"""torch.distributed over MPI: the backend "mpi4py"."""

from distadam.comm.mpi.world import register_mpi_backend

__all__ = ["register_mpi_backend"]
