"""One configuration under every launcher: the same bits in every parameter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, completed
from tests.cluster.slurm import missing as slurm_missing
from tests.mpi import environments

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCRIPT = """
import hashlib, sys
import torch, torch.distributed as dist, distadam
from torch import nn

run = distadam.init_process_group(timeout_s=60.0)
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(40, 300), nn.GELU(), nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 7))
comm = distadam.CommPolicy(reduce="exchange", bucket_mb=0.1)
optimizer = distadam.AdamW(model.named_parameters(), lr=1e-2, comm=comm)
data = torch.Generator().manual_seed(run.rank)
for _ in range(20):
    model(torch.randn(16, 40, generator=data)).square().mean().backward()
    optimizer.clip_grad_norm_(0.5)
    optimizer.step()
optimizer.flush()
bits = b"".join(param.detach().numpy().tobytes() for param in model.parameters())
with open(f"{sys.argv[1]}.{run.rank}", "w") as file:
    file.write(f"{run.launcher}, {run.backend}, {run.world_size}: {hashlib.sha256(bits).hexdigest()}")
dist.destroy_process_group()
"""


def test_every_launcher_trains_to_the_same_bits(tmp_path: Path) -> None:
    lacking = [text for text in (slurm_missing(), *map(environments.missing, environments.IMPLEMENTATIONS)) if text]
    if lacking:
        pytest.skip("; ".join(lacking))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    settings = environments.environment(NPROC="2", MASTER_ADDR="127.0.0.1")

    def start(name: str, launcher: str, **more: str) -> None:
        command = [str(ROOT / "launch" / launcher), str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=settings | more, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    start("torchrun", "torchrun.sh", PYTHON=sys.executable)
    for library, options in (("mpich", ""), ("openmpi", "--oversubscribe")):
        programs = environments.folder(library)
        start(library, "mpirun.sh", PYTHON=f"{programs}/python", MPIEXEC=f"{programs}/mpiexec", MPIEXEC_ARGS=options)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster") as cluster:
        for name, programs in (("slurm", Path(sys.executable).parent), ("slurm_mpi", environments.folder("mpich"))):
            output = tmp_path / f"{name}.out"
            command = ["sbatch", "--parsable", f"--output={output}", f"{ROOT}/launch/{name}.sbatch", str(script)]
            more = {"PYTHON": f"{programs}/python", "MPIEXEC": f"{programs}/mpiexec", "PYTHONPATH": str(ROOT)}
            job = cluster.run(*command, str(tmp_path / name), **more, NPROC="1", MASTER_ADDR="127.0.0.1").strip()
            completed(cluster, job, lambda path=output: path.read_text() if path.exists() else "")

    found = {}
    for name in ("torchrun", "mpich", "openmpi", "slurm", "slurm_mpi"):
        said, bits = zip(*((tmp_path / f"{name}.{rank}").read_text().split(": ") for rank in range(2)), strict=True)
        assert len(set(bits)) == 1, name
        found[said[0]] = bits[0]
    names = {"torchrun, gloo, 2", "MPICH or Intel MPI, mpi4py, 2", "Open MPI, mpi4py, 2"}
    assert found.keys() >= names
    assert len(set(found.values())) == 1, found
