"""Several hosts on one machine: network namespaces that meet on a bridge in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORT = 29400


def missing() -> str:
    """Say what this host lacks; nothing if it lacks nothing."""
    absent = [name for name in ("ip", "tc") if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed ({', '.join(absent)}): apt-get install iproute2"
    return "" if os.geteuid() == 0 else "network namespaces are made by root"


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(*command: str) -> None:
    done = subprocess.run(command, env={**os.environ, "PATH": _PATH}, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Hosts:
    """``num_hosts`` hosts, 10.77.0.1 and up, on one switch; nothing leads out of it."""

    def __init__(self, num_hosts: int) -> None:
        self.num_hosts = num_hosts
        self._prefix = f"dh{os.getpid() % 100000}"
        self._switch = f"{self._prefix}s"
        self._names = [f"{self._prefix}h{index}" for index in range(num_hosts)]

    def __enter__(self) -> Hosts:
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "br0", "up")
            for index, name in enumerate(self._names):
                _run("ip", "netns", "add", name)
                pair = ["peer", "name", f"port{index}", "netns", self._switch]
                _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", *pair)
                _run("ip", "-n", self._switch, "link", "set", f"port{index}", "master", "br0", "up")
                _run("ip", "-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except RuntimeError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], env={**os.environ, "PATH": _PATH}, capture_output=True)

    def address(self, index: int) -> str:
        """Return a host's address."""
        return f"10.77.0.{index + 1}"

    def link(self, index: int, state: str) -> None:
        """Set a host's port of the switch "up" or "down": what it sends is lost, and nobody is told."""
        _run("ip", "-n", self._switch, "link", "set", f"port{index}", state)

    def slow(self, index: int, *discipline: str) -> None:
        """Shape what a host sends: arguments of ``tc qdisc add dev eth0 root``."""
        _run("tc", "-n", self._names[index], "qdisc", "add", "dev", "eth0", "root", *discipline)

    def start(self, index: int, *command: str, log: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        settings = {name: value for name, value in os.environ.items() if name not in names}
        settings |= {"PATH": _PATH, "PYTHONPATH": str(ROOT), **environment}
        whole = ["ip", "netns", "exec", self._names[index], *command]
        with nullcontext() if log is None else log.open("w") as into:
            return subprocess.Popen(
                whole, env=settings, cwd=ROOT, stdout=into, stderr=into, text=True, start_new_session=True
            )

    def torchrun(self, index: int, log: Path, nnodes: str, *script: str, **environment: str) -> subprocess.Popen[str]:
        """Start torchrun on a host, one rank; the agents meet on the first host."""
        conf = {"is_host": int(index == 0), "last_call_timeout": 3, "join_timeout": 60}
        conf |= {"keep_alive_interval": 1, "keep_alive_max_attempt": 3}
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes, "--nproc-per-node", "1"]
        command += ["--max-restarts", "3", "--monitor-interval", "0.2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "hosts", "--rdzv-endpoint", f"{self.address(0)}:{PORT}"]
        command += ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in conf.items())]
        command += ["--local-addr", self.address(index), *script]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return self.start(index, *command, log=log, **settings, **environment)
