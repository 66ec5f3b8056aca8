"""Disks that are full or read-only, and file size limits: the kernel's own errors, at every page that a save writes.

Mounting needs root (skipped elsewhere); the size limit does not. What is asserted holds wherever the error strikes: the
training state is untouched, the checkpoint before is still the newest good one, the next save with room succeeds.
"""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distadam import CheckpointError, checkpoint
from tests.checkpoint_runs import build, digest, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.long

RULE, STORAGE = "adamw", "bf16 fp32 master"
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of half a megabyte."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr}")
    yield place
    subprocess.run(["umount", place], check=True)


def _fill(place: Path, left: int) -> None:
    """Leave so many bytes free."""
    free = os.statvfs(place)
    with (place / "filler").open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_bsize - left))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_at_every_page_of_a_save_leaves_state_and_checkpoint(asynchronous: bool, disk: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, 1)
    path = disk / "run" / "checkpoint"
    checkpoint.save(path, model, optimizer, extra={"step": 1})
    train(model, optimizer, 1, 2)
    state, identity = digest(model, optimizer), checkpoint.describe(path).id
    errors, left, saved = [], 0, False
    while not saved:
        _fill(disk, left)
        try:
            checkpoint.save(path, model, optimizer, extra={"step": 2}, asynchronous=asynchronous).wait()
            saved = True
        except CheckpointError as error:
            errors.append(str(error))
            assert f"saving {path} failed" in errors[-1]
            assert "No space left on device" in errors[-1]
            assert checkpoint.describe(path).id == identity
            assert checkpoint.latest(disk / "run") == str(path)
            assert checkpoint.load(path, *build(RULE, STORAGE))["step"] == 1
        assert digest(model, optimizer) == state
        (disk / "filler").unlink()
        left += PAGE
    assert len(errors) > 10  # the error has struck data, .metadata, manifest and marker
    assert checkpoint.verify(path).step == 2
    assert len(list(path.glob("*.distcp"))) == 1  # nothing is left of the attempts
    assert checkpoint.load(path, *build(RULE, STORAGE))["step"] == 2


def test_full_disk_while_a_checkpoint_is_converted_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, 1)
    checkpoint.save(tmp_path / "a", model, optimizer)
    for target in ("b", "b.pt", "b.safetensors"):
        said: list[str] = []
        while not (disk / target).exists():
            _fill(disk, len(said) * PAGE)
            try:
                checkpoint.convert(tmp_path / "a", disk / target)
            except CheckpointError as error:
                said.append(str(error))
                assert [path.name for path in disk.iterdir()] == ["filler"]
            (disk / "filler").unlink()
        assert len(said) > 1
        assert all(re.search(f"converting .*/{target} failed: .*No space left on device", text) for text in said), said
        subprocess.run(["rm", "-r", disk / target], check=True)


def test_read_only_file_system_is_an_error_and_can_be_loaded_from(disk: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, 1)
    checkpoint.save(disk / "a", model, optimizer)
    state = digest(model, optimizer)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for path in ("a", "b"):
        for asynchronous in (False, True):
            with pytest.raises(CheckpointError, match=rf"saving .*/{path} failed: .*Read-only file system"):
                checkpoint.save(disk / path, model, optimizer, asynchronous=asynchronous).wait()
    assert digest(model, optimizer) == state
    again = build(RULE, STORAGE)
    checkpoint.load(disk / "a", *again)
    assert digest(*again) == state
    with pytest.raises(CheckpointError, match=r"converting .* failed: .*Read-only"):
        checkpoint.convert(disk / "a", disk / "c.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the read-only mount shows it for root")
def test_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    state = digest(model, optimizer)
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match=r"saving .* failed: .*Permission denied"):
        checkpoint.save(tmp_path / "a", model, optimizer)
    assert digest(model, optimizer) == state


def _save_with_a_limit_on_rank_1(rank: int, folder: str, asynchronous: bool) -> list[str]:
    """Return what save said for each limit on the size of rank 1's files."""
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, 1)
    checkpoint.save(f"{folder}/a", model, optimizer)
    state = digest(model, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    for limit in (0, 1, 5000, 20000):
        checkpoints = f"{folder}/limit-{limit}"
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            handle = checkpoint.save(checkpoints, model, optimizer, asynchronous=asynchronous)
            handle.wait()
        except CheckpointError as error:
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert digest(model, optimizer) == state
        assert checkpoint.latest(folder) == f"{folder}/a"
    checkpoint.save(f"{folder}/b", model, optimizer, asynchronous=asynchronous).wait()
    assert checkpoint.latest(folder) == f"{folder}/b"
    return said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_file_that_one_rank_may_not_write_whole_is_every_ranks_error(asynchronous: bool, tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(3, _save_with_a_limit_on_rank_1, str(tmp_path), asynchronous)):
        assert len(said) == 4
        for text in said:
            assert "File too large" in text
            assert "as they were" in text
            assert rank == 1 or text.startswith("rank 1: ")
    checkpoint.verify(tmp_path / "b")
    assert not list(tmp_path.glob("limit-*/*.distcp"))


def _load_without_a_file(rank: int, folder: str, victim: str) -> str:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 5, 6)
    state = digest(model, optimizer)
    message = ""
    try:
        checkpoint.load(folder, model, optimizer)
    except CheckpointError as error:
        message = f"{type(error).__name__}: {error}"
    assert digest(model, optimizer) == state
    train(model, optimizer, 6, 7)
    return message


def _write(rank: int, folder: str) -> None:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, 1)
    checkpoint.save(folder, model, optimizer)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_missing_file_of_any_rank_is_named_on_every_rank(rank: int, tmp_path: Path) -> None:
    run_ranks(3, _write, str(tmp_path))
    (victim,) = tmp_path.glob(f"*-{rank}_0.distcp")
    victim.unlink()
    for message in run_ranks(2, _load_without_a_file, str(tmp_path), victim.name):
        assert "IncompleteCheckpoint" in message
        assert f"file {victim.name} is missing; it holds tensor" in message


def test_nothing_needs_numpy(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch, distadam
from distadam import checkpoint
from tests.checkpoint_runs import build, digest, train
folder = sys.argv[1]
model, optimizer = build("adamw", "split")
train(model, optimizer, 0, 2)
for number, asynchronous in enumerate((False, True)):
    path = f"{folder}/{number}"
    checkpoint.save(path, model, optimizer, extra={"a": 1}, asynchronous=asynchronous).wait()
    assert checkpoint.load(path, *build("adamw", "split"))["a"] == 1
    checkpoint.verify(path)
    checkpoint.reshard(path, f"{path}.3", ranks=3)
    checkpoint.convert(path, f"{path}.safetensors", masters=True)
    checkpoint.convert(path, f"{path}.pt")
    checkpoint.convert(f"{path}.pt", f"{path}.b", weights=f"{path}.safetensors", rule="adamw")
    checkpoint.load(f"{path}.b", *build("adamw", "split"))
"""
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, timeout=120)
    assert done.returncode == 0


def test_scaled_training_goes_on_with_its_scale(tmp_path: Path) -> None:
    def one(scaler: Any, model: Any, optimizer: Any, factor: float) -> None:
        loss = sum((param.float() * factor).sum() for param in model.parameters() if param.requires_grad)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    model, optimizer = build(RULE, "fp32")
    first = scaler()
    one(first, model, optimizer, 0.5)
    one(first, model, optimizer, float("inf"))  # skipped: the scale is halved
    one(first, model, optimizer, 0.25)
    checkpoint.save(tmp_path, model, optimizer, extra={"scaler": first})
    again, second = build(RULE, "fp32"), scaler()
    checkpoint.load(tmp_path, *again, extra={"scaler": second})
    assert second.get_scale() == first.get_scale() == 2.0**9
    for factor in (0.5, 0.125, 1.0, 0.5):  # grows on the way: the count of good steps was saved, too
        one(first, model, optimizer, factor)
        one(second, *again, factor)
        assert second.get_scale() == first.get_scale()
    assert first.get_scale() > 2.0**9
    assert digest(*again) == digest(model, optimizer)
