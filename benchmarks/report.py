"""Time the report of a made-up run: 10,000 steps, 200 parameters, 2 ranks.

    python -m benchmarks.report [--steps 10000] [--layers 200] [--rounds 5] [--out benchmarks/results]

Medians in seconds: reading and drawing in this process (CPU and wall), the whole command ``distadam report`` (wall,
imports included), and, where Chromium is installed, a browser's start until the page is loaded and laid out.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from distadam.diagnostics.report_data import read_run
from distadam.diagnostics.report_page import render
from tests.report_runs import write_run

# The browser's own clock, from the start of the navigation to the end of the first layout after loading.
CLOCK = """<script>addEventListener("load", () => { document.body.getBoundingClientRect();
document.title = "loaded in " + performance.now().toFixed(0) + " ms"; });</script></body>"""


def wall(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def in_browser(browser: str, page: Path) -> float:
    """Return the seconds that the page takes to load, by the browser's clock."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return float(found.split("<title>loaded in ")[1].split(" ms")[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    seconds: dict[str, list[float]] = {"read": [], "draw": [], "command": [], "browser": []}
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "run", Path(folder) / "page.html"
        write_run(run, num_steps=arguments.steps, num_layers=arguments.layers)
        nbytes = sum(path.stat().st_size for path in run.iterdir())
        command = [sys.executable, "-m", "distadam", "report", str(run), "--out", str(Path(folder) / "out.html")]
        for _ in range(arguments.rounds):
            began = time.monotonic()
            read = read_run(run)
            seconds["read"].append(time.monotonic() - began)
            began = time.monotonic()
            text = render(read)
            seconds["draw"].append(time.monotonic() - began)
            seconds["command"].append(wall(lambda: subprocess.run(command, check=True, capture_output=True)))
            page.write_text(text.replace("</body>", CLOCK), encoding="utf-8")
            if browser is not None:
                seconds["browser"].append(in_browser(browser, page))
    about = f"{arguments.steps:,} steps, {arguments.layers} parameters, 2 ranks ({nbytes / 1e6:.0f} MB), page "
    about += f"{len(text) / 1e6:.1f} MB; {platform.machine()}, Python {platform.python_version()}"
    rows = {
        "read and draw": [sum(pair) for pair in zip(seconds["read"], seconds["draw"], strict=True)],
        "reading alone": seconds["read"],
        "`distadam report`, imports included": seconds["command"],
        "the browser's loading of the page": seconds["browser"],
    }
    lines = [
        f"{about}; {arguments.rounds} rounds.",
        "",
        "| wall time in seconds | min | median | max |",
        "|---|---|---|---|",
    ]
    for name, values in rows.items():
        if values:
            lines.append(f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f} |")
    print("\n".join(lines))
    if arguments.out is not None:
        name = arguments.out / f"report_cpu_{date.today()}"
        name.with_suffix(".md").write_text("\n".join(lines) + "\n")
        result = {"command": " ".join(sys.argv), "about": about, "seconds": seconds}
        name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
