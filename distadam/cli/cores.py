"""Which cores each rank of this host has to itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

__all__ = ["divide", "find_cores", "spell"]

_SYSTEM = Path("/sys/devices/system/cpu")


def find_cores(cpus: Sequence[int], system: Path = _SYSTEM) -> list[list[int]]:
    """Return the CPUs by physical core, those of one socket and NUMA node beside each other.

    Args:
        cpus: that may be used; a hardware thread that is not among them is left out of its core.
        system: where the kernel describes its CPUs. A CPU that it does not describe is a core by itself.
    """
    cores: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(cpus):
        place = system / f"cpu{cpu}"
        socket = _read(place / "topology/physical_package_id") or "0"
        first = (_read(place / "topology/thread_siblings_list") or str(cpu)).replace("-", ",").split(",")[0]
        node = next((path.name.removeprefix("node") for path in place.glob("node[0-9]*")), "0")
        cores.setdefault((int(socket), int(node), int(first)), []).append(cpu)
    return [cores[key] for key in sorted(cores)]


def divide(cores: Sequence[Sequence[int]], num_local: int) -> list[list[int]]:
    """Return each local rank's CPUs: consecutive whole cores, as many for each as for the others, give or take one."""
    bounds = [rank * len(cores) // num_local for rank in range(num_local + 1)]
    return [sorted(cpu for core in cores[start:end] for cpu in core) for start, end in itertools.pairwise(bounds)]


def spell(cpus: Sequence[int]) -> str:
    """Return CPUs as taskset takes them: "0-3,8"."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
