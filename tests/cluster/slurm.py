"""A Slurm cluster of two virtual nodes on this host, made of Debian's packages, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "srun")

# A node remembers for cred_expire seconds whose credential was revoked, and Slurm holds a requeued job for so long: one
# that starts earlier fails now and then ("Job credential revoked"). The default is 120.
_CONF = """\
ClusterName=distadamtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
FirstJobId={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=5
SchedulerParameters=sched_interval=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Say what this host lacks for a Slurm of its own; nothing if it lacks nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started by root"


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin"


class Cluster:
    """Daemons that live while the context does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir()
        first = 17001 + os.getpid() % 500 * 4
        ports = {"ctld": first + 2, "first": first, "last": first + 1}
        text = _CONF.format(host=socket.gethostname().split(".")[0], folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={self.folder / place}" for name, place in places.items()]
        try:
            self._start("munged", "--foreground", "--force", f"--seed-file={self.folder / 'munge.seed'}", *options)
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self._until(lambda: self.run("sinfo", "--noheader", "--format=%t%D").strip() == "idle2", "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--partition=main")  # a job of a test that failed would outlive the daemons
            self._until(lambda: not self.run("squeue", "--noheader").strip(), "no jobs", 15.0)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=_path())
        assert path is not None
        with (self.folder / f"{program}.out").open("ab") as output:
            command = [path, *arguments]
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))

    def _until(self, met: object, what: str, seconds: float = 30.0) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                if met():  # type: ignore[operator]
                    return
            except subprocess.CalledProcessError:
                pass
            time.sleep(0.2)
        logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.[ol][uo][tg]"))
        raise TimeoutError(f"{what}: not after {seconds} s\n{logs}")

    def run(self, *command: str, **variables: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def state(self, job: str) -> str:
        """Return a job's state as ``scontrol`` shows it: RUNNING, PENDING, COMPLETED, ..."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]


def until(met: Callable[[], bool], said: Callable[[], str], seconds: float = 150.0) -> None:
    """Wait while the job says something new now and then: how fast it trains is the machine's matter."""
    heard, ends = "", time.monotonic() + seconds
    while not met():
        if said() != heard:
            heard, ends = said(), time.monotonic() + seconds
        assert time.monotonic() < ends, f"nothing new for {seconds} s:\n{heard}"
        time.sleep(0.3)


def completed(cluster: Cluster, job: str, said: Callable[[], str]) -> None:
    """Wait for a job's end, which must be a good one."""
    until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), said)
    about = cluster.run("scontrol", "show", "job", job) + (cluster.folder / "ctld.log").read_text()[-3000:]
    assert cluster.state(job) == "COMPLETED", said() + about
