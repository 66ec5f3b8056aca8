"""A checkpoint that was interrupted, cut or flipped: never loaded, always named, the one before it always loadable.

Kills are SIGKILLs of real processes at random moments of saving; the seed is fixed, the moments are not. What is
asserted holds for every moment. ``-m slow`` does it 50 times.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distadam
from distadam import CheckpointError, CorruptShard, IncompleteCheckpoint, checkpoint
from distadam.checkpoint import files, job, manifest
from tests.checkpoint_runs import build, digest, train, write
from tests.ranks import Pool, RanksFailed, run_ranks

pytestmark = pytest.mark.long

RULE, STORAGE = "adamw", "bf16 fp32 master"


def _save_for_ever(rank: int, folder: str, asynchronous: bool, slow: float) -> None:
    """Save after every step until somebody kills this; writing takes a while so that kills hit it."""
    files.CHUNK_NBYTES = 512
    write_item = files._ItemStream.write

    def slowly(self: Any, data: Any) -> int:
        time.sleep(slow)
        return write_item(self, data)

    files._ItemStream.write = slowly  # type: ignore[method-assign]
    model, optimizer = build(RULE, STORAGE)
    for step in range(1, 1000):
        train(model, optimizer, step - 1, step)
        checkpoint.save(
            f"{folder}/step-{step:04d}",
            model,
            optimizer,
            extra={"step": step},
            asynchronous=asynchronous,
            keep_last=2,
        )


def _resumed(rank: int, path: str, num_steps: int) -> tuple[int, str]:
    model, optimizer = build(RULE, STORAGE, 1)
    step = checkpoint.load(path, model, optimizer)["step"]
    train(model, optimizer, step, step + num_steps)
    return step, digest(model, optimizer)


def _whole(rank: int, last: int) -> str:
    model, optimizer = build(RULE, STORAGE)
    train(model, optimizer, 0, last)
    return digest(model, optimizer)


def _kill(folder: Path, asynchronous: bool, rng: random.Random) -> None:
    """Train and save on 4 ranks; kill all of them, or one first, at a random moment after the first checkpoint."""
    pool = Pool(4)
    try:
        for pipe in pool._pipes:
            pipe.send((_save_for_ever, (str(folder), asynchronous, 2e-5)))
        deadline = time.monotonic() + 60
        while checkpoint.latest(folder) is None:
            assert time.monotonic() < deadline, "no checkpoint within a minute"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        order = rng.sample(range(4), 4)
        for rank in order:
            os.kill(pool.processes[rank].pid, signal.SIGKILL)
            time.sleep(rng.choice((0, 0, 0.01)))
    finally:
        pool.close()


def _kill_and_resume(folder: Path, asynchronous: bool, rng: random.Random) -> bool:
    """Return whether a save was cut short."""
    _kill(folder, asynchronous, rng)
    newest = checkpoint.latest(folder)
    assert newest is not None
    for path in folder.iterdir():
        if (path / "commit.json").exists():
            checkpoint.verify(path)
    ((step, ours),) = set(run_ranks(2, _resumed, newest, 20))
    assert ours == _whole(0, step + 20)
    return any(any(path.iterdir()) and not (path / "commit.json").exists() for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_save_leaves_the_newest_committed_one_loadable(asynchronous: bool, tmp_path: Path) -> None:
    for attempt in range(2):
        _kill_and_resume(tmp_path / str(attempt), asynchronous, random.Random(attempt + 10 * asynchronous))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_killed_saves(tmp_path: Path) -> None:
    cut_short = {False: 0, True: 0}
    for attempt in range(50):
        asynchronous = attempt % 2 == 1
        cut_short[asynchronous] += _kill_and_resume(
            tmp_path / str(attempt), asynchronous, random.Random(1000 + attempt)
        )
    print(f"cut short: {cut_short[False]} of 25 saves, {cut_short[True]} of 25 asynchronous ones")
    assert min(cut_short.values()) >= 5  # the kills did hit saves


def test_save_over_a_checkpoint_that_fails_at_any_write_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(RULE, STORAGE)
    checkpoint.save(tmp_path, model, optimizer, extra={"step": 0})
    before = checkpoint.describe(tmp_path).id
    train(model, optimizer, 0, 1)
    state = digest(model, optimizer)
    for name in ("write", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(job.Job, name, _no_space)
            with pytest.raises(CheckpointError, match=r"saving .* failed: .*No space left.*as they were"):
                checkpoint.save(tmp_path, model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Store, "write", _no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoint.save(tmp_path, model, optimizer)
    assert digest(model, optimizer) == state
    assert checkpoint.describe(tmp_path).id == before
    assert checkpoint.load(tmp_path, *build(RULE, STORAGE))["step"] == 0
    checkpoint.save(tmp_path, model, optimizer, extra={"step": 1})
    checkpoint.verify(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == 1  # what was replaced, or failed, is gone
    assert checkpoint.load(tmp_path, *build(RULE, STORAGE))["step"] == 1


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crash") / "checkpoint"
    run_ranks(2, write, str(path), RULE, STORAGE, 0, 2, False)
    return path


def test_flipped_or_cut_byte_of_any_file_is_named(written: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    names = sorted(path.name for path in written.iterdir())
    assert len(names) == 5
    for name in names:
        size = (written / name).stat().st_size
        positions = {0, size - 1, *(rng.randrange(size) for _ in range(25))}
        for position in positions:
            for cut in (False, True):
                copy = tmp_path / "copy"
                shutil.copytree(written, copy, dirs_exist_ok=True)
                data = bytearray((written / name).read_bytes())
                data[position] ^= 1 << rng.randrange(8)
                (copy / name).write_bytes(data[:position] if cut else data)
                found = list(checkpoint.problems(copy))
                assert found, f"{name} at {position}, cut {cut}: not noticed"
                assert all(name in str(error) for error in found)
                if name.endswith(".distcp"):
                    assert all("tensor '" in str(error) for error in found)
                if name != ".metadata":  # which is for other tools
                    model, optimizer = build(RULE, STORAGE)
                    before = digest(model, optimizer)
                    unread = "tensor 'extra.1'" in str(found[0]) and not cut  # a single rank takes rank 0's
                    if unread or (name.endswith(".distcp") and rng.random() < 0.8):
                        continue  # loading is slower than looking
                    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                        checkpoint.load(copy, model, optimizer)
                    assert digest(model, optimizer) == before


def test_checksums_cover_every_byte_of_every_file(written: Path, tmp_path: Path) -> None:
    table = manifest.read_manifest(manifest.Store(written))
    for name, items in table.files.items():
        ends = [0, *(item.offset + item.nbytes for item in items)]
        assert [item.offset for item in items] == ends[:-1]  # from the first byte on, without gaps
        assert ends[-1] == (written / name).stat().st_size  # to the last
    covered = {*table.files, "commit.json", f"{table.id}.manifest.json", ".metadata"}
    assert covered == {path.name for path in written.iterdir()}
    marker = (written / "commit.json").read_bytes()
    for position in range(len(marker)):  # the one file whose checksum is its own
        for bit in range(8):
            data = bytearray(marker)
            data[position] ^= 1 << bit
            (tmp_path / "commit.json").write_bytes(data)
            with pytest.raises(CorruptShard, match=r"commit\.json"):
                manifest.read_commit(manifest.Store(tmp_path))
        (tmp_path / "commit.json").write_bytes(marker[:position])
        with pytest.raises(CorruptShard, match=r"commit\.json"):
            manifest.read_commit(manifest.Store(tmp_path))


def test_flipped_byte_of_any_stored_tensor_names_it(written: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    table = manifest.read_manifest(manifest.Store(written))
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    for name, items in table.files.items():
        whole = (written / name).read_bytes()
        for item in items:
            data = bytearray(whole)
            data[item.offset + rng.randrange(item.nbytes)] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(data)
            (found,) = checkpoint.problems(tmp_path)
            assert f"{name}: tensor '{item.key}'" in str(found)
        (tmp_path / name).write_bytes(whole)


def _load_damaged(rank: int, path: str) -> None:
    model, optimizer = build(RULE, STORAGE)
    before = digest(model, optimizer)
    errors: list[str] = []
    try:
        checkpoint.load(path, model, optimizer)
    except CorruptShard as error:
        errors.append(str(error))
    assert len(errors) == 1, "expected CorruptShard on every rank"
    assert digest(model, optimizer) == before
    train(model, optimizer, 0, 1)  # nobody hangs, nothing is stuck


def test_every_rank_raises_what_one_rank_finds(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    table = manifest.read_manifest(manifest.Store(tmp_path))
    name, item = next((n, i) for n, items in table.files.items() for i in items if i.key.endswith("layers.2"))
    data = bytearray((tmp_path / name).read_bytes())
    data[item.offset + item.nbytes // 2] ^= 4
    (tmp_path / name).write_bytes(data)
    run_ranks(3, _load_damaged, str(tmp_path))  # 7 elements: one rank alone reads them


def test_missing_file_marker_and_directory_are_named(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    victim = next(tmp_path.glob("*-1_0.distcp"))
    victim.unlink()
    with pytest.raises(IncompleteCheckpoint, match=f"file {victim.name} is missing; it holds tensor"):
        checkpoint.load(tmp_path, *build(RULE, STORAGE))
    (tmp_path / "commit.json").unlink()
    with pytest.raises(IncompleteCheckpoint, match="a save was interrupted here"):
        checkpoint.load(tmp_path, *build(RULE, STORAGE))
    with pytest.raises(IncompleteCheckpoint, match="empty or does not exist"):
        checkpoint.load(tmp_path / "nowhere", *build(RULE, STORAGE))


def _commit_where_the_first_rank_cannot(rank: int, folder: str, asynchronous: bool) -> list[str]:
    """Return what was said at each moment of committing that fails."""
    model, optimizer = build(RULE, STORAGE)
    checkpoint.save(f"{folder}/good", model, optimizer)
    said = []
    for number, name in enumerate((".metadata", "manifest.json", "commit.json")):
        original = manifest.Store.write

        def fails(self: Any, file: str, data: bytes, name: str = name, original: Any = original) -> None:
            _no_space() if file.endswith(name) else original(self, file, data)

        manifest.Store.write = fails  # type: ignore[method-assign]
        try:
            checkpoint.save(f"{folder}/bad-{number}", model, optimizer, asynchronous=asynchronous).wait()
        except CheckpointError as error:
            said.append(str(error))
        finally:
            manifest.Store.write = original  # type: ignore[method-assign]
    checkpoint.save(f"{folder}/again", model, optimizer).wait()
    return said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_save_that_cannot_be_committed_is_an_error_everywhere_and_leaves_no_data(
    asynchronous: bool, tmp_path: Path
) -> None:
    for said in run_ranks(2, _commit_where_the_first_rank_cannot, str(tmp_path), asynchronous):
        assert ["No space left on device" in text for text in said] == [True] * 3
    assert not [path for path in tmp_path.glob("bad-*/*") if path.name != ".metadata"]
    assert checkpoint.latest(tmp_path) == str(tmp_path / "again")


def test_error_after_the_commit_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(RULE, STORAGE)
    monkeypatch.setattr(job, "prune", _no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "a", model, optimizer, keep_last=1)
    assert checkpoint.verify(tmp_path / "a").num_ranks == 1


def _save_where_one_rank_cannot(rank: int, folder: str, asynchronous: bool) -> tuple[str, str]:
    model, optimizer = build(RULE, STORAGE)
    checkpoint.save(f"{folder}/good", model, optimizer)
    original = job.Job.write
    if rank == 1:
        job.Job.write = _no_space  # type: ignore[method-assign, assignment]
    try:
        message = ""
        try:
            checkpoint.save(f"{folder}/bad", model, optimizer, asynchronous=asynchronous)
            train(model, optimizer, 0, 1)
            checkpoint.save(f"{folder}/next", model, optimizer)
        except CheckpointError as error:
            message = str(error)
    finally:
        job.Job.write = original  # type: ignore[method-assign]
    checkpoint.save(f"{folder}/again", model, optimizer).wait()
    return message, checkpoint.latest(folder) or ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_ranks_full_disk_is_every_ranks_error(asynchronous: bool, tmp_path: Path) -> None:
    for message, newest in run_ranks(3, _save_where_one_rank_cannot, str(tmp_path), asynchronous):
        assert "No space left on device" in message
        assert newest.endswith("/again")
    assert not (tmp_path / "bad" / "commit.json").exists()
    assert not list((tmp_path / "bad").glob("*.distcp"))


def test_place_that_cannot_be_written_is_an_error_with_the_state_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model, optimizer = build(RULE, STORAGE)
    state = digest(model, optimizer)
    with pytest.raises(CheckpointError, match=r"saving .*file/checkpoint failed"):
        checkpoint.save(tmp_path / "file" / "checkpoint", model, optimizer)
    assert digest(model, optimizer) == state


def test_prune_counts_and_deletes_committed_checkpoints_only(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = distadam.SGD(model.named_parameters())
    for step in range(4):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer)
    (tmp_path / "step-3" / "commit.json").unlink()
    (tmp_path / "step-0" / "notes.txt").write_text("the user's")
    gone = checkpoint.prune(tmp_path, 1)
    assert [Path(path).name for path in gone] == ["step-1", "step-0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-2", "step-3"]
    assert [path.name for path in (tmp_path / "step-0").iterdir()] == ["notes.txt"]
    checkpoint.save(tmp_path / "step-4", model, optimizer, keep_last=1)
    assert checkpoint.latest(tmp_path) == str(tmp_path / "step-4")
    assert (tmp_path / "step-3").exists()


def test_latest_passes_over_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    optimizer = distadam.SGD(model.named_parameters())
    assert checkpoint.latest(tmp_path) is None
    for step in range(3):
        checkpoint.save(tmp_path / f"step-{step}", model, optimizer)
    next((tmp_path / "step-2").glob("*.distcp")).unlink()
    next((tmp_path / "step-1").glob("*.manifest.json")).write_text("{}")
    assert checkpoint.latest(tmp_path) == str(tmp_path / "step-0")
    assert caplog.text.count("passing over a damaged checkpoint") == 2


def _different_paths(rank: int, folder: str) -> None:
    model, optimizer = build(RULE, STORAGE)
    checkpoint.save(f"{folder}/{rank}", model, optimizer)


def _save_beside_a_step(rank: int, folder: str) -> None:
    model, optimizer = build(RULE, STORAGE)
    if rank == 0:
        checkpoint.save(folder, model, optimizer)
    else:
        train(model, optimizer, 0, 1)


@pytest.mark.parametrize("what", [_different_paths, _save_beside_a_step])
def test_ranks_that_do_different_things_are_told(what: Any, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(2, what, str(tmp_path), timeout_s=30)
    assert {name for name, _ in failure.value.errors.values()} == {"RankMismatchError"}


def test_extra_that_cannot_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    with pytest.raises(distadam.ConfigError, match=r"save\(extra=...\) expected numbers"):
        checkpoint.save(tmp_path, model, optimizer, extra={"function": lambda: None})
    with pytest.raises(distadam.ConfigError, match="expected a dictionary"):
        checkpoint.save(tmp_path, model, optimizer, extra=[1])  # type: ignore[arg-type]


def test_extra_restores_schedulers_and_random_numbers(tmp_path: Path) -> None:
    model, optimizer = build(RULE, STORAGE)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = checkpoint.RandomState(optimizer)
    train(model, optimizer, 0, 1)
    schedule.step()
    checkpoint.save(tmp_path, model, optimizer, extra={"schedule": schedule, "random": state, "note": [1, "a"]})
    drawn = (torch.rand(3), random.random())
    model, optimizer = build(RULE, STORAGE)
    again = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    torch.manual_seed(99)
    extra = checkpoint.load(
        tmp_path, model, optimizer, extra={"schedule": again, "random": checkpoint.RandomState(optimizer)}
    )
    assert extra["note"] == [1, "a"]
    assert again.last_epoch == schedule.last_epoch
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]
    assert json.dumps(optimizer.param_groups[0]["lr"]) == json.dumps(5e-3)


def _save_at_odds(rank: int, folder: str) -> list[tuple[str, str]]:
    """Return what was said when ranks save to different paths, and when one cannot save what it was given."""
    model, optimizer = build(RULE, STORAGE)
    said = []
    for asynchronous in (False, True):
        for path, extra in ((f"{folder}/{rank}", {}), (f"{folder}/same", {"it": object()} if rank else {})):
            try:
                checkpoint.save(path, model, optimizer, extra=extra, asynchronous=asynchronous)
            except Exception as error:
                said.append((type(error).__name__, str(error)))
    checkpoint.save(f"{folder}/good", model, optimizer)  # nobody hangs, nothing is stuck
    return said


def test_ranks_at_odds_about_a_save_are_all_told(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(2, _save_at_odds, str(tmp_path))):
        assert [kind for kind, _ in said] == ["RankMismatchError", "ConfigError"] * 2
        for _, text in said[::2]:
            assert f"rank 0 saves to '{tmp_path}/0' but rank 1 to '{tmp_path}/1'" in text
        for _, text in said[1::2]:
            assert "save(extra=...) expected numbers" in text
            assert text.startswith("rank 1: ") is (rank == 0)
    checkpoint.verify(tmp_path / "good")
    assert not list(tmp_path.glob("[01s]*/*"))
