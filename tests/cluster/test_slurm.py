"""``sbatch launch/slurm.sbatch`` on a real Slurm of two virtual nodes: starts, saves when told to, starts again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, completed, missing, until
from tests.mpi import environments

ROOT = Path(__file__).parents[2]


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path):
    if missing():
        pytest.skip(missing())
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm") as started:
        yield started


STUB = """#!/usr/bin/env bash
echo "node $SLURM_NODEID, start $SLURM_RESTART_COUNT, patience $TORCH_ELASTIC_SHUTDOWN_TIMEOUT: $*"
trap 'echo "node $SLURM_NODEID saved"; exit 143' TERM
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then for i in $(seq 600); do sleep 0.1; done; exit 9; fi
echo "node $SLURM_NODEID done"
"""


def test_sbatch_starts_torchrun_on_every_node_and_goes_back_into_the_queue_after_usr1(cluster, tmp_path):
    """In Python's place stands a script that says how it was called: Slurm and `slurm.sbatch` alone, without torch."""
    stub, output = tmp_path / "python", tmp_path / "job.out"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def said() -> str:
        return output.read_text() if output.exists() else ""

    options = ["--parsable", f"--output={output}", f"--chdir={tmp_path}", str(ROOT / "launch/slurm.sbatch")]
    job = cluster.run("sbatch", *options, "train.py", "--name", "a b", "$x", PYTHON=str(stub), NPROC="3").strip()
    until(lambda: said().count(", patience 240:") == 2, said, 60)
    for node in (0, 1):
        port = 20000 + int(job) % 10000
        meeting = f"--master-addr n1 --master-port {port} --node-rank {node} train.py --name a b $x"
        assert f"-m torch.distributed.run --nnodes 2 --nproc-per-node 3 {meeting}\n" in said()
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 does near the time limit
    until(lambda: cluster.state(job) == "PENDING", said, 60)
    assert "node 0 saved" in said()
    assert "node 1 saved" in said()
    completed(cluster, job, said)
    assert f"job {job}, start 2, nodes n[1-2]" in said()
    assert "node 0 done" in said()
    assert "node 1 done" in said()


ECHO = """#!/usr/bin/env bash
[ "$1" != --version ] || { echo "$VERSION"; exit; }
echo "$(basename "$0") on node $SLURM_NODEID: $*"
"""


@pytest.mark.parametrize(
    ("settings", "state", "words"),
    [
        ({}, "COMPLETED", ["mpiexec on node 0: -n 2 {python} -m mpi4py train.py --name a b\n"]),
        ({"MPI_TYPE": "none"}, "COMPLETED", [f"python on node {node}: -m mpi4py train.py --name a" for node in (0, 1)]),
        ({"VERSION": "mpiexec (OpenRTE) 4.1"}, "FAILED", ["Open MPI's", "set MPI_TYPE=pmix"]),
    ],
    ids=["mpiexec", "srun", "open-mpi"],
)
def test_sbatch_starts_mpi_ranks_by_mpiexec_or_by_srun(cluster, tmp_path, settings, state, words):
    """A script in the place of Python and of mpiexec says how it was called."""
    output, python, mpiexec = (tmp_path / name for name in ("job.out", "python", "mpiexec"))
    for stub in (python, mpiexec):
        stub.write_text(ECHO)
        stub.chmod(0o755)
    options = ["--parsable", f"--output={output}", f"--chdir={tmp_path}", str(ROOT / "launch/slurm_mpi.sbatch")]
    settings = {"PYTHON": str(python), "MPIEXEC": str(mpiexec), "VERSION": "HYDRA build details"} | settings
    job = cluster.run("sbatch", *options, "train.py", "--name", "a b", **settings).strip()
    until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), lambda: cluster.state(job), 60)
    assert cluster.state(job) == state, output.read_text()
    for part in words:
        assert output.read_text().count(part.format(python=python)) == 1, output.read_text()


START = """
import sys
sys.modules["mpi4py"] = None  # srun sets MPI's variables too where it is set up for it
import torch, torch.distributed as dist, distadam
info = distadam.init_process_group(timeout_s=60.0)
total = torch.ones(1)
dist.all_reduce(total)
print(f"{info}; sum {total.item():g}; again {distadam.init_process_group() == info}")
"""


def test_srun_alone_is_a_launcher(cluster):
    """``srun python``, without torchrun in between; the virtual nodes' names stand for no address, so one is given."""
    command = ["srun", "-N2", "-n2", "--export=ALL", sys.executable, "-c", START]
    text = cluster.run(*command, MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for rank in (0, 1):
        where = f"rank {rank} of 2 (local rank 0), device cpu"
        assert f"distadam: launcher Slurm, backend gloo, {where}; sum 2; again True" in text


def test_doctor_is_a_job_of_srun(cluster):
    """Nodes of one name are one host to the doctor: it is examined once, and has both ranks. srun sets no threads."""
    command = ["srun", "-N2", "-n2", "--export=ALL", sys.executable, "-m", "distadam", "doctor", "--seconds", "0.2"]
    settings = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "", "COLUMNS": "200"}
    text = cluster.run(*command, **settings)
    for words in ("Slurm started 2 ranks (SLURM_STEP_NUM_TASKS=2), 2 of them on this host", "2 ranks met", "all right"):
        assert text.count(words) == 1, text
    assert re.search(r"2 ranks x \d+ threads on \d+ cores, as OMP_NUM_THREADS is not set", text), text
    assert "distadam doctor: 0 errors" in text


STEPS = 60
OPTIONS = ["--steps", str(STEPS), "--eval-every", str(STEPS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run in one process that never stopped has found."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, str(ROOT / "examples/train_gpt.py"), *OPTIONS, "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("script_name", ["slurm.sbatch", "slurm_mpi.sbatch"])
def test_training_is_requeued_and_resumed_with_the_loss_of_a_run_that_never_stopped(
    cluster, tmp_path, whole, script_name
):
    programs = Path(sys.executable).parent
    if script_name == "slurm_mpi.sbatch":
        if environments.missing("mpich"):
            pytest.skip(environments.missing("mpich"))
        programs = environments.folder("mpich")
    output = tmp_path / "job.out"

    def said() -> str:
        return output.read_text() if output.exists() else ""

    def points() -> list[dict[str, float]]:
        path = tmp_path / "run" / "curve.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    script = [str(ROOT / "launch" / script_name), str(ROOT / "examples/train_gpt.py"), *OPTIONS]
    script += ["--out", str(tmp_path / "run"), "--resume", str(tmp_path / "checkpoints"), "--log-every", "1"]
    command = ["sbatch", "--parsable", f"--output={output}", f"--chdir={tmp_path}", *script]
    settings = {"PYTHON": f"{programs}/python", "MPIEXEC": f"{programs}/mpiexec", "PYTHONPATH": str(ROOT)}
    job = cluster.run(*command, **settings, NPROC="1", MASTER_ADDR="127.0.0.1", SAVE_S="60").strip()
    until(lambda: len(points()) >= 5, said)
    assert ("backend mpi4py" if script_name == "slurm_mpi.sbatch" else "launcher torchrun, backend gloo") in said()
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: cluster.state(job) == "PENDING", said, 90)
    reached = points()[-1]["step"]
    assert 5 <= reached < STEPS
    assert [int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()] == [reached]
    completed(cluster, job, said)
    assert f"job {job}, start 2, nodes n[1-2]" in said()
    assert [point["step"] for point in points()] == list(range(1, STEPS + 1))
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    # The same batches; two ranks add in another order, over 60 steps.
    assert found["val_bits_per_byte"] == pytest.approx(whole["val_bits_per_byte"], rel=2e-3)
