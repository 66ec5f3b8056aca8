"""Versions of what is installed, and whether they go together."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distadam.doctor.finding import Finding, error, ok, warning

OLDEST_TORCH = (2, 9)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What must be the same on every rank, and the host it is about."""

    host: str
    distadam: str
    torch: str
    cuda: str
    triton: str
    python: str

    @classmethod
    def here(cls) -> Facts:
        """Return this process's."""
        return cls(
            host=socket.gethostname(),
            distadam=installed("distadam") or "from a checkout",
            torch=str(torch.__version__),
            cuda=torch.version.cuda or "none",
            triton=installed("triton") or "none",
            python=platform.python_version(),
        )


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(facts: Facts, driver: Path = _NVIDIA_DRIVER) -> list[Finding]:
    """Look at this process's versions.

    Args:
        facts: of this process.
        driver: the file that is there while an NVIDIA driver is loaded.
    """
    what = f"distadam {facts.distadam}, torch {facts.torch}, Python {facts.python}"
    found = re.match(r"(\d+)\.(\d+)", facts.torch)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return [
            error(
                "versions.torch",
                f"expected torch {wanted} or newer but got {facts.torch}",
                f'pip install "torch>={wanted}" (on every host, the same version)',
                **asdict(facts),
            )
        ]
    findings = [ok("versions.torch", what, **asdict(facts))]
    if facts.cuda == "none" and driver.exists():
        findings.append(
            warning(
                "versions.cuda",
                f"an NVIDIA driver is loaded, but torch {facts.torch} is built without CUDA: training runs on the CPU",
                "install a CUDA build of torch of the same version",
            )
        )
    return findings


def compare_facts(ranks: Sequence[Facts]) -> list[Finding]:
    """Look for versions that differ between ranks, which then differ in bits or do not understand each other."""
    findings = []
    for name in ("torch", "distadam", "cuda", "triton", "python"):
        values = [getattr(facts, name) for facts in ranks]
        for rank, value in enumerate(values):
            if value == values[0]:
                continue
            text = (
                f"{name} differs: {values[0]} on rank 0 ({ranks[0].host}), {value} on rank {rank} ({ranks[rank].host})"
            )
            cure = f"install one version of {name} on all hosts, in one image say"
            make = error if name in ("torch", "distadam") else warning
            findings.append(make(f"versions.{name}_differs", text, cure, ranks=values))
            break
    if not findings and len(ranks) > 1:
        num_hosts = len({facts.host for facts in ranks})
        findings.append(ok("versions.ranks", f"the same on {len(ranks)} ranks of {num_hosts} hosts"))
    return findings
