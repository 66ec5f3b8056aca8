"""``distadam report``: nothing that was recorded is lost on the way to the page, and anyone can read the page.

The page is parsed, not matched as text: ids are unique, every control has a name, nothing is fetched. That spikes stay
is checked on the numbers of the drawn shapes. No tolerances: what is compared is counted or formatted.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distadam.cli import app
from distadam.diagnostics.report_charts import (
    Line,
    Scale,
    line_chart,
    nbytes,
    parameter_map,
    seconds,
    short,
    step_ticks,
)
from distadam.diagnostics.report_data import NUM_BINS, NUM_COLUMNS, ParameterMap, read_run, summary, thin
from distadam.diagnostics.report_page import render
from distadam.errors import UsageError
from tests.report_runs import write_run

AXE = "axe-core@4.10.3"


class Page(HTMLParser):
    """Elements with their attributes, text by element, and what is open at the end."""

    VOID = frozenset({"meta", "link", "img", "input", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID and tag not in ("path",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trial"
    write_run(folder, num_steps=600, num_layers=12, spike=311, broken=450)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(render(read_run(folder)))


# Numbers -------------------------------------------------------------------------------------------------------------


def test_thin_keeps_every_extreme_and_counts_what_is_not_finite() -> None:
    points = [(step, math.sin(step)) for step in range(1, 100_001)]
    points[4321] = (4322, 99.0)
    points[70_000] = (70_001, -99.0)
    points[5] = (6, math.nan)
    bins = thin(points)
    assert len(bins) <= NUM_BINS
    assert max(b.high for b in bins) == 99.0
    assert min(b.low for b in bins) == -99.0
    assert sum(b.nonfinite for b in bins) == 1
    assert next(b for b in bins if b.high == 99.0).first <= 4322 <= next(b for b in bins if b.high == 99.0).last
    assert [b.last + 1 for b in bins[:-1]] == [b.first for b in bins[1:]]
    assert [(b.low, b.high, b.mean) for b in thin([(3, 1.0), (9, 2.0)])] == [(1, 1, 1), (2, 2, 2)]
    assert thin([]) == []


def test_map_keeps_the_largest_value_however_long_the_run_is() -> None:
    found = ParameterMap()
    for step in range(1, 2001):
        value = "nan" if step == 1500 else 1e6 if step == 777 else 1.0
        found.add(step, {"a": {"grad_norm": value}, "b": {"grad_norm": 2.0, "update_ratio": 1e-3}})
    assert NUM_COLUMNS <= len(found.columns) <= 2 * NUM_COLUMNS
    assert found.columns[0][0] == 1
    assert found.columns[-1][1] == 2000
    assert [last + 1 for _, last in found.columns[:-1]] == [first for first, _ in found.columns[1:]]
    by_step = {c: column[0] for c, column in zip(found.columns, found.high["grad_norm"], strict=True)}
    assert [c[0] <= 777 <= c[1] for c, value in by_step.items() if value == 1e6] == [True]
    assert [c[0] <= 1500 <= c[1] for c, value in by_step.items() if math.isinf(value)] == [True]
    assert found.worst("grad_norm")["a"] == (math.inf, 1500)
    assert math.isnan(found.high["update_ratio"][0][0])


def test_a_parameter_that_comes_late_has_a_row_and_no_values_before() -> None:
    found = ParameterMap()
    found.add(1, {"a": {"grad_norm": 1.0}})
    found.add(2, {"a": {"grad_norm": 1.0}, "late": {"grad_norm": 5.0}})
    assert found.rows == {"a": 0, "late": 1}
    assert [len(column) for column in found.high["grad_norm"]] == [1, 2]


def test_summary_says_what_happened(folder: Path) -> None:
    found = summary(read_run(folder))
    assert found["steps"] == {"count": 600, "first": 1, "last": 600}
    assert found["loss"]["max_step"] == 311
    assert found["loss"]["nonfinite_steps"] == [450]
    assert (found["optimizer"], found["ranks"], found["parameters"]) == ("AdamW", 2, 12)
    assert found["incidents"][0]["step"] == 450
    assert found["checkpoints"] == 5
    assert set(found["parts_s"]["1"]) == {"forward", "backward", "reduce", "update", "gather", "elsewhere"}
    assert found["peak_memory"]["0"]["masters"] == 90 * 2**20
    assert found["largest"]["grad_norm"][0]["step"] in (310, 320)
    json.loads(json.dumps(found, allow_nan=False))


def test_records_of_one_step_are_one_and_torn_lines_are_counted(tmp_path: Path) -> None:
    lines = [
        {"kind": "step", "step": 1, "rank": 0, "loss": "inf", "lr": [0.1], "step_s": 2.0},
        {"kind": "step", "step": 1, "rank": 0, "parts": {"backward": 0.5}},
        {"kind": "of a later version"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "st'
    (tmp_path / "rank-0.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert run.parts(0) == {"backward": 0.5, "elsewhere": 1.5}
    assert run.points("loss", 0) == [(1, math.inf)]
    assert run.num_unreadable == 1
    assert "1 lines could not be read" in render(run)
    with pytest.raises(UsageError, match=r"rank-<r>\.jsonl"):
        read_run(tmp_path / "nowhere")


def test_ranks_records_of_one_checkpoint_are_one(tmp_path: Path) -> None:
    for rank, (seconds_, nbytes_) in enumerate([(1.0, 10), (3.0, 20)]):
        save = {"kind": "checkpoint", "step": 5, "path": "p", "seconds": seconds_, "bytes": nbytes_, "time": rank}
        step = {"kind": "step", "step": 5, "rank": rank}
        (tmp_path / f"rank-{rank}.jsonl").write_text("\n".join(map(json.dumps, [step, save])))
    assert [(one["seconds"], one["bytes"]) for one in read_run(tmp_path).checkpoints] == [(3.0, 30.0)]


def test_cells_of_a_map_keep_three_digits() -> None:
    found = ParameterMap()
    values = [0.0123, 4.56e-7, 987.0, 0.0, "nan", "inf", None]
    for step, value in enumerate(values, 1):
        found.add(step, {"a": {} if value is None else {"grad_norm": value}})
    drawn = parameter_map("m", "Map", "", found, "grad_norm")
    payload = re.search(r'<script type="application/json" id="m">(.*?)</script>', drawn)
    assert payload is not None
    codes = json.loads(payload[1])["codes"][0]
    assert [10 ** (code / 1000) for code in codes[:3]] == pytest.approx(values[:3], rel=1.2e-3)
    assert codes[3:] == ["0", "not finite", "not finite", None]


def test_words_for_numbers() -> None:
    assert [short(v) for v in (0.0, 4e-3, 1.23456, 5e-5, 12345.6, 2.5e7)] == [
        *("0", "0.004", "1.235", "5e-5", "12,346", "2.5e7"),
    ]
    assert [seconds(v) for v in (2e-5, 0.0305, 12.0, 300.0, 7300.0)] == [
        "20 µs",
        "30.5 ms",
        "12 s",
        "5.0 min",
        "2 h 1 min",
    ]
    assert [nbytes(v) for v in (10, 2**20, 1.5 * 2**30)] == ["10 B", "1 MiB", "1.5 GiB"]


def test_scales_label_round_values_inside() -> None:
    assert Scale(0.0, 1.0, zero=True).ticks() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Scale(1e-4, 10.0, log=True).ticks() == [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    assert Scale(3.0, 3.0).place(3.0) == pytest.approx(0.5)
    for low, high in ((1.0, 2.0), (-5.0, 123.0), (1e-8, 3e-8)):
        scale = Scale(low, high)
        assert 3 <= len(scale.ticks()) <= 7
        assert all(0 <= scale.place(tick) <= 1 for tick in scale.ticks())
    assert step_ticks(1, 10_000)[0] == 1
    assert step_ticks(5, 5) == [5]


def test_band_reaches_a_spike_of_one_step() -> None:
    points = [(step, 2.0) for step in range(10_000)]
    points[6210] = (6210, 8.0)
    drawn = line_chart("loss", "Loss", [Line(name="Loss", bins=thin(points))])
    band = re.search(r'class="band" d="M([^"]*)Z"', drawn)
    assert band is not None
    heights = [float(pair.split()[1]) for pair in band[1].split("L")]
    assert min(heights) == pytest.approx(1000 - 1000 * Scale(2.0, 8.0).place(8.0), abs=0.1)


# The page ------------------------------------------------------------------------------------------------------------


def test_page_has_every_section_and_says_what_was_recorded(page: Page) -> None:
    assert page.open == []
    assert page.texts["h2"] == ["Training", "Parameters", "Time", "Memory", "Checkpoints", "Incidents"]
    assert page.texts["h1"] == ["AdamW: trial"]
    titles = page.texts["h3"]
    for title in ("Loss", "Gradient norm", "Learning rate", "Step time", "Speed", "Update ratio by parameter"):
        assert title in titles
    assert "non-finite gradient" in page.texts["td"]
    assert "checkpoints/step-000000600" in page.texts["td"]
    assert "rank 1" in page.texts["th"]


def test_page_fetches_nothing(folder: Path) -> None:
    text = render(read_run(folder))
    page = Page(text)
    fetched = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "srcset", "action") if key in attrs]
    assert fetched
    assert all(address.startswith("data:") for address in fetched)
    assert "http" not in re.sub(r"data:image[^\"]*", "", text)
    assert "@import" not in text
    assert not re.search(r"url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_page_is_reachable_by_keyboard_and_named(page: Page) -> None:
    figures, sliders = page.all("figure"), page.all("input")
    assert len(figures) == len(sliders) == len(page.all("summary")) > 5
    assert all(s["type"] == "range" and "arrow keys" in s["aria-label"] and s["aria-valuetext"] for s in sliders)
    scrolling = [attrs for tag, attrs in page.elements if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    assert all("alt" in image for image in page.all("img"))
    assert all(attrs.get("aria-hidden") == "true" for attrs in page.all("svg"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {figure["data-id"] for figure in figures} == set(ids)
    assert page.all("html")[0]["lang"] == "en"


def test_page_escapes_what_runs_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, num_steps=20, num_layers=4)
    text = (folder / "rank-0.jsonl").read_text()
    (folder / "rank-0.jsonl").write_text(text.replace("norm.weight", "</script><b>x"))
    page = Page(render(read_run(folder)))
    assert page.all("b") == []
    assert page.open == []


def test_page_of_a_run_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "rank-0.jsonl").write_text('{"kind": "step", "step": 1, "rank": 0, "loss": "nan"}\n')
    page = Page(render(read_run(tmp_path)))
    assert page.texts["h2"] == ["Training"]
    assert "No finite value was recorded." in page.texts["p"]


def test_command_writes_page_or_numbers(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(target)])
    assert (done.exit_code, done.stdout) == (0, f"written: {target}\n")
    assert target.read_text().startswith("<!doctype html>")
    done = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert json.loads(done.stdout)["steps"]["last"] == 600
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == "UsageError"


# A browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    return found


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (apt install npm): it brings axe-core")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "install", "--silent", "--prefix", str(folder), AXE], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"npm could not install {AXE}: {done.stderr.strip()[-200:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


def browse(chromium: str, page: Path, *options: str) -> str:
    """Load a page and return the document as it is then."""
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000"]
    done = subprocess.run(
        [*command, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_AXE = """
<pre id="axe-result"></pre>
<script>
for (const details of document.querySelectorAll("details")) details.open = true;
axe.run(document).then((found) => {
  const told = found.violations.map((v) => [v.id, v.impact, v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200))]);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const text = JSON.stringify({violations: told, passes: found.passes.length, dark: dark});
  document.body.innerHTML = "<pre id='axe-result'></pre>";
  document.getElementById("axe-result").textContent = "begin" + btoa(unescape(encodeURIComponent(text))) + "end";
});
</script></body>"""


def violations(chromium: str, axe: str, text: str, target: Path, dark: bool) -> dict[str, Any]:
    import base64

    target.write_text(text.replace("</body>", f"<script>{axe}</script>{RUN_AXE}"))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = re.search(r"begin([A-Za-z0-9+/=]+)end", browse(chromium, target, scheme))
    assert found is not None
    answer: dict[str, Any] = json.loads(base64.b64decode(found[1]))
    assert answer["dark"] == dark
    assert answer["passes"] > 10
    return answer


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(chromium: str, axe: str, folder: Path, tmp_path: Path, dark: bool) -> None:
    text = render(read_run(folder))
    assert violations(chromium, axe, text, tmp_path / "page.html", dark)["violations"] == []
    broken = text.replace('aria-label="Loss:', 'data-label="Loss:').replace("--soft: #566171", "--soft: #b6bcc4")
    found = {
        identity for identity, *_ in violations(chromium, axe, broken, tmp_path / "broken.html", dark)["violations"]
    }
    assert "label" in found


@pytest.mark.long
def test_long_run_makes_a_page_of_bounded_size(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_steps=10_000, num_layers=200, spike=6210)
    text = render(read_run(tmp_path / "run"))  # its time: benchmarks/report.py
    assert len(text) < 5e6
