"""Devices, backends, and which kernel an update would take."""

from __future__ import annotations

from typing import Any

import torch

from distadam import native
from distadam.comm.backends import available_backends
from distadam.comm.launchers import find
from distadam.doctor.finding import Finding, error, ok, warning
from distadam.doctor.system import allowed_cpus
from distadam.errors import ConfigError
from distadam.kernels import select
from distadam.kernels.compiled import disagreement
from distadam.rules import RULES

_GROUP: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "momentum": 0.9,
    "dampening": 0.0,
    "amsgrad": False,
    "nesterov": False,
    "maximize": False,
    "centered": False,
    "decoupled_weight_decay": False,
}


def check_devices() -> list[Finding]:
    """Look for accelerators and the backends that serve them."""
    cores = len(allowed_cpus())
    backends = available_backends()
    have = ", ".join(name for name, there in backends.items() if there)
    findings = []
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = ", ".join(f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards)
        findings.append(ok("devices.accelerators", f"{text}; {cores} cores", cores=cores, accelerators=len(cards)))
        if not backends["nccl"]:
            cure = "install a torch build with NCCL (Linux, CUDA)"
            findings.append(error("devices.nccl", "CUDA devices, but torch has no NCCL backend", cure))
    else:
        text = f"no accelerator; {cores} cores, {torch.get_num_threads()} threads of a process"
        findings.append(ok("devices.accelerators", text, cores=cores, accelerators=0))
    findings.append(ok("devices.backends", f"torch.distributed has {have}", **backends))
    if not backends["gloo"]:
        cure = "install an official build of torch"
        findings.append(error("devices.gloo", "torch has no gloo backend, over which hosts agree", cure))
    return findings


def check_kernels() -> list[Finding]:
    """Say which kernel each rule would take on this machine, and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: dict[str, str] = {}
    for name, rule in RULES.items():
        try:
            choice = select(rule, _GROUP, torch.float32, device)
        except ConfigError as problem:
            return [error("kernels.choice", str(problem), "unset DISTADAM_KERNEL", rule=name)]
        chosen[name] = f"{choice.name} ({choice})"
    by_kernel: dict[str, list[str]] = {}
    for name, text in chosen.items():
        by_kernel.setdefault(text, []).append(name)
    text = "; ".join(f"{', '.join(names)}: {kernel}" for kernel, names in by_kernel.items())
    findings = [ok("kernels.choice", text, **chosen)]
    if device == "cuda" and not any(kernel.startswith("triton") for kernel in chosen.values()):
        cure = "pip install 'distadam[triton]', and a C compiler for it (apt-get install gcc)"
        findings.append(warning("kernels.triton", "CUDA, but no update would take Triton's kernels", cure))
    missing = native.obstacle() or disagreement()
    if missing is not None:
        cure = f"install a wheel of distadam, or build it where a C compiler is; unset {native.ENVIRONMENT_VARIABLE}"
        findings.append(
            warning("kernels.compiled", f"updates on the CPU are slower than they could be: {missing}", cure)
        )
    return findings


def check_threads(
    num_local: int, environment: dict[str, str], num_cores: int, num_threads: int, *, has_cuda: bool = False
) -> list[Finding]:
    """Look whether ranks would crowd each other out.

    Args:
        num_local: ranks on this host.
        environment: of the ranks.
        num_cores: that these ranks may use together.
        num_threads: that torch takes in this process, whatever says so.
        has_cuda: ranks compute on devices.
    """
    setting = environment.get("OMP_NUM_THREADS", "")
    started = find(environment)
    if not setting and (started is None or started.kind == "torchrun" or has_cuda):
        return [ok("threads.omp", "OMP_NUM_THREADS is not set: torchrun sets 1, distadam launch shares the cores out")]
    threads = num_threads if not setting else int(setting) if setting.isdecimal() else 0
    if threads < 1:
        cure = f"export OMP_NUM_THREADS={max(1, num_cores // num_local)}"
        return [error("threads.omp", f"OMP_NUM_THREADS: expected a positive number but got {setting!r}", cure)]
    text = f"{num_local} ranks x {threads} threads on {num_cores} cores"
    if not setting:
        text += ", as OMP_NUM_THREADS is not set"
    if num_local * threads > num_cores:
        cure = f"export OMP_NUM_THREADS={max(1, num_cores // num_local)}"
        return [warning("threads.omp", f"{text}: threads wait for each other", cure)]
    return [ok("threads.omp", text)]
