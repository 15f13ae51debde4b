"""Files on this machine: whole or not there, with errors that say what to mend.

A file is written beside its place, synced and renamed, so that neither a reader nor a crash
ever finds a part of it. What a killed writer leaves behind ends in `.partial`, is not listed,
and is swept when the same file is written again a day later or more.
"""

import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage_errors import explain, explain_write
from pipeline.urls import StoreError

_PARTIAL = ".partial"
_NONCE = 12
"""Random digits in the name of a part."""
_ABANDONED_SECONDS = 86_400.0
"""Age of a part that nobody can be writing any more; another host's clock may be off by hours."""


def read(path: Path, start: int | None, end: int | None) -> bytes:
    """Bytes [start, end) of a file, or as many of them as there are."""
    with path.open("rb") as file:
        file.seek(start or 0)
        return file.read() if end is None else file.read(end - (start or 0))


def size(path: Path) -> int:
    """Bytes of a file. Raises MissingError if it is not there or is a folder."""
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return path.stat().st_size
    except OSError as error:
        raise explain(error, str(path)) from error


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; synced and renamed to `path` if all went well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:_NONCE]}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain_write(error, str(path)) from error


def _sweep(path: Path) -> None:
    """Delete what killed writers of this file left behind long ago."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * _NONCE}{_PARTIAL}"):
        # Another writer may sweep it at the same time.
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                part.unlink()


def check_writable(folder: Path) -> None:
    """Write and delete a file in `folder`, or where it would be made; nothing else is left or made.

    Raises StoreError if that cannot be done.
    """
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        probe = there / f".{uuid.uuid4().hex[:_NONCE]}{_PARTIAL}"
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise explain_write(error, str(folder)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path, recursive: bool) -> None:
    """Delete a file, or with `recursive` a folder. Nothing there: no error."""
    try:
        if path.is_dir() and not path.is_symlink():
            if not recursive:
                raise StoreError(f"{path}: is a folder.")
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, str(path)) from error


def entries(folder: Path) -> dict[str, int | None]:
    """Size of each file directly in `folder` by name, None for folders; empty if it is not there."""
    return {name: about and about.st_size for name, about in _listed(folder).items()}


def times(folder: Path) -> dict[str, int]:
    """When each file directly in `folder` was last written, in nanoseconds since 1970, by name."""
    return {name: about.st_mtime_ns for name, about in _listed(folder).items() if about is not None}


def _listed(folder: Path) -> dict[str, os.stat_result | None]:
    if not folder.is_dir():
        return {}
    found: dict[str, os.stat_result | None] = {}
    try:
        for entry in os.scandir(folder):
            if not entry.name.endswith(_PARTIAL):
                # Another worker may delete a file between its listing and the question for its size.
                with suppress(FileNotFoundError):
                    found[entry.name] = None if entry.is_dir() else entry.stat()
    except OSError as error:
        raise explain(error, str(folder)) from error
    return found
