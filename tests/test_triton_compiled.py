"""What the compiler makes of the kernels for compute capability 8.0, 9.0 and 10.0, without a GPU.

Five storages are compiled here, with the checks of `make kernels`: bytes moved in 128-bit accesses (64 for 1-byte
storages) exactly the plan's, no spills, no fused multiply-add, registers within the limit. `docs/kernels.md` holds all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install 'distadam[triton]')")

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools/compile_kernels.py"
BYTES = {
    ("fp32", "fp32"): 28.0,
    ("split", "fp32"): 26.0,
    ("split", "bf16"): 18.0,
    ("split", "8bit"): 14.1,
    ("stochastic", "8bit"): 10.1,
}


def table(page: str) -> list[dict[str, str]]:
    """The table of updates, a dictionary a line."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    header = [cell.strip() for cell in rows[0]]
    return [dict(zip(header, row, strict=True)) for row in rows[1:] if len(row) == len(header)]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tools'}"
    command = [sys.executable, "-c", script] if "\n" in script else [sys.executable, script]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.long
def test_kernels_move_the_minimum_and_spill_nothing(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    done = run(str(TOOL), "--representative", "--out", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(page.read_text())
    assert {row["cc"] for row in rows} == {"8.0", "9.0", "10.0"}
    moved = {(row["weights"], row["moments"]): round(float(row["bytes/elem"]), 1) for row in rows}
    assert moved == BYTES
    assert len(rows) == 3 * len(BYTES)


def test_page_in_docs_holds_every_rule_and_storage() -> None:
    rows = table((ROOT / "docs/kernels.md").read_text())
    assert {row["bytes/elem"] == row["minimum"] for row in rows} == {True}
    assert {row["spilled"] for row in rows} == {"0"}
    assert {row["rule"].split()[0] for row in rows} == {"adam", "adamw", "sgd", "rmsprop"}
    adamw = [row for row in rows if row["rule"] == "adamw" and row["weights"] != "own"]
    for (weights, moments), expected in BYTES.items():
        found = {
            round(float(row["bytes/elem"]), 1)
            for row in adamw
            if (row["weights"], row["moments"], row["gradient"]) == (weights, moments, "bf16")
        }
        assert found == {expected}


BROKEN = """
import compile_kernels as tool
launch = tool.REPRESENTATIVE[0].launch()
options = {OPTIONS}
compiled = tool.compile_launch(launch._replace(options={{**launch.options, **options}}), 90)
if {UNALIGNED}:
    tool.DIVISIBLE = [["tt.divisibility", 4]]
    compiled = tool.compile_launch(launch, 90)
print("; ".join(tool.faults(tool.REPRESENTATIVE[0], compiled)))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "unaligned", "fault"),
    [
        ({"enable_fp_fusion": True}, False, "fused multiply-adds"),
        ({"maxnreg": 24}, False, "bytes spilled"),
        ({}, True, "bytes an element in wide accesses instead of 28"),
    ],
    ids=["fusion", "spills", "narrow"],
)
def test_check_notices_what_breaks_the_plan(options: dict[str, object], unaligned: bool, fault: str) -> None:
    done = run(BROKEN.format(OPTIONS=options, UNALIGNED=unaligned))
    assert done.returncode == 0, done.stderr
    assert fault in done.stdout
