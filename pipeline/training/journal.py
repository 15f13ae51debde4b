"""The journal: every point, picture and tag of a run's curves, on disk before anywhere else.

RUN/journal/003-00000.jsonl     a segment: what the third attempt noted, one JSON object a line
RUN/pictures/, RUN/files/       pictures and files that the lines name

A line carries a CRC-32 of itself, so it is whole or it is left out, and what is beside a
damaged one is still read. Its time is fixed when it is noted, so that sending it twice to
MLflow stores it once. On a local store the segments are written in place, and forced to
the disk every few seconds. On any other they are written to a private folder of this
machine and copied every few seconds, whole, because objects cannot grow; segments are short
to keep that cheap. There pictures and files are deleted when they are copied, the folder when
all is, or by a later journal once whoever made it was killed. `durable` lines are those that
outlive this machine: only they are delivered, since a line that MLflow has and the store has
not would be noted again, at another time, by a successor. While a disk is full, lines wait in
memory.

A line of a hundred metrics takes 5 KB. A week at one line a minute is 50 MB, and nothing
is ever deleted before the run is.

Rejected: one growing file (a copy of everything every few seconds), and MLflow's own
asynchronous logging (measured: it drops what fails after its retries).
"""

import json
import logging
import math
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline import storage
from pipeline.training.private_folder import PrivateFolder

Kind = Literal["metrics", "artifact", "tag", "status"]

_FIELDS = {"artifact": ("path", "folder"), "tag": ("key", "value"), "status": ("value",)}

SEGMENT_BYTES = 256 << 10
COPY_SECONDS = 3.0
LINES_IN_MEMORY = 10_000
"""How many lines wait for room on a full disk; the oldest are given up first."""

_SEGMENT = re.compile(r"(?P<attempt>\d{3,9})-(?P<number>\d{5,9})\.jsonl")
# JSON escapes the quotes in strings, so neither the beginning nor the end is ever inside of a record.
_RECORD = re.compile(rb'\{"kind":(?:(?!\{"kind":).)*?,"crc":"[0-9a-f]{8}"\}', re.DOTALL)
_CRC_LENGTH = len(',"crc":"01234567"}')

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    kind: Kind
    time: int
    """Milliseconds since the epoch, when it was noted."""
    body: Mapping[str, Any]
    """metrics: at (images seen), values; artifact: path below the run's folder, folder in MLflow;
    tag: key, value; status: value."""


def encode(entry: Entry) -> bytes:
    """The line of an entry. Numbers that JSON lacks are written as "nan", "inf", "-inf"."""
    record = {"kind": entry.kind, "time": entry.time, **entry.body}
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return text[:-1] + _crc(text) + b"\n"


def json_number(value: float) -> float | str:
    """A number as JSON can hold it; `float` turns it back."""
    return value if math.isfinite(value) else str(value)


def decode(data: bytes) -> Iterator[Entry]:
    """The entries whose lines are as they were written; what is damaged is a warning.

    A last line that has no end yet is no damage.
    """
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        found = [line] if _is_whole(line) else [part for part in _RECORD.findall(line) if _is_whole(part)]
        damaged = len(line) - sum(map(len, found))
        if damaged and number < len(lines):
            logger.warning("%d bytes of the journal are damaged and left out: %r", damaged, line[:80])
        for record in found:
            try:
                yield _entry(json.loads(record))
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("a line of the journal is not understood and left out: %r", record[:80])


def _is_whole(record: bytes) -> bool:
    """Whether the CRC-32 at its end is that of what stands before."""
    text, end = record[:-_CRC_LENGTH] + b"}", record[-_CRC_LENGTH:]
    return end == _crc(text)


def _crc(text: bytes) -> bytes:
    return b',"crc":"%08x"}' % zlib.crc32(text)


def _entry(record: dict[str, Any]) -> Entry:
    kind, moment = record.pop("kind"), int(record.pop("time"))
    del record["crc"]
    if kind == "metrics":
        values = {name: float(value) for name, value in record["values"].items()}
        return Entry(kind, moment, {"at": int(record["at"]), "values": values})
    if not all(isinstance(record[field], str) for field in _FIELDS[kind]):
        raise TypeError(f"fields of {kind}")
    return Entry(kind, moment, record)


def complete(data: bytes) -> int:
    """Length of the lines of `data` that have an end, in bytes."""
    return data.rfind(b"\n") + 1


class StoredJournal:
    """The journal of a run as the store has it."""

    def __init__(self, run_url: str) -> None:
        self.run_url = storage.normalize(run_url)

    def segments(self) -> list[str]:
        """Names of the segments, in the order in which they were noted."""
        names = storage.list_dir(storage.join(self.run_url, "journal"))
        return sorted((n for n in names if _SEGMENT.fullmatch(n)), key=_order)

    def read(self, segment: str) -> bytes:
        """What the store has of a segment. Raises StoreError if it cannot be read."""
        return storage.read_bytes(storage.join(self.run_url, "journal", segment))

    def read_file(self, path: str) -> bytes:
        """A picture or file that an entry names. Raises StoreError if it cannot be read."""
        return storage.read_bytes(storage.join(self.run_url, path))


def _order(segment: str) -> tuple[int, int]:
    attempt, number = segment.removesuffix(".jsonl").split("-")
    return int(attempt), int(number)


class Journal(StoredJournal):
    """The journal of a run, with the attempt that notes in it.

    Noting, attaching and copying never raise for a full disk or a store that is away: the
    log says so once and training goes on.
    """

    def __init__(self, run_url: str, attempt: int, copy_seconds: float = COPY_SECONDS) -> None:
        """Notes go to a segment of their own. Raises StoreError if the store cannot be listed."""
        super().__init__(run_url)
        taken = (number for other, number in map(_order, super().segments()) if other == attempt)
        self._attempt, self._number = attempt, 1 + max(taken, default=-1)
        self._in_place = storage.is_local(self.run_url)
        if self._in_place:
            self._folder = Path(self.run_url)
        else:
            self._private = PrivateFolder("nvae-journal-")
            self._folder = self._private.path
        (self._folder / "journal").mkdir(parents=True, exist_ok=True)
        self._lock, self._copy_lock = threading.Lock(), threading.Lock()
        self._file: BinaryIO | None = None
        self._waiting: deque[bytes] = deque()
        """Lines for which the disk has no room."""
        self._written: dict[str, int] = {}
        """Bytes of each own segment."""
        self._durable: dict[str, int] = {}
        """How many of them outlive this machine."""
        self._new_files: list[str] = []
        """Pictures and files that do not, yet."""
        self._troubled = False
        self._closed = threading.Event()
        self._copier = threading.Thread(
            target=self._copy_regularly, args=(copy_seconds,), name="journal", daemon=True
        )
        self._copier.start()

    def note(self, kind: Kind, **body: Any) -> None:
        """Appends one line. From here on it survives the death of this process."""
        line = encode(Entry(kind, time.time_ns() // 1_000_000, body))
        with self._lock:
            self._waiting.append(line)
            try:
                self._write_waiting()
            except OSError as error:
                if len(self._waiting) > LINES_IN_MEMORY:
                    self._waiting.popleft()
                self._warn(
                    f"the journal cannot be written, its lines wait in memory, the last {LINES_IN_MEMORY:,} "
                    f"at most: {error}"
                )

    def attach(self, path: str, data: bytes) -> bool:
        """Keeps a picture or file at `path` below the run's folder; whether it could."""
        storage.check_relative(path)
        target = self._folder / path
        try:
            # At once: else the copy of an earlier file of this name would delete it.
            with self._lock:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                self._new_files.append(path)
        except OSError as error:
            self._warn(f"{path} cannot be written beside the journal: {error}")
            return False
        return True

    def sync(self) -> bool:
        """Makes the journal outlive this machine; whether it has everything noted before the call."""
        try:
            with self._lock:
                self._write_waiting()
            with self._copy_lock:
                self._copy()
        except (storage.StoreError, OSError) as error:
            self._warn(f"the journal cannot be copied, the next copy tries again: {error}")
            return False
        self._troubled = False
        return True

    def own_segments(self) -> dict[str, int]:
        """Durable bytes of each segment of this journal's own, in order."""
        with self._lock:
            return {name: self._durable.get(name, 0) for name in self._written}

    def read(self, segment: str) -> bytes:
        """What is durable of a segment, from this machine's disk if it is our own."""
        durable = self.own_segments().get(segment)
        if durable is None:
            return super().read(segment)
        with (self._folder / "journal" / segment).open("rb") as file:
            return file.read(durable)

    def read_file(self, path: str) -> bytes:
        try:
            return (self._folder / path).read_bytes()
        except FileNotFoundError:
            return super().read_file(path)

    def close(self) -> None:
        """Copies what is missing and removes this machine's copy if nothing is missing any more."""
        self._closed.set()
        if self._copier.is_alive():
            self._copier.join()
        complete = self.sync()
        with self._lock:
            self._leave_segment()
        if self._waiting:
            logger.error("%d lines of the journal of %s are lost", len(self._waiting), self.run_url)
        if self._in_place:
            return
        self._private.leave(keep=not complete)
        if not complete:
            logger.warning("the end of the journal of %s is in %s only", self.run_url, self._folder)

    def _write_waiting(self) -> None:
        """Appends what waits. Raises OSError, with the rest still waiting, if there is no room."""
        while self._waiting:
            self._append(self._waiting[0])
            self._waiting.popleft()

    def _append(self, line: bytes) -> None:
        """Appends to the open segment, or to a new one if there is none or it is full."""
        if self._file is None:
            self._file = self._new_segment()
            self._written[self._segment()] = 0
        name = self._segment()
        length = self._written[name]
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk took only a part of a line")
        except OSError:
            self._file.truncate(length)
            self._file.seek(length)
            raise
        self._written[name] = length + len(line)
        if self._written[name] >= SEGMENT_BYTES:
            self._leave_segment()

    def _segment(self) -> str:
        return f"{self._attempt:03d}-{self._number:05d}.jsonl"

    def _new_segment(self) -> BinaryIO:
        while True:
            try:
                # "x": whoever else notes under this attempt must never share a file with us.
                return (self._folder / "journal" / self._segment()).open("xb", buffering=0)
            except FileExistsError:
                self._number += 1

    def _leave_segment(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._number += 1

    def _copy(self) -> None:
        with self._lock:
            files, segments = list(self._new_files), dict(self._written)
        # Pictures before the lines that name them.
        for path in files:
            try:
                self._persist(path)
            except FileNotFoundError:
                logger.warning("%s was deleted before it was copied", path)
            with self._lock:
                self._new_files.remove(path)
                # Unless it was attached anew.
                if not self._in_place and path not in self._new_files:
                    (self._folder / path).unlink(missing_ok=True)
        for name, length in segments.items():
            if self._durable.get(name, 0) < length:
                self._persist(f"journal/{name}", length)
                with self._lock:
                    self._durable[name] = length

    def _persist(self, path: str, length: int = -1) -> None:
        """Makes the first `length` bytes of a file (-1: all) outlive this machine's breakdown."""
        local = self._folder / path
        if self._in_place:
            # A new file's name is in its folder.
            for place in (local, local.parent):
                descriptor = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            return
        with local.open("rb") as file:
            storage.write_bytes(storage.join(self.run_url, path), file.read(length))

    def _copy_regularly(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            self.sync()

    def _warn(self, message: str) -> None:
        if not self._troubled:
            self._troubled = True
            logger.warning("%s (said once until it works again)", message)
