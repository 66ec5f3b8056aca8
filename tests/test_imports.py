"""Imports go one way, communication and printing have one place each, and importing distadam does nothing else.

The rules are the architecture's; they are checked on the syntax tree, imports inside functions included. Each rule is
also given a snippet that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import distadam

PACKAGE = Path(distadam.__file__).parent

# {errors, native} < policies < {layout, comm, rules, precision: never each other} < kernels < engine
# < {api -> optimizer; checkpoint} < {diagnostics, doctor} < cli
BASE = {"errors", "native", "policies"}
MIDDLE = {"layout", "comm", "rules", "precision"}
CORE = BASE | MIDDLE | {"kernels", "engine"}
MAY_IMPORT = {
    "errors": set(),
    "native": set(),
    "policies": {"errors"},
    **dict.fromkeys(MIDDLE, BASE),
    "layout": {"errors"},  # policies know torch's dtypes
    "kernels": BASE | MIDDLE,
    "engine": BASE | MIDDLE | {"kernels"},
    "optimizer": CORE,
    "api": CORE | {"optimizer"},
    "checkpoint": CORE,
    "diagnostics": CORE | {"optimizer", "api", "checkpoint", "distadam"},
    "doctor": CORE | {"distadam"},
    "cli": CORE | {"optimizer", "api", "checkpoint", "diagnostics", "doctor", "distadam"},
    "__main__": {"cli"},
    "distadam": CORE | {"optimizer", "api", "checkpoint", "diagnostics"},
}
WITHOUT_TORCH = {"errors", "layout"}
CHECKPOINTS = "torch.distributed.checkpoint"  # planners and storages; what ranks tell each other goes through comm
DRAWS_WITH = {"diagnostics": ("rich",)}  # when asked to; optional packages are looked up by name
LAUNCHER = ("torch.distributed.launcher", "torch.distributed.elastic")  # starts processes, communicates nothing


def modules() -> dict[str, str]:
    """Source of every module by its dotted name."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def unit(module: str) -> str:
    """The part of the architecture that a module belongs to: distadam.comm.groups -> comm."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "distadam"


def imported(tree: ast.AST, *, typing_too: bool = True) -> Iterator[str]:
    """Yield the dotted names that a module imports, whether they are modules or things in them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not typing_too:
            for other in node.orelse:
                yield from imported(other, typing_too=typing_too)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node, typing_too=typing_too)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """Every rule that a module breaks, in words."""
    tree, mine = ast.parse(source), unit(module)
    if mine not in MAY_IMPORT:
        return [f"{mine} has no place in the order"]
    found = []
    for name in imported(tree):
        if name.split(".")[0] == "distadam":
            target = name if name in known else name.rpartition(".")[0]
            other = unit(target)
            if other != mine and other not in MAY_IMPORT[mine]:
                found.append(f"{mine} imports {other}")
    runtime = set(imported(tree, typing_too=False)) | {
        dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    for name in sorted(runtime):
        root = name.split(".")[0]
        parallel = name.startswith(("torch.distributed", "torch.nn.parallel")) or root == "mpi4py"
        allowed = {"cli": LAUNCHER, "checkpoint": (CHECKPOINTS,)}.get(mine, ())
        if parallel and mine != "comm" and not name.startswith(allowed):
            found.append(f"{mine} imports {name}")
        elif root == "torch" and mine in WITHOUT_TORCH:
            found.append(f"{mine} imports torch")
    for name in set(imported(tree)):
        root = name.split(".")[0]
        third_party = root not in sys.stdlib_module_names and root not in ("distadam", "torch", "mpi4py", "triton")
        if third_party and mine != "cli" and root not in DRAWS_WITH.get(mine, ()):
            found.append(f"{mine} imports {root}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and mine != "cli" and dotted(node.func) in ("print", "sys.stdout.write"):
            found.append(f"{mine} prints in line {node.lineno}")
    return found


SOURCES = modules()


@pytest.mark.parametrize("module", SOURCES)
def test_module_imports_only_what_lies_below_it_and_prints_nothing(module: str) -> None:
    assert violations(module, SOURCES[module], set(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("distadam.layout.x", "import torch", "layout imports torch"),
        ("distadam.layout.x", "from torch import Tensor", "layout imports torch"),
        ("distadam.comm.x", "from distadam.layout import Layout", "comm imports layout"),
        ("distadam.rules.x", "def f():\n    from distadam.precision.weights import Weights", "rules imports precision"),
        ("distadam.kernels.x", "from distadam.engine import ledger", "kernels imports engine"),
        ("distadam.engine.x", "import distadam.optimizer", "engine imports optimizer"),
        ("distadam.engine.x", "from distadam import AdamW", "engine imports distadam"),
        ("distadam.optimizer", "from distadam.api import Adam", "optimizer imports api"),
        ("distadam.engine.x", "import torch.distributed as dist", "engine imports torch.distributed"),
        ("distadam.engine.x", "from torch import distributed", "engine imports torch.distributed"),
        ("distadam.engine.x", "import torch\ntorch.distributed.barrier()", "engine imports torch.distributed.barrier"),
        ("distadam.engine.x", "from mpi4py import MPI", "engine imports mpi4py.MPI"),
        ("distadam.engine.x", "from torch.nn.parallel import DistributedDataParallel as D", "engine imports torch.nn"),
        ("distadam.cli.x", "import torch.distributed as dist", "cli imports torch.distributed"),
        ("distadam.engine.x", "import numpy", "engine imports numpy"),
        ("distadam.engine.x", "import rich.table", "engine imports rich"),
        ("distadam.engine.x", "print(1)", "engine prints in line 1"),
        ("distadam.new.x", "", "new has no place in the order"),
    ],
)
def test_rules_notice_what_breaks_them(module: str, source: str, expected: str) -> None:
    assert any(text.startswith(expected) for text in violations(module, source, set(SOURCES)))


def test_rules_allow_types_of_what_may_not_be_imported() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch.distributed import ProcessGroup"
    assert violations("distadam.policies", source, set(SOURCES)) == []
    assert violations("distadam.cli.x", "from torch.distributed.launcher.api import elastic_launch", set(SOURCES)) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, source in SOURCES.items():
        names = {name if name in SOURCES else name.rpartition(".")[0] for name in imported(ast.parse(source))}
        graph[module] = {name for name in names if name in SOURCES} - {module}
    graph.pop("distadam")
    for package in [module for module in graph if any(other.startswith(f"{module}.") for other in graph)]:
        for module in graph:  # inside a package its __init__ is not what is imported
            if module.startswith(f"{package}."):
                graph[module].discard(package)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_surface_is_what_all_says() -> None:
    public = {
        name
        for name, value in vars(distadam).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(distadam.__all__)
    assert all(getattr(distadam, name).__doc__ for name in distadam.__all__)


IMPORT = """
import json, logging, os, signal, sys, threading, warnings
import torch, torch.distributed as dist, torch.optim
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _foreach_utils

def world():
    return {
        "group": dist.is_initialized(),
        "root handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "root level": logging.getLogger().level,
        "own loggers": sorted(name for name, logger in logging.Logger.manager.loggerDict.items()
                              if name.split(".")[0] == "distadam" and getattr(logger, "handlers", [])),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "torch dtype": str(torch.get_default_dtype()),
        "torch seed": torch.initial_seed(),
        "random state": torch.get_rng_state().sum().item(),
        "environment": dict(os.environ),
        "warnings": [repr(entry) for entry in warnings.filters],
        "signals": {number: repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)},
        "foreach types": [repr(kind) for kind in _foreach_utils._foreach_supported_types],
        "optimizers": sorted(torch.optim.__dict__),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
        "cuda": torch.cuda.is_initialized(),
    }

before = world()
import distadam
print(json.dumps([before, world(), "typer" in sys.modules or "rich" in sys.modules]))
"""


def test_importing_distadam_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    before, after, command_line = json.loads(done.stdout)
    assert after == before
    assert not command_line
