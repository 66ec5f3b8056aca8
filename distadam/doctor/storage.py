"""Where checkpoints go: can it be written, how much fits, whose clock does it have."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from pathlib import Path

from distadam.doctor.finding import Finding, error, ok, warning

_CURES = {
    errno.EROFS: "mount it read-write, or choose another directory",
    errno.EACCES: "give this user the right to write there (chown, chmod), or choose another directory",
    errno.EPERM: "give this user the right to write there, or choose another directory",
    errno.ENOSPC: "delete old checkpoints (distadam checkpoint prune) or choose a larger disk",
    errno.EDQUOT: "delete old checkpoints (distadam checkpoint prune) or ask for a larger quota",
    errno.ENOTDIR: "a part of the path is a file; choose another directory",
}
_PROBE_NBYTES = 4 << 20
_MIN_FREE_GIB = 1.0
_MAX_SKEW_S = 5.0


def check_checkpoints(directory: Path) -> list[Finding]:
    """Write, rename, read and delete a file as a save would; make no directory that stays."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".distadam-doctor-{secrets.token_hex(8)}"
    try:
        began = time.perf_counter()
        modified = _write(probe)
        seconds = time.perf_counter() - began
        about = os.statvfs(place)
    except OSError as problem:
        cure = _CURES.get(problem.errno or 0, "choose another directory")
        text = f"cannot write checkpoints to {directory}: {problem.strerror or problem}"
        return [error("checkpoints.write", text, cure, directory=str(directory))]
    finally:
        for left in (probe, probe.with_suffix(".new")):
            with contextlib.suppress(OSError):
                left.unlink()
    return [*_about(directory, about.f_bavail * about.f_frsize / 2**30, seconds), *_clock(place, modified)]


def _write(probe: Path) -> float:
    """Write as a save does: a new name, synced, renamed; return its time of modification by this host's clock."""
    new = probe.with_suffix(".new")
    content = secrets.token_bytes(_PROBE_NBYTES)
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    modified = new.stat().st_mtime - time.time()
    new.rename(probe)
    if probe.read_bytes() != content:
        raise OSError(errno.EIO, "what was read back is not what was written")
    return modified


def _about(directory: Path, free_gib: float, seconds: float) -> list[Finding]:
    speed = _PROBE_NBYTES / 2**20 / seconds
    text = f"{directory} can be written, {speed:,.0f} MiB/s with sync, {free_gib:,.1f} GiB free"
    if free_gib < _MIN_FREE_GIB:
        cure = _CURES[errno.ENOSPC]
        return [warning("checkpoints.space", text, cure, free_gib=free_gib)]
    return [ok("checkpoints.write", text, free_gib=free_gib, mib_per_s=speed)]


def _clock(place: Path, skew_s: float) -> list[Finding]:
    if abs(skew_s) > _MAX_SKEW_S:
        text = f"files in {place} are stamped {skew_s:+.1f} s from this host's clock: the file server's differs"
        return [warning("checkpoints.clock", text, "synchronise both clocks (chrony)", skew_s=skew_s)]
    return []
