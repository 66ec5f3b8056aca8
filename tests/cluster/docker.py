"""A Docker engine with distadam's image, built from files: a base made by debootstrap, wheels made by pip."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAMS = ("dockerd", "docker", "docker-compose", "debootstrap", "tar")
BASE, IMAGE, CUDA_IMAGE = "distadam-base:test", "distadam:test", "distadam-cuda:test"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # Debian's programs, whatever else is called docker here


def missing() -> str:
    """Say what this host lacks; nothing if it lacks nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed ({', '.join(absent)}): apt-get install docker.io docker-compose debootstrap"
    return "" if os.geteuid() == 0 else "Docker's daemon is started by root"


def mirror() -> str:
    """Return where apt gets Debian from."""
    lists = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for path in lists:
        found = re.search(
            r"^(?:URIs:|deb)\s+(?:\[.*\]\s+)?(\S+/debian/?)(?:\s|$)", path.read_text() if path.exists() else "", re.M
        )
        if found:
            return found.group(1)
    raise RuntimeError("expected a Debian mirror in /etc/apt/sources.list or sources.list.d")


def run(*command: str, timeout_s: float = 900.0, **environment: str) -> str:
    """Run a command; return what it says.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    settings = {**os.environ, "PATH": f"{_PATH}:{os.environ['PATH']}", "DOCKER_BUILDKIT": "0", **environment}
    done = subprocess.run(command, cwd=ROOT, env=settings, text=True, capture_output=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


class EngineRefused(RuntimeError):
    """dockerd does not start on this host: no control groups, no overlay, no right to change the network."""


class Engine:
    """A running daemon: the host's, or one that is started here and ended with the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Engine:
        if not self._answers():
            with open(self._folder / "dockerd.log", "wb") as log:
                settings = {**os.environ, "PATH": f"{_PATH}:{os.environ['PATH']}"}
                self._daemon = subprocess.Popen(
                    ["dockerd", "--data-root", str(self._folder / "data")], env=settings, stdout=log, stderr=log
                )
            ends = time.monotonic() + 60
            while not self._answers():
                if self._daemon.poll() is not None or time.monotonic() > ends:
                    self.__exit__()
                    raise EngineRefused(f"dockerd: {(self._folder / 'dockerd.log').read_text()[-3000:]}")
                time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon is None:
            for image in (CUDA_IMAGE, IMAGE, BASE):
                subprocess.run(
                    [shutil.which("docker", path=_PATH) or "docker", "image", "rm", image], capture_output=True
                )
        elif self._daemon.poll() is None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(60)
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    @staticmethod
    def _answers() -> bool:
        try:
            run("docker", "version", timeout_s=20)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True

    def build(self) -> None:
        """Make the base, the wheels and the image; the build has no network."""
        root = self._folder / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, "bookworm", str(root), mirror())
        script = 'tar -C "$1" -c . | docker import --change "ENV PATH=$3" - "$2"'
        run("sh", "-c", script, "sh", str(root), BASE, f"/usr/local/sbin:/usr/local/bin:{_PATH}")
        shutil.rmtree(root)
        import torch

        shutil.rmtree(ROOT / "docker/wheels", ignore_errors=True)
        run("docker/wheels.sh", PYTHON=sys.executable, TORCH=f"torch=={torch.__version__.partition('+')[0]}")
        self.image("cpu", IMAGE)

    @staticmethod
    def image(kind: str, name: str) -> None:
        """Build ``docker/KIND.Dockerfile`` from the base and the wheels."""
        arguments = ["--network", "none", "--build-arg", f"BASE={BASE}", "--build-arg", "EXTRAS=prometheus"]
        run("docker", "build", *arguments, "-f", f"docker/{kind}.Dockerfile", "-t", name, ".", timeout_s=1200)


class Compose:
    """``docker-compose`` on docker/compose.yaml under a name of its own; `close` removes what it made."""

    def __init__(self, name: str, **settings: str) -> None:
        self._command = ("docker-compose", "--project-name", name, "--file", "docker/compose.yaml")
        self._settings = {"IMAGE": IMAGE, "BASE": BASE, **settings}
        self.name = name

    def __call__(self, *arguments: str) -> str:
        return run(*self._command, *arguments, **self._settings)

    def logs(self) -> str:
        return self("logs", "--no-color")

    def container(self, service: str) -> dict[str, Any]:
        """Return what the engine knows of a service's container."""
        return dict(json.loads(run("docker", "inspect", f"{self.name}_{service}_1"))[0])

    def read(self, path: str) -> str:
        """Return a file of the volume of checkpoints."""
        volume = f"{self.name}_checkpoints:/checkpoints:ro"
        return run("docker", "run", "--rm", "--network", "none", "-v", volume, IMAGE, "cat", f"/checkpoints/{path}")

    def close(self) -> None:
        self("down", "--volumes", "--timeout", "5")
