"""Files of one checkpoint directory: a local folder, or any URL that fsspec knows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase

from distadam.errors import IncompleteCheckpoint, MissingDependency


def is_url(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is a URL for fsspec and not a local folder."""
    return "://" in os.fspath(path)


class Store:
    """A directory, read and written through torch.distributed.checkpoint's file systems.

    Args:
        path: local folder or URL (``s3://bucket/run``: needs fsspec and its package for that protocol).

    Raises:
        MissingDependency: a URL, and no fsspec.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path).rstrip("/") if is_url(path) else os.path.abspath(os.fspath(path))
        self.is_local = not is_url(path)
        self.fs: FileSystemBase = FileSystem() if self.is_local else _fsspec(self.path)

    def place(self, name: str) -> str:
        """Return the full path of a file."""
        return f"{self.path}/{name}" if name else self.path

    def open(self, name: str, mode: str = "rb") -> AbstractContextManager[IO[bytes]]:
        """Open a file of the directory."""
        return cast("AbstractContextManager[IO[bytes]]", self.fs.create_stream(self.place(name), mode))

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            IncompleteCheckpoint: there is no such file.
        """
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError as error:
            raise IncompleteCheckpoint(f"{self.path}: expected a file {name!r} but there is none.") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        temporary = f"{name}.tmp"
        try:
            with self.open(temporary, "wb") as file:
                file.write(data)
                if self.is_local:
                    file.flush()
                    os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        if self.is_local:
            os.replace(self.place(temporary), self.place(name))
            self.sync()
        else:
            if self.fs.exists(self.place(name)):
                self.fs.rm_file(self.place(name))
            self.fs.rename(self.place(temporary), self.place(name))

    def sync(self) -> None:
        """Make created and renamed names durable."""
        if self.is_local:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def make(self) -> None:
        """Create the directory."""
        self.fs.mkdir(self.path)

    def exists(self, name: str) -> bool:
        """Say whether a file is there."""
        return bool(self.fs.exists(self.place(name)))

    def nbytes(self, name: str) -> int | None:
        """Return a file's size, or None if it is not there."""
        try:
            return os.stat(self.place(name)).st_size if self.is_local else int(self._remote.size(self.place(name)))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Return the names of files and folders in the directory; none if it does not exist."""
        try:
            found = os.listdir(self.path) if self.is_local else self._remote.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(Path(name).name for name in found)

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.place(name))

    def remove_directory(self) -> None:
        """Delete the directory if nothing is left in it."""
        with contextlib.suppress(OSError):
            if self.is_local:
                os.rmdir(self.path)
            else:
                self._remote.rmdir(self.path)

    def children(self) -> Iterator[Store]:
        """Yield the folders in the directory."""
        for name in self.names():
            if not self.is_local or os.path.isdir(self.place(name)):
                yield Store(self.place(name))

    def parent(self) -> Store:
        """Return the directory around this one."""
        return Store(self.path.rpartition("/")[0] or "/")

    @property
    def _remote(self) -> Any:
        return cast(Any, self.fs).fs


def _fsspec(url: str) -> FileSystemBase:
    try:
        from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as Remote
    except ImportError as error:
        raise MissingDependency(
            f"{url}: expected a local folder or fsspec. Run: pip install 'distadam[checkpoint]'"
        ) from error
    remote = Remote()
    try:
        remote.init_path(url)
    except ImportError as error:
        raise MissingDependency(f"{url}: {error}. Run: pip install with fsspec's package for this protocol.") from error
    return remote
