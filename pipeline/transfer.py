"""Reads that go on from the last byte that arrived.

A read is a row of requests for what is still lacking. When one breaks off (reset, silence,
short body) the next begins at the first byte that is missing, so that a network that breaks
every few megabytes delays a read but never starves it. Nothing that a server says is taken
on trust: an answer must begin where it was asked to, be as long as announced and belong to
the same version of the file as the bytes before it.

What the bytes mean is checked elsewhere, by size and checksum (pipeline/data/index.py);
here is only made sure that they are the bytes of that place.
"""

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from pipeline.limits import count, limits
from pipeline.patience import Patience
from pipeline.storage_errors import CUT_REMEDY, AnswerError, BrokenError, explain
from pipeline.urls import CutError, StoreError, shown

_PROGRESS_BYTES = 64 << 10
"""What a request must have brought for its failure to count as a new one, and what must arrive
within one read time-out for a connection to count as alive."""
_MOST_MISFITS = 5
"""Answers without progress that contradict the request; then the server is taken to be unfit."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class ChangedError(StoreError):
    """A file was replaced while it was read."""


@dataclass(frozen=True)
class Answer:
    """What a server says of the bytes that it is about to send."""

    start: int
    """Position in the file of the first of them."""
    stop: int | None
    """Position behind the last; None if the server does not say."""
    total: int | None
    """Bytes of the whole file; None if the server does not say."""
    version: str | None
    """The same for all answers from the same content."""
    blocks: Iterator[bytes]
    """The bytes, those that arrived before an error included."""
    close: Callable[[], None]
    """Ends the request, whether or not all has been read."""


Open = Callable[[int, int | None], Answer]
"""Asks for the bytes [start, end) of a file, or all from `start` on."""


def described(
    status: int, headers: Mapping[str, str], blocks: Iterator[bytes], close: Callable[[], None]
) -> Answer:
    """The Answer that an HTTP status and headers (names in lower case) announce.

    Raises AnswerError, with the request ended, if they contradict each other.
    """
    try:
        start, stop, total = _announced(status, headers)
    except AnswerError:
        close()
        raise
    return Answer(start, stop, total, headers.get("etag") or headers.get("last-modified"), blocks, close)


def _announced(status: int, headers: Mapping[str, str]) -> tuple[int, int | None, int | None]:
    """Start, stop and total of an answer."""
    length = int(headers["content-length"]) if headers.get("content-length", "").isdecimal() else None
    if status != 206:
        return 0, length, length
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
    if match is None:
        raise AnswerError("a part without a valid Content-Range was sent")
    start, stop = int(match[1]), int(match[2]) + 1
    if length is not None and length != stop - start:
        raise AnswerError(f"bytes {start} to {stop} were announced with a length of {length}")
    return start, stop, None if match[3] == "*" else int(match[3])


def read(url: str, open_at: Open, start: int, end: int | None) -> bytes:
    """The bytes [start, end) of a file, or all from `start` on.

    A file that is replaced meanwhile is read again from the beginning, once. Raises
    StoreError if it is replaced again, ends before `end`, or cannot be read in time.
    """
    try:
        return b"".join(_blocks(url, open_at, start, end))
    except ChangedError:
        return b"".join(_blocks(url, open_at, start, end))


def _blocks(url: str, open_at: Open, start: int, end: int | None) -> Generator[bytes, None, None]:
    """The bytes [start, end) of one version of a file, in order, whatever happens on the way."""
    patience = Patience(url)
    wanted = _Wanted(url, start, end)
    misfits = 0
    while not wanted.complete:
        before = wanted.position
        try:
            answer = open_at(wanted.position, wanted.end)
            patience.answered()
            with closing(answer):
                wanted.check(answer)
                yield from wanted.cut(answer)
            wanted.ended()
            patience.progressed()
        except Exception as error:
            if wanted.position - before >= _PROGRESS_BYTES:
                patience.progressed()
                misfits = 0
            misfits += isinstance(error, AnswerError)
            if misfits == _MOST_MISFITS:
                raise explain(error, url) from error
            patience.bear(error)


class _Wanted:
    """What of a file is still lacking, and what its answers have told so far."""

    def __init__(self, url: str, start: int, end: int | None) -> None:
        self.url, self.start, self.position, self.end = url, start, start, end
        self.complete = start == end
        self._known: tuple[str | None, int | None] | None = None

    def check(self, answer: Answer) -> None:
        """Raises AnswerError if these are other bytes, ChangedError if it is another file."""
        known = (answer.version, answer.total)
        if self._known is not None and known != self._known:
            count(reread_bytes=self.position - self.start)
            raise ChangedError(f"{shown(self.url)}: was replaced while it was read; try again.")
        if answer.total is not None and self.end is not None and answer.total < self.end:
            raise CutError(
                f"{shown(self.url)}: has {answer.total} bytes, {self.end} at least were expected. "
                f"{CUT_REMEDY}"
            )
        # A server without ranges begins at 0 and is read from there.
        if answer.start not in (0, self.position):
            raise AnswerError(
                f"bytes from {answer.start} on were sent instead of those from {self.position} on"
            )
        needed = answer.total if self.end is None else self.end
        if answer.stop is not None and needed is not None and answer.stop < needed:
            raise AnswerError(f"bytes up to {answer.stop} only were announced")
        self._known = known
        self.end = answer.total if self.end is None else self.end

    def cut(self, answer: Answer) -> Generator[bytes, None, None]:
        """Those bytes of an answer that are lacking. Raises AnswerError or BrokenError if it is unfit."""
        at, pace = answer.start, _Pace()
        while (block := pace.next(answer.blocks)) is not None:
            begin, at = at, at + len(block)
            if answer.stop is not None and at > answer.stop:
                raise AnswerError(f"more bytes came than the {answer.stop - answer.start} announced")
            stop = len(block) if self.end is None else max(self.end - begin, 0)
            useful = block[max(self.position - begin, 0) : stop]
            count(reread_bytes=len(block) - len(useful))
            if useful:
                self.position += len(useful)
                yield useful
            if self.end is not None and at >= self.end != answer.stop:
                break  # The rest was not asked for.

    def ended(self) -> None:
        """An answer came to its end. Raises BrokenError if bytes are lacking all the same."""
        if self.end is not None and self.position < self.end:
            raise BrokenError(f"only {self.position - self.start} of {self.end - self.start} bytes arrived")
        self.complete = True


class _Pace:
    """Tells a connection that trickles from one that is alive; time-outs see only full silence."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def next(self, blocks: Iterator[bytes]) -> bytes | None:
        """The next block, None at the end. Raises BrokenError if hardly anything has come for too long."""
        began = time.monotonic()
        block = next(blocks, None)
        self._seconds += time.monotonic() - began
        self._bytes += len(block or b"")
        if block is not None and self._seconds > limits().read_timeout_seconds:
            if self._bytes < _PROGRESS_BYTES:
                raise BrokenError(f"only {self._bytes} bytes came in {self._seconds:.0f} s")
            self._bytes, self._seconds = 0, 0.0
        return block
