"""How Sphinx builds the documentation: ``make docs``. Pages are Markdown, the reference comes from docstrings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from distadam import __version__

project = "distadam"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"distadam {__version__}"
html_show_copyright = False
default_role = "py:obj"  # `name` in a docstring is a link where there is such a thing
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False


def mark_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make literal blocks of indented paragraphs, and of tables, as docstrings of this package have them."""
    before = ""
    marked = []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        paragraph = number > 0 and not lines[number - 1].strip() and line.strip()
        deeper = paragraph and indent >= 4 and before and len(before) - len(before.lstrip()) == indent - 4
        if deeper and not before.endswith("::") and not before.lstrip().startswith((":", "..", ">>>")):
            marked += [" " * (indent - 4) + "::", ""]
        table = line.lstrip().startswith("|")
        if table and not before.lstrip().startswith("|"):
            marked += ["", " " * indent + "::", ""]
        marked.append(" " * 4 + line if table else line)
        before = line if line.strip() else before
    lines[:] = marked


def write_command_line(app: Any) -> None:
    """Write cli.md from the commands' own help."""
    target = Path(app.srcdir) / "cli.md"
    command = [sys.executable, "-m", "typer", "distadam.cli", "utils", "docs", "--name", "distadam", "--output"]
    subprocess.run([*command, str(target)], check=True, stdout=subprocess.DEVNULL)
    target.write_text(target.read_text().replace("# `distadam`", "# The command line", 1))


def setup(app: Any) -> None:
    """Connect the two."""
    app.connect("builder-inited", write_command_line)
    app.connect("autodoc-process-docstring", mark_code, priority=900)  # behind napoleon, which is given sections
