"""Limits of the operating system: shared memory, open files, the clock."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import socket
from pathlib import Path

from distadam.doctor.finding import Finding, error, ok, warning

_MIB = 2**20
_FEW_FILES, _SCARCE_FILES = 4096, 256
_SMALL_SHM_MIB = 256
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of <sys/timex.h>
_MAX_SKEW_S = 1.0


def allowed_cpus() -> list[int]:
    """Return the CPUs that this process may run on: what taskset, a cgroup or Slurm left it."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_shared_memory(path: Path = Path("/dev/shm"), *, has_cuda: bool = False) -> list[Finding]:
    """Look at the file system for shared memory: NCCL and DataLoader workers fill it; distadam itself does not.

    Args:
        path: where it is mounted.
        has_cuda: NCCL would be used, which fails without it.
    """
    cure = "docker run --shm-size=2g (compose: shm_size), Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    make = error if has_cuda else warning
    try:
        about = os.statvfs(path)
    except OSError as problem:
        return [make("system.shm", f"no shared memory: {problem}", cure)]
    total, free = about.f_blocks * about.f_frsize / _MIB, about.f_bavail * about.f_frsize / _MIB
    text = f"{path} has {total:,.0f} MiB, {free:,.0f} free"
    if free < _SMALL_SHM_MIB:
        text += ": NCCL and DataLoader workers need more"
        return [make("system.shm", text, cure, total_mib=total, free_mib=free)]
    return [ok("system.shm", text, total_mib=total, free_mib=free)]


def check_memfd() -> list[Finding]:
    """Look whether ranks of this host can read each other's memory: anonymous files, passed over abstract sockets."""
    consequence = "ranks of one host would send messages to each other (3x the time)"
    try:
        os.close(os.memfd_create("distadam-doctor", os.MFD_CLOEXEC))
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as listener:
            listener.bind(f"\0distadam-doctor-{secrets.token_hex(8)}")
    except (OSError, AttributeError) as problem:
        cure = "allow memfd_create and abstract Unix sockets (the sandbox's seccomp profile refuses them)"
        return [warning("system.memfd", f"{problem}: {consequence}", cure)]
    return [ok("system.memfd", "ranks of this host can share memory")]


def check_open_files(num_local: int, limits: tuple[int, int] | None = None) -> list[Finding]:
    """Look at the limit of open files: sockets to every other rank, checkpoint files, data sets.

    Args:
        num_local: ranks of this host.
        limits: soft and hard limit; None asks the system.
    """
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may open {soft:,} files"
    cure = "ulimit -n 65536 (systemd: LimitNOFILE=, docker: --ulimit nofile=65536)"
    if hard < 65536:
        cure += f"; the hard limit of {hard:,} needs an administrator"
    if soft < _SCARCE_FILES + 8 * num_local:
        return [error("system.open_files", f"{text}: too few for sockets and checkpoints", cure, soft=soft, hard=hard)]
    if soft < _FEW_FILES and soft < hard:
        text += ": few for many ranks or data files"
        return [warning("system.open_files", text, cure, soft=soft, hard=hard)]
    return [ok("system.open_files", text, soft=soft, hard=hard)]


def clock_status() -> int | None:
    """Return the kernel clock's status bits, or None where they cannot be read."""
    buffer = (ctypes.c_long * 64)()  # struct timex: modes 0 only asks; the status is the sixth field
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(buffer)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return int(ctypes.cast(ctypes.byref(buffer, 5 * ctypes.sizeof(ctypes.c_long)), ctypes.POINTER(ctypes.c_int))[0])


def check_clock(status: int | None, several_hosts: bool) -> list[Finding]:
    """Look whether the clock follows a time server; the self-test compares the ranks' clocks themselves.

    Args:
        status: from `clock_status`.
        several_hosts: it matters: logs and checkpoints are ordered by time.
    """
    if status is None:
        return [ok("system.clock", "the kernel does not say whether its clock is synchronised")]
    if not status & _UNSYNCHRONISED:
        return [ok("system.clock", "the clock is synchronised")]
    text = "the clock is not synchronised with a time server"
    if several_hosts:
        return [warning("system.clock", text, "start chrony or systemd-timesyncd (timedatectl set-ntp true)")]
    return [ok("system.clock", f"{text}; matters with several hosts")]


def compare_clocks(skews_s: list[float], doubt_s: float, hosts: list[str]) -> list[Finding]:
    """Look at what the ranks' clocks showed at one moment.

    Args:
        skews_s: by rank, against rank 0's.
        doubt_s: how long "one moment" was.
        hosts: by rank.
    """
    worst = max(range(len(skews_s)), key=lambda rank: abs(skews_s[rank]))
    skew = skews_s[worst]
    if abs(skew) - doubt_s > _MAX_SKEW_S:
        text = f"the clock of rank {worst} ({hosts[worst]}) is {skew:+.1f} s from rank 0's ({hosts[0]})"
        cure = "start chrony or systemd-timesyncd on both hosts: logs and the newest checkpoint are told by time"
        return [error("self_test.clock", text, cure, skews_s=skews_s)]
    return [ok("self_test.clock", f"clocks agree within {abs(skew) + doubt_s:.3f} s", skews_s=skews_s)]
