"""Every block of code in the README and docs/ is executed, or checked as far as it can be; links lead somewhere.

Python blocks of a page run in order in one namespace, in a directory of their own; so do blocks that stand in HTML
comments, which readers do not see. ``<!-- compiled only: REASON -->`` before a block that needs a GPU, a cluster or
another library keeps it from running; ``<!-- long -->`` anywhere on a page moves the page to ``make test-long``.
Commands are looked up: the file, target, command, option and environment variable must exist. The tutorial's are
really run (long). Fences say their language, so that no code hides in one that says nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from distadam.cli import app

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs/cli.md"  # by make docs, from the commands' own help
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - {GENERATED})]
NOT_CODE = {"text", "json", "yaml", "{toctree}", "{eval-rst}"}
YOURS = {"script.py", "train.py"}  # the reader's own files
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
COMPILED_ONLY = re.compile(r"<!-- compiled only: \S[^>]* -->\s*$")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Return a page's fenced blocks, in order."""
    text = page.read_text() if text is None else text
    found = []
    for match in FENCE.finditer(text):
        runs = COMPILED_ONLY.search(text[: match.start()]) is None
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[3].strip(), textwrap.dedent(match[4]), runs))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_pages() -> list[object]:
    pages = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
    return [
        pytest.param(page, id=name(page), marks=[pytest.mark.long] if "<!-- long -->" in page.read_text() else [])
        for page in pages
    ]


def run_python(page: Path, found: list[Block]) -> None:
    """Run a page's Python; a traceback shows the page's own lines."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in found:
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.runs:
                exec(code, namespace)


@pytest.mark.parametrize("page", python_pages())
def test_python_of_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(page, blocks(page))


def test_python_that_does_not_run_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    text = "x\n\n```python\na = 1\n```\n\n<!-- hidden\n```python\nb = a\n```\n-->\n\n```python\nassert b == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_python(page, blocks(page, text))
    assert caught.traceback[-1].lineno == 13
    only = "<!-- compiled only: needs a GPU -->\n```python\n{}\n```\n"
    run_python(page, blocks(page, only.format("1 / 0")))
    with pytest.raises(SyntaxError):
        run_python(page, blocks(page, only.format("1 / ")))


def unlabelled(found: list[Block]) -> list[str]:
    known = NOT_CODE | {"python", "bash"}
    return [f"{block}: {block.language or 'no language'}" for block in found if block.language not in known]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_their_language(page):
    assert unlabelled(blocks(page)) == [], "write ```python or ```bash for what can be checked, ```text for output"


# Commands ------------------------------------------------------------------------------------------------------------


def commands(code: str) -> list[str]:
    """Return the single commands of a block: lines joined, cut at && and |, without comments."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    parts = [part for line in lines for part in re.split(r"&&|\|\|?|;", re.sub(r"(^|\s)#.*", "", line))]
    return [part.strip() for part in parts if part.strip()]


def complaint(command: str) -> str | None:
    """Return what is wrong with a command, as far as that can be told without running it."""
    words = shlex.split(command)
    variables = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        variables.append(words.pop(0).partition("=")[0])
    for word in words:
        folder = re.match(r"(launch|docker|examples|benchmarks|docs|tests|tools)/", word)
        if folder and not (ROOT / word).exists():
            return f"there is no {word}"
    if not words:
        return None
    if words[0] == "export":
        return None
    script = next((ROOT / word for word in words if word.startswith("launch/") and (ROOT / word).is_file()), None)
    if script is not None:
        missing = [variable for variable in variables if variable not in script.read_text()]
        return f"{script.name} knows no {missing[0]}" if missing else None
    return ask(words[0], words[1:])


def ask(program: str, words: list[str]) -> str | None:
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [word for word in words if not re.match(r"-|[A-Z_]+=", word) and word not in targets]
        return f"make has no {wrong[0]}" if wrong else None
    if program in ("pip", "pip3"):
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        asked = [extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")]
        wrong = [extra for extra in asked if extra not in extras]
        return f"there is no extra {wrong[0]}" if wrong else None
    if program in ("python", "python3"):
        if words[:1] == ["-m"]:
            module = {"torch.distributed.run": "torchrun"}.get(words[1], words[1])
            return ask(module, words[2:])
        return script_complaint(words)
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        return torchrun_complaint(get_args_parser(), words)
    if program == "distadam":
        return command_line_complaint(typer.main.get_command(app), words)
    if program in ("mpirun", "mpiexec", "srun", "sbatch"):
        start = next((at for at, word in enumerate(words) if word.endswith(".py") or word.startswith("python")), None)
        return f"{program} starts nothing" if start is None else None
    if program in ("cd", "curl", "docker", "kubectl", "scontrol", "squeue", "kill", "nproc", "ls", "git", "apt-get"):
        return None
    return f"tests/test_docs.py does not know {program!r}; teach it, or write ```text"


def script_complaint(words: list[str]) -> str | None:
    """Look for the script, and for its options in its source."""
    if not words or not words[0].endswith(".py"):
        return "python starts no file"
    if words[0] in YOURS:
        return None
    path = ROOT / words[0]
    if not path.is_file():
        return f"there is no {words[0]}"
    wrong = [
        word for word in words[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in path.read_text()
    ]
    return f"{words[0]} knows no {wrong[0]}" if wrong else None


def torchrun_complaint(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    known = parser._option_string_actions
    at = 0
    while at < len(words) and words[at].startswith("-"):
        option, _, value = words[at].partition("=")
        if option not in known:
            return f"torchrun knows no {option}"
        if option in ("-m", "--module"):
            return ask(words[at + 1], words[at + 2 :])
        at += 1 if value or known[option].nargs == 0 else 2
    return script_complaint(words[at:])


def command_line_complaint(command: Any, words: list[str]) -> str | None:
    """Follow a command line through the commands that there are."""
    options = {text: option for option in command.params for text in [*option.opts, *option.secondary_opts]}
    at = 0
    while at < len(words):
        word = words[at].partition("=")[0]
        if word.startswith("-"):
            option = options.get(word)
            if option is None and word != "--help":
                return f"{command.name} knows no {word}"
            takes_one = option is not None and not getattr(option, "is_flag", False) and "=" not in words[at]
            if word in ("--module", "-m"):
                return ask(words[at + 1], words[at + 2 :])
            at += 2 if takes_one else 1
            continue
        if hasattr(command, "commands"):
            found = command.commands.get(word)
            return (
                f"{command.name} has no command {word}"
                if found is None
                else command_line_complaint(found, words[at + 1 :])
            )
        if command.name == "launch":
            return script_complaint(words[at:])
        at += 1
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_page_exist(page):
    found = [block for block in blocks(page) if block.language == "bash"]
    wrong = [f"{block}: {command}: {complaint(command)}" for block in found for command in commands(block.code)]
    assert [text for text in wrong if not text.endswith(": None")] == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make tset", "make has no tset"),
        ("make test && make demo NPROC=3", None),
        ("python examples/train_gtp.py", "there is no examples/train_gtp.py"),
        ("python examples/train_gpt.py --stepz 3", "examples/train_gpt.py knows no --stepz"),
        ("distadam lunch --nproc 2 script.py", "distadam has no command lunch"),
        ("distadam launch --nprocs 2 script.py", "launch knows no --nprocs"),
        ("distadam launch --nproc 2 other.py", "there is no other.py"),
        ("distadam launch --nproc 2 examples/train_gpt.py --steps 3", None),
        ("distadam launch --nproc 2 examples/train_gpt.py --stepz 3", "examples/train_gpt.py knows no --stepz"),
        ("distadam checkpoint verfy x", "checkpoint has no command verfy"),
        ("distadam checkpoint verify x --jsn", "verify knows no --jsn"),
        ("torchrun --nproc-per-nodes 2 script.py", "torchrun knows no --nproc-per-nodes"),
        ("torchrun --standalone --nproc-per-node 2 train.py", None),
        ("torchrun --nnodes 2 -m distadam doctr", "distadam has no command doctr"),
        ("NPROC=2 launch/torchrun.sh train.py", None),
        ("NPROCS=2 launch/torchrun.sh train.py", "torchrun.sh knows no NPROCS"),
        ("pip install 'distadam[prometheus]'", None),
        ("pip install 'distadam[promethus]'", "there is no extra promethus"),
        ("frobnicate", "tests/test_docs.py does not know 'frobnicate'; teach it, or write ```text"),
    ],
)
def test_commands_that_do_not_exist_are_noticed(command, expected):
    assert [complaint(part) for part in commands(command)][-1] == expected


@pytest.mark.long
@pytest.mark.timeout(600)
def test_tutorial_runs_as_it_says(tmp_path):
    page = ROOT / "docs/tutorial.md"
    found = blocks(page)
    python = [block for block in found if block.language == "python"]
    (tmp_path / "train.py").write_text("\n".join(block.code for block in python))  # as it is at the page's end
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(variable, None)
    for block in found:
        if block.language == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code], env=env, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/tutorial/report.html").exists()


# Links ---------------------------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
QUOTED_FILE = re.compile(r"`((?:docs|launch|examples|benchmarks|tests|tools|distadam|docker)/[\w./-]+\.\w+)`")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return links to files and headings that are not there, and file names in the text that are none."""
    text = FENCE.sub("", text)
    broken = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page if not path else page.parent / path
        if file != GENERATED and (not file.exists() or (anchor and anchor not in anchors(file))):
            broken.append(target)
    return broken + [path for path in QUOTED_FILE.findall(text) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "launch/README.md"], ids=name)
def test_links_of_page_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_broken_links_are_noticed():
    text = "[a](nowhere.md) [b](design.md#words) [c](design.md#wurds) `docs/none.md` `docs/log.md` [d](https://a.b)"
    assert broken_links(ROOT / "docs/index.md", text) == ["nowhere.md", "design.md#wurds", "docs/none.md"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="make docs installs it")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dirhtml", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clip_grad_norm_" in (tmp_path / "reference/index.html").read_text()
