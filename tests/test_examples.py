"""Every example runs as its docstring says, on one process and on two, and what it prints is right.

Tolerance of the training curves: distadam sums in another order than torch does, a relative difference of about 1e-7 in
a gradient, which training multiplies; 30 steps at these sizes give differences below 1e-5. Gradients that are not
averaged, or ranks that see the wrong examples, move the curve by more than 1e-2. The bound is 1e-4.
"""

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distadam.diagnostics.report_data import read_run, summary
from distadam.diagnostics.report_page import render

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SIZES = {"--batch-size": 8, "--seq-len": 32, "--layers": 1, "--heads": 2, "--width": 32, "--sample-bytes": 40}
LENGTH = {"--steps": 30, "--log-every": 5, "--eval-every": 15, "--eval-batches": 2}
LONG = pytest.mark.long
RECORDED = ["--steps", "8", "--log-every", "4", "--eval-every", "8", "--eval-batches", "1", "--watch-every", "2"]
SMALL = [str(part) for option in (SIZES | LENGTH).items() for part in option]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command from the checkout as a person would, and fail on any other end than success."""
    launcher_variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher_variables}
    env = {"OMP_NUM_THREADS": "1"} | kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | variables
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def one(script: str, *arguments: str) -> str:
    """Run on one process, where nothing may be said on stderr; return stdout."""
    done = run(sys.executable, f"examples/{script}", *arguments)
    assert done.stderr == ""
    return done.stdout


def launched(script: str, *arguments: str) -> str:
    """Run on two ranks with ``distadam launch``; return stdout."""
    return run(sys.executable, "-m", "distadam", "launch", "--nproc", "2", f"examples/{script}", *arguments).stdout


def torchrun(script: str, *arguments: str) -> str:
    """Run on two ranks with ``launch/torchrun.sh``; return stdout."""
    return run("launch/torchrun.sh", f"examples/{script}", *arguments, NPROC="2", PYTHON=sys.executable).stdout


def curve(folder: Path, key: str) -> list[float]:
    points = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [point[key] for point in points if key in point]


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("0*.py")))
def test_small_examples_stay_under_80_lines(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 80


def test_01_one_process_learns_as_torch_does():
    lines = one("01_one_process.py").splitlines()
    found = [re.fullmatch(r"(\S+) +loss ([\d.]+), ([\d.]+)% of new points right", line) for line in lines]
    (theirs, ours) = [match for match in found if match]
    assert (theirs[1], ours[1]) == ("torch.optim.AdamW", "distadam.AdamW")
    assert float(ours[3]) > 97
    assert abs(float(ours[3]) - float(theirs[3])) < 2


@pytest.mark.long
@pytest.mark.parametrize("start", [one, launched, torchrun])
def test_02_two_processes_ends_with_equal_weights(start):
    printed = start("02_two_processes.py")
    right = [int(share) for share in re.findall(r"(\d+)% of sums right", printed)]
    assert right[0] < 20
    assert right[-1] > 80
    ends = re.findall(r"rank (\d): sum of weights (\S+), ([\d,]+) bytes", printed)
    assert sorted(rank for rank, _, _ in ends) == (["0"] if start is one else ["0", "1"])
    assert len({weights for _, weights, _ in ends}) == 1
    state = [int(nbytes.replace(",", "")) for _, _, nbytes in ends]
    moments_and_steps = 8 * (40 * 512 + 512 + 512 * 30 + 30) + 4 * 4
    assert all(moments_and_steps / len(ends) <= nbytes < moments_and_steps / len(ends) + 2048 for nbytes in state)


@pytest.mark.long
@pytest.mark.parametrize("start", [one, launched])
def test_03_mixed_precision_learns_every_way(start):
    losses = re.findall(r"loss (\S+) -> (\S+)", start("03_mixed_precision.py"))
    assert len(losses) == 5
    assert all(float(last) < 1e-3 < 0.05 < float(first) for first, last in losses)


@pytest.mark.long
@pytest.mark.parametrize("start", [one, launched])
def test_04_accumulation_clipping_gives_same_result_with_both_clips(start):
    rows = re.findall(r"loss (\S+) -> (\S+), first norm (\S+), last (\S+)", start("04_accumulation_clipping.py"))
    own, torchs = [[float(value) for value in row] for row in rows]
    assert own == pytest.approx(torchs, rel=0.02)
    assert own[1] < 0.1 < own[0]


@pytest.mark.long
def test_05_resume_on_more_ranks_ends_as_a_run_that_never_stopped(tmp_path):
    script = "05_resume_on_more_ranks.py"
    first = one(script, "--until", "30", "--directory", str(tmp_path / "a"))
    assert "steps 0 to 30 on 1 ranks, 720 samples" in first
    resumed = launched(script, "--until", "60", "--directory", str(tmp_path / "a"))
    whole = one(script, "--until", "60", "--directory", str(tmp_path / "b"))
    assert "steps 30 to 60 on 2 ranks, 1440 samples" in resumed
    (ours, lr), (theirs, same_lr) = (re.findall(r"loss (\S+), lr (\S+)", text)[0] for text in (resumed, whole))
    assert lr == same_lr
    assert float(ours) == pytest.approx(float(theirs), rel=1e-3)


@pytest.fixture(scope="module")
def references() -> dict[str, Path]:
    """Hold the folders of the runs with torch.optim, by optimizer; `reference` fills it."""
    return {}


@pytest.fixture
def reference(references, tmp_path_factory):
    """Return a function that trains with torch.optim, once for each optimizer, and returns the run's folder."""

    def get(optimizer: str) -> Path:
        if optimizer not in references:
            folder = tmp_path_factory.mktemp(f"reference_{optimizer}")
            one("train_gpt.py", *SMALL, "--optimizer", optimizer, "--reference", "--out", str(folder))
            references[optimizer] = folder
        return references[optimizer]

    return get


@pytest.mark.parametrize(
    ("optimizer", "start"),
    [
        ("adamw", one),
        pytest.param("adamw", launched, marks=LONG),
        pytest.param("sgd", torchrun, marks=LONG),
        pytest.param("rmsprop", one, marks=LONG),
        pytest.param("adam", one, marks=LONG),
    ],
)
def test_train_gpt_learns_as_torch_does(optimizer, start, reference, tmp_path):
    folder = reference(optimizer)
    printed = start(
        "train_gpt.py", *SMALL, "--optimizer", optimizer, "--out", str(tmp_path), "--plot-with", str(folder)
    )

    losses = curve(tmp_path, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(curve(folder, "loss"), abs=1e-4)
    validation = curve(tmp_path, "val_bits_per_byte")
    assert len(validation) == 2
    assert validation == pytest.approx(curve(folder, "val_bits_per_byte"), abs=1e-4)

    numbers = json.loads((tmp_path / "run.json").read_text())["bytes"]
    theirs, num_ranks = numbers["torch_optim"]["optimizer state"], 1 if start is one else 2
    assert len(numbers["ranks"]) == num_ranks
    for held in numbers["ranks"]:  # this rank's share, and padding to whole shards
        assert theirs / num_ranks <= held["optimizer state"] < theirs / num_ranks + 8192
        assert f"{held['optimizer state']:,}" in printed

    assert f"{validation[-1]:.4f} bits per byte" in printed
    assert "tokens/s ETA" in printed
    assert "\nclass Reader:\n    def " in (tmp_path / "sample.txt").read_text()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"^\[1\]", printed, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("start", [one, pytest.param(launched, marks=LONG)])
def test_train_gpt_writes_what_report_reads(start, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "checkpoints"), "--save-every", "4"]
    start("train_gpt.py", *SMALL[: len(SIZES) * 2], *RECORDED, *out)
    run, num_ranks = read_run(tmp_path / "out"), 1 if start is one else 2
    told = summary(run)
    assert (told["optimizer"], told["ranks"], told["unreadable_lines"]) == ("AdamW", num_ranks, 0)
    assert told["steps"] == {"count": 8, "first": 1, "last": 8}
    assert told["loss"]["min"] < told["loss"]["first"]
    assert told["lr"]["max"] == pytest.approx(4e-3, rel=0.1)
    assert told["tokens_per_s"] > 0
    assert (told["checkpoints"], told["incidents"]) == (2, [])
    assert all(save["bytes"] > 12 * 10_000 and save["seconds"] > 0 for save in run.checkpoints)
    for rank in range(num_ranks):
        assert all(told["parts_s"][str(rank)][part] > 0 for part in ("forward", "backward", "update"))
        assert told["peak_memory"][str(rank)]["moments"] > 0
    assert "blocks.0.mlp_out.weight" in run.parameters.rows
    assert [step for _, step in run.parameters.columns] == [2, 4, 6, 8]
    page = render(run)
    sections = ("Training", "Parameters", "Time", "Memory", "Checkpoints")
    assert all(f"<h2>{section}</h2>" in page for section in sections)


def test_train_gpt_gives_ranks_disjoint_parts_of_one_global_batch():
    train_gpt = load("train_gpt.py")
    text = torch.arange(4000).remainder(251).to(torch.uint8)

    def batches(rank: int, world_size: int):
        place = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
        return train_gpt.Batches(train=text, validation=text, batch_size=6, seq_len=8, seed=1, **place)

    whole, _ = batches(0, 1).training(5)
    for world_size in (2, 3):
        parts = [batches(rank, world_size).training(5)[0] for rank in range(world_size)]
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    assert not torch.equal(batches(0, 1).training(6)[0], whole)
    inputs, targets = batches(0, 1).training(5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_train_gpt_says_how_to_get_matplotlib(monkeypatch, tmp_path):
    train_gpt = load("train_gpt.py")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install distadam[plot]" in train_gpt.plot_curves([tmp_path], tmp_path / "curve.png")


@pytest.mark.long
def test_train_gpt_refuses_batch_that_does_not_divide():
    command = [sys.executable, "-m", "distadam", "launch", "--nproc", "2", "examples/train_gpt.py", "--batch-size", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert "--batch-size 7 does not divide over 2 ranks" in done.stderr


@pytest.mark.long
def test_train_gpt_resumes_with_the_curve_of_a_run_that_never_stopped(reference, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "checkpoints")]
    length = [*SMALL[: len(SIZES) * 2], "--log-every", "5", "--eval-every", "15", "--eval-batches", "2"]
    launched("train_gpt.py", *length, "--steps", "30", "--save-every", "10", *out)
    newest = tmp_path / "checkpoints" / "step-000000030"
    newest.joinpath("commit.json").unlink()  # as if it had died while it saved
    one("train_gpt.py", *length, "--steps", "30", *out)
    points = {
        p["step"]: p["loss"] for p in map(json.loads, (tmp_path / "out" / "curve.jsonl").read_text().splitlines())
    }
    assert [points[step] for step in sorted(points)] == pytest.approx(curve(reference("adamw"), "loss"), abs=1e-4)


@pytest.mark.long
def test_train_gpt_is_monitored_on_a_port_for_each_rank(tmp_path):
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = [str(part) for option in (SIZES | {"--steps": 100_000}).items() for part in option]
    script = ["examples/train_gpt.py", *sizes, "--out", str(tmp_path), "--metrics", str(port)]
    command = [sys.executable, "-m", "distadam", "launch", "--nproc", "2", *script]
    env = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = {}
    try:
        deadline = time.monotonic() + 150
        while len(steps) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
            for rank in range(2):
                with contextlib.suppress(OSError):
                    found = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/healthz", timeout=5))
                    assert (found["rank"], found["status"]) == (rank, "ok")
                    if found["step"] > 1:
                        steps[rank] = found["step"]
        text = urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/metrics", timeout=5).read().decode()
        assert 'distadam_step{rank="1"}' in text
    finally:
        process.terminate()
        process.wait(60)
