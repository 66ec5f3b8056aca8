"""Checkpoints to and from torch.optim's files and safetensors, other numbers of files, and the command line over them.

Everything is compared bit by bit. The golden files of format version 1 are loaded as they were committed.
"""

import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typer.testing import CliRunner

import distadam
from distadam import CheckpointError, ConfigError, MissingDependency, checkpoint
from distadam.checkpoint import safetensors
from distadam.checkpoint import store as stores
from distadam.checkpoint.manifest import read_manifest
from distadam.cli import app
from tests.checkpoint_runs import build, digest, train, write
from tests.ranks import run_ranks

pytestmark = pytest.mark.long

GOLDEN = Path(__file__).parent / "golden"
RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, distadam.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "sgd": (torch.optim.SGD, distadam.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, distadam.RMSprop, {"lr": 1e-2, "centered": True}),
}


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return bool(first == second)


def _through(rank: int, rule: str, source: str, target: str) -> None:
    _, make, options = RULES[rule]
    model = _model()
    optimizer = make(model.named_parameters(), **options)
    checkpoint.load(source, model, optimizer)
    checkpoint.save(target, model, optimizer)


@pytest.mark.parametrize("rule", RULES)
def test_torch_optim_to_distadam_and_back_is_bit_equal_and_torch_goes_on(rule: str, tmp_path: Path) -> None:
    make, _, options = RULES[rule]
    model = _model()
    optimizer = make(model.named_parameters(), **options)
    for seed in range(3):
        _step(model, optimizer, seed)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpoint.convert(tmp_path / "optimizer.pt", tmp_path / "a", weights=tmp_path / "model.pt", rule=rule, ranks=3)
    assert checkpoint.verify(tmp_path / "a").step in (3, 1)  # torch's SGD counts no steps
    assert len(checkpoint.describe(tmp_path / "a").files) == 3
    run_ranks(2, _through, rule, str(tmp_path / "a"), str(tmp_path / "b"))
    checkpoint.convert(tmp_path / "b", tmp_path / "back.pt")
    checkpoint.convert(tmp_path / "b", tmp_path / "back.safetensors")
    weights = safetensors.read(str(tmp_path / "back.safetensors"))
    assert _equal(dict(model.state_dict()), weights)
    state = torch.load(tmp_path / "back.pt")
    assert _equal(state["state"], optimizer.state_dict()["state"])
    again = _model()
    again.load_state_dict(weights)
    goes_on = make(again.named_parameters(), **options)
    goes_on.load_state_dict(state)
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        _step(again, goes_on, seed)
    assert _equal(dict(model.state_dict()), dict(again.state_dict()))


def test_safetensors_own_library_reads_what_is_written(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    write(0, str(tmp_path / "a"), "adamw", "split", 0, 2, False)
    model, optimizer = build("adamw", "split")
    checkpoint.load(tmp_path / "a", model, optimizer)
    checkpoint.convert(tmp_path / "a", tmp_path / "model.safetensors")
    assert _equal(dict(model.state_dict()), library.load_file(tmp_path / "model.safetensors"))
    library.save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "own.safetensors"
    )
    assert _equal(dict(model.state_dict()), safetensors.read(str(tmp_path / "own.safetensors")))


def test_masters_leave_and_come_back_whole(tmp_path: Path) -> None:
    write(0, str(tmp_path / "a"), "adamw", "split", 0, 3, False)
    checkpoint.convert(tmp_path / "a", tmp_path / "masters.safetensors", masters=True)
    checkpoint.convert(tmp_path / "a", tmp_path / "state.pt")
    checkpoint.convert(tmp_path / "state.pt", tmp_path / "b", weights=tmp_path / "masters.safetensors", rule="adamw")
    digests = []
    for path in ("a", "b"):
        model, optimizer = build("adamw", "split")
        checkpoint.load(tmp_path / path, model, optimizer)
        digests.append(digest(model, optimizer))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("storage", ["split 8bit", "fp64"])
def test_reshard_keeps_every_bit(storage: str, tmp_path: Path) -> None:
    run_ranks(3, write, str(tmp_path / "a"), "adamw", storage, 0, 2, False)
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", ranks=5)
    assert len(checkpoint.describe(tmp_path / "b").files) == 5
    checkpoint.verify(tmp_path / "b")
    digests = []
    for path in ("a", "b"):
        model, optimizer = build("adamw", storage)
        assert checkpoint.load(tmp_path / path, model, optimizer) == {"rank": 0}
        digests.append(digest(model, optimizer))
    assert digests[0] == digests[1]


def test_reshard_renames(tmp_path: Path) -> None:
    model = _model()
    optimizer = distadam.AdamW(model.named_parameters())
    _step(model, optimizer, 0)
    checkpoint.save(tmp_path / "a", model, optimizer)
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", ranks=2, rename=lambda name: f"net.{name}")
    renamed = nn.ModuleDict({"net": _model()})
    fresh = distadam.AdamW(renamed.named_parameters())
    checkpoint.load(tmp_path / "b", renamed, fresh)
    assert _equal(optimizer.full_state_dict()["state"], fresh.full_state_dict()["state"])


def test_conversions_that_cannot_be_leave_nothing_behind(tmp_path: Path) -> None:
    write(0, str(tmp_path / "a"), "adamw", "fp32", 0, 2, False)
    with pytest.raises(ConfigError, match="expected weights= and rule="):
        checkpoint.convert(tmp_path / "a.pt", tmp_path / "b")
    with pytest.raises(ConfigError, match="expected a place without a checkpoint"):
        checkpoint.reshard(tmp_path / "a", tmp_path / "a", ranks=2)
    victim = next((tmp_path / "a").glob("*.distcp"))
    items = read_manifest(stores.Store(tmp_path / "a")).files[victim.name]
    data = bytearray(victim.read_bytes())
    for key in ("model.embedding", "optim.state.embedding.exp_avg"):
        item = next(item for item in items if item.key == key)
        data[item.offset + item.nbytes // 2] ^= 1
    victim.write_bytes(data)
    for target in ("b", "b.pt", "b.safetensors"):
        with pytest.raises(CheckpointError, match=victim.name):
            checkpoint.convert(tmp_path / "a", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_torchs_own_tool_reads_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, write, str(tmp_path / "a"), "adamw", "fp32", 0, 2, False)
    dcp_to_torch_save(tmp_path / "a", tmp_path / "dcp.pt")
    values = torch.load(tmp_path / "dcp.pt", weights_only=False)
    model, optimizer = build("adamw", "fp32")
    checkpoint.load(tmp_path / "a", model, optimizer)
    assert torch.equal(values["model.embedding"].view(37, 19), model.embedding)


def test_remote_storage_through_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    write(0, "memory://run/step-1", "adamw", "fp32", 0, 2, True)
    write(0, "memory://run/step-2", "adamw", "fp32", 0, 2, False)
    assert checkpoint.latest("memory://run") is not None
    assert checkpoint.verify("memory://run/step-1").step == 2
    model, optimizer = build("adamw", "fp32")
    checkpoint.load("memory://run/step-2", model, optimizer)
    model2, optimizer2 = build("adamw", "fp32")
    train(model2, optimizer2, 0, 2)
    assert digest(model, optimizer) == digest(model2, optimizer2)
    assert len(checkpoint.prune("memory://run", 1)) == 1
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint._fsspec_filesystem", None)
    with pytest.raises(MissingDependency, match=r"pip install 'distadam\[checkpoint\]'"):
        stores.Store("memory://run")


def _golden(name: str) -> tuple[Any, Any]:
    rule, storage = json.loads((GOLDEN / "cases.json").read_text())[name]["case"]
    return build(rule, storage)


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "cases.json").read_text())))
def test_golden_checkpoints_of_every_format_version_load(name: str) -> None:
    expected = json.loads((GOLDEN / "cases.json").read_text())[name]["digest"]
    checkpoint.verify(GOLDEN / name)
    model, optimizer = _golden(name)
    assert checkpoint.load(GOLDEN / name, model, optimizer) == {"rank": 0}
    assert digest(model, optimizer) == expected


def _run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["checkpoint", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_long_commands_show_a_bar_of_bytes_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    optimizer = distadam.AdamW(model.named_parameters())
    _step(model, optimizer, 0)
    path = checkpoint.save(tmp_path / "a", model, optimizer).path
    commands = {
        "verify": [path],
        "reshard": [path, str(tmp_path / "b"), "--ranks", "2"],
        "convert": [path, str(tmp_path / "o.pt")],
    }
    for is_terminal in (True, False):
        for command, arguments in commands.items():
            screen = io.StringIO()
            console = Console(file=screen, force_terminal=is_terminal, width=100)
            monkeypatch.setattr(
                importlib.import_module("distadam.cli.checkpoint"), "Console", lambda *_, console=console, **__: console
            )
            for target in (tmp_path / "b", tmp_path / "o.pt"):
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
            printed = json.loads(_run(command, *arguments, "--json"))  # stdout stays one object
            assert printed.get("good") or printed["written"] == arguments[1]
            total = checkpoint.describe(path).nbytes / 1e6
            done = re.findall(rf"{command} .*?([\d.]+)/([\d.]+) MB", screen.getvalue())
            assert bool(done) is is_terminal
            if is_terminal:
                reached, of = map(float, done[-1])
                assert of == pytest.approx(total, abs=0.1)
                share = 2 / 3 if command == "convert" else 1  # torch.optim's state dict has no weights
                assert reached == pytest.approx(share * of, rel=0.1)


def test_every_command_says_errors_as_json_and_as_a_line(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for command in (
        ["describe", nowhere],
        ["reshard", nowhere, str(tmp_path / "b"), "--ranks", "2"],
        ["convert", nowhere, str(tmp_path / "b.pt")],
        ["convert", str(tmp_path / "none.pt"), str(tmp_path / "c")],
    ):
        said = json.loads(_run(*command, "--json", code=1))
        assert said["error"] in ("IncompleteCheckpoint", "ConfigError")
        assert f"{said['error']}: {said['message']}" in _run(*command, code=1)
    said = json.loads(_run("verify", nowhere, "--json", code=1))
    assert not said["good"]
    assert said["problems"][0]["error"] == "IncompleteCheckpoint"
    assert json.loads(_run("prune", nowhere, "--keep-last", "1", "--json")) == {"deleted": []}
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(0, str(tmp_path / "run" / f"step-{step}"), "adamw", "split", 0, step, False)
    path = str(tmp_path / "run" / "step-3")
    assert "embedding" in _run("describe", path)
    assert json.loads(_run("describe", path, "--json"))["step"] == 3
    assert json.loads(_run("verify", path, "--json")) == {"path": path, "good": True, "problems": []}
    assert json.loads(_run("reshard", path, str(tmp_path / "b"), "--ranks", "3", "--json"))["written"].endswith("/b")
    target = str(tmp_path / "o.pt")
    assert json.loads(_run("convert", path, target, "--json")) == {"written": target}
    assert sorted(torch.load(target)) == ["param_groups", "state"]
    (tmp_path / "names.json").write_text(json.dumps({"embedding": "words"}))
    _run("convert", path, str(tmp_path / "d"), "--ranks", "2", "--rename", str(tmp_path / "names.json"))
    assert "words" in _run("describe", str(tmp_path / "d"))
    _run("convert", path, str(tmp_path / "w.safetensors"), "--masters")
    _run("convert", f"{tmp_path}/o.pt", f"{tmp_path}/c", "--weights", f"{tmp_path}/w.safetensors", "--rule", "adamw")
    gone = json.loads(_run("prune", str(tmp_path / "run"), "--keep-last", "1", "--json"))["deleted"]
    assert [Path(old).name for old in gone] == ["step-2", "step-1"]
    victim = next(Path(path).glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-3])
    assert f"CorruptShard: {path}/{victim.name}" in _run("verify", path, code=1)
    assert "IncompleteCheckpoint" in _run("describe", str(tmp_path / "nowhere"), code=1)
