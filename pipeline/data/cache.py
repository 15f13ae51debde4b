"""A local cache of pieces of shards, shared by all processes of a machine, within a hard budget.

An entry is named by its content: the SHA-256 of its shard and a range of bytes in it. So equal
file names in two data sets never meet, a shard that was replaced is another one, and it does
not matter which epoch, lane, worker or run has fetched a piece first. The reader asks for
pieces of a fixed grid and compares the checksum of every sample of an entry, as it does after
a transfer; what is damaged is dropped and fetched again. Entries are not synced to disk: one
that a power cut has spoilt is such a damaged one.

The folder is never larger than the budget, half-written files and this module's own included
(sizes are rounded up to blocks of 4 KiB). Whoever writes holds an exclusive lock on a small
ledger that knows the total: he first makes room, by deleting what was not used for longest, then
writes beside the final name and renames. The ledger is invalid while that goes on; if its writer
is killed, the next one counts the files anew and deletes half-written ones, which nobody else
can be writing. Making room frees a tenth of the budget at once, so that it is rarely needed.

Checksums find damage, not malice: whoever may write to the folder could plant images. So a
folder that is not its owner's alone is neither written nor read, and of what lies in it only a
regular file of the same owner, of just the size of the piece, is opened at all.

A cache is a convenience. Whatever is wrong with its folder (full, over quota, read-only, not
ours), the run reads on from the store and says so, once for each process and folder. A writer
that finds the lock taken for a second keeps nothing rather than wait.
"""

import errno
import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_BLOCK = 4096
_FREED_SHARE = 0.1
_LOCK_SECONDS = 1.0
_PARTIAL = ".partial"
_LEDGER = "ledger"
# A total is stored twice, the second time with all bits turned: zeros are no valid ledger.
_TOTAL = struct.Struct("<QQ")
_ALL_BITS = 2**64 - 1
# What opening a link or a socket answers to those who want a file.
_NO_FILE = (errno.ELOOP, errno.ENXIO)

# Folders that this process has complained about.
_complaints: dict[Path, object] = {}


class PieceCache:
    """Pieces below `folder`, of at most `budget_bytes` together. Methods raise no OSError.

    Threads may share one object; other processes have their own on the same folder. Where
    budgets differ, each process keeps to its own whenever it writes.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder / "nvae-pieces", budget_bytes
        self._is_readable = self._is_writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._folder.mkdir(mode=0o700)
            self._check_privacy()
        except OSError as error:
            self._stop(error)

    def get(self, name: str, size: int) -> bytes | None:
        """The piece of that name, which is thereby the last to be deleted; None if it is not there.

        What has that name and is no file of ours of `size` bytes is dropped.
        """
        if not self._is_readable:
            return None
        path = self._folder / name
        try:
            data = _read_own(path, size)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._stop(error)
            return None
        if data is None:
            self.drop(name)
            return None
        # Another process may just have deleted it; a folder that cannot be written keeps its times.
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece, if there is room for it at all."""
        needed = _rounded(len(data))
        if not self._is_writable or needed > self._budget - _BLOCK:
            return
        try:
            with self._locked_ledger() as ledger:
                if ledger is not None and not (self._folder / name).exists():
                    self._write(ledger, name, data, needed)
        except OSError as error:
            self._stop_writing(error)

    def drop(self, name: str) -> None:
        """Forget a piece that was found damaged."""
        if not self._is_writable:
            return
        try:
            with self._locked_ledger() as ledger:
                if ledger is not None:
                    # Left invalid: the next writer counts.
                    _invalidate(ledger)
                    (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._stop_writing(error)

    def _write(self, ledger: int, name: str, data: bytes, needed: int) -> None:
        total = _stored_total(ledger)
        if total is None:
            total = self._count()
        _invalidate(ledger)
        if total + needed > self._budget:
            total = self._make_room(needed)
        partial = self._folder / f"{name}{_PARTIAL}"
        try:
            partial.write_bytes(data)
            partial.rename(self._folder / name)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _store_total(ledger, total + needed)

    def _make_room(self, needed: int) -> int:
        """Delete what was not used for longest; returns the bytes that are left."""
        entries = sorted(self._entries())
        total = _BLOCK + sum(size for _, size, _ in entries)
        wanted = max(min(self._budget - needed, int((1 - _FREED_SHARE) * self._budget)), 0)
        for _, size, path in entries:
            if total <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _count(self) -> int:
        """Bytes in the folder, without what a killed writer left, which is deleted. Lock held."""
        for path in self._folder.glob(f"*{_PARTIAL}"):
            path.unlink(missing_ok=True)
        return _BLOCK + sum(size for _, size, _ in self._entries())

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each piece."""
        with os.scandir(self._folder) as listed:
            for entry in listed:
                if entry.name != _LEDGER:
                    with suppress(FileNotFoundError):
                        facts = entry.stat()
                        yield facts.st_mtime_ns, _rounded(facts.st_size), Path(entry.path)

    @contextmanager
    def _locked_ledger(self) -> Iterator[int | None]:
        """A descriptor of the ledger, locked against threads and processes; None if it stays taken."""
        descriptor = os.open(self._folder / _LEDGER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            yield descriptor if _locked(descriptor) else None
        finally:
            os.close(descriptor)

    def _check_privacy(self) -> None:
        facts = self._folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(0, "it is a link or a file: delete it, or name another")
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise PermissionError(0, "it is not its owner's alone: delete it, or name another")

    def _stop(self, error: OSError) -> None:
        """Neither read nor write from now on."""
        self._is_readable = self._is_writable = False
        self._complain("cannot be used", error)

    def _stop_writing(self, error: OSError) -> None:
        """Only read from now on."""
        self._is_writable = False
        self._complain("can only be read", error)

    def _complain(self, problem: str, error: OSError) -> None:
        # Each evaluation has a cache object of its own; threads share one.
        mine = object()
        if _complaints.setdefault(self._folder, mine) is mine:
            logger.warning(
                "The data cache %s %s (%s). Training goes on, reading from the store. "
                "Make room or name another data.cache_folder; it may be set when a run continues.",
                self._folder,
                problem,
                error.strerror or error,
            )


def _read_own(path: Path, size: int) -> bytes | None:
    """The content of a regular file of our own, of `size` bytes; None if it is anything else."""
    try:
        # Without waiting for whoever writes to a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_size != size:
            return None
        data = file.read(size)
    return data if len(data) == size else None


def _locked(descriptor: int) -> bool:
    """Whether the lock was to be had within a second."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        else:
            return True


def _stored_total(ledger: int) -> int | None:
    stored = os.pread(ledger, _TOTAL.size, 0)
    if len(stored) != _TOTAL.size:
        return None
    total, turned = _TOTAL.unpack(stored)
    return int(total) if total ^ turned == _ALL_BITS else None


def _store_total(ledger: int, total: int) -> None:
    os.pwrite(ledger, _TOTAL.pack(total, total ^ _ALL_BITS), 0)


def _invalidate(ledger: int) -> None:
    os.pwrite(ledger, bytes(_TOTAL.size), 0)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
