"""``distadam bench``: it measures what it says, and calls two files different only where their times do not overlap.

Times themselves are not tested: the machine decides them.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distadam.cli import app
from distadam.cli.bench_results import Result, Run
from tests.test_cli import run

pytestmark = pytest.mark.long


def test_bench_comm_measures_every_transport_with_the_payload_of_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "comm.json"
    done = run("bench", "comm", "--nproc", "2", "--sizes", "0.25", "--repeats", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    assert [result["name"] for result in results] == [
        f"{name}, {transport}, 0.25 MiB"
        for transport in ("native", "exchange", "shared")
        for name in ("reduce-scatter", "all-gather")
    ]
    for result in results:
        assert len(result["times_ms"]) == 2
        assert min(result["times_ms"]) > 0
        assert result["nbytes"] == 2**17  # half of the buffer goes to the other rank
        assert result["name"] in done.stdout


@pytest.mark.long
def test_bench_step_measures_the_parts_of_a_step_and_compares_them_with_a_file(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    old = [Result(name="whole step, 0.4 M parameters", times_ms=[1e6])]
    Run.of("distadam bench step", old).write(before)
    done = run("bench", "step", "--nproc", "1", "--sizes", "0.4", "--repeats", "2", "--compare", str(before))
    assert done.returncode == 0, done.stderr
    for part in ("forward and backward", "whole step", "update of a shard"):
        assert f"{part}, 0.4 M parameters" in done.stdout
    assert "1000000.00" in done.stdout.splitlines()[-2]


def test_bench_compare_calls_overlapping_times_noise(tmp_path: Path) -> None:
    times = {"same": ([1.0, 3.0], [2.0, 4.0]), "faster": ([4.0, 5.0], [1.0, 2.0]), "gone": ([1.0], [])}
    for place, name in enumerate(("a.json", "b.json")):
        results = [Result(name=key, times_ms=both[place]) for key, both in times.items()]
        Run.of("distadam bench comm", results).write(tmp_path / name)
    done = CliRunner().invoke(app, ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    rows = {line.split("│")[1].strip(): line for line in done.output.splitlines() if line.startswith("│")}
    assert set(rows) == {"same", "faster"}
    assert "1.50 (within noise)" in rows["same"]
    assert "0.33 " in rows["faster"]
    assert "noise" not in rows["faster"]


def test_bench_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for arguments, message in (
        (["comm", "--sizes", "1,none"], "expected positive numbers"),
        (["step", "--compare", str(tmp_path / "other.json")], "expected a file"),
    ):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 2
        assert message in done.output
