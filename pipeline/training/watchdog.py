"""Whether a training moves on, and which rank the others wait for when it does not.

In every update all ranks wait for each other, so that one that hangs makes all of them stand
still. Each rank therefore marks what it begins, and `judge` compares the marks: the rank that
is least far is the one. None is a rank whose work is over: at the end others have more to do, as
rank 0 has with the registration. Who compares them is the driver under Ray, which has the marks
of all, and the process itself without Ray (`watched`). Rejected: each rank judging itself, which
ends the healthy ones first and cannot tell who is to blame.

What a hanging rank is doing is in the stacks of its threads, which are kept in the run's
folder before it is ended: nothing else makes room for a restart.
"""

import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.limits import statistics as store_statistics

Phase = Literal["start", "log", "evaluate", "checkpoint", "batch", "profile", "update", "finish"]
"""What a rank is at, between two marks; in the order in which they come at the same images seen."""

_FIRST_UPDATE_FACTOR = 5
_PHASE_FACTORS: Mapping[Phase, int] = {
    "start": 20,
    "checkpoint": 20,
    "finish": 20,
    "evaluate": 5,
    "profile": 5,
}
"""How much longer than updates other things may take: gigabytes that are read or written, a batch
of an evaluation with many samples."""
SILENT_SECONDS = 20.0
"""A rank that has not been heard of for so long is stopped, or out of reach."""
EXIT_CODE = 1
_LOOK_SECONDS = 1.0
_UPDATES = 31
"""The median is taken over so many of the latest updates."""
_SAVE_SECONDS = 10.0
"""How long a hanging rank waits for the store, which may be what it hangs in."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """Where a rank is."""

    phase: Phase = "start"
    images_seen: int = 0
    seconds: float = 0.0
    """Since it began the phase, or last was seen to be alive in it."""
    step_seconds: float | None = None
    """Median time of its latest updates; None before the first was made."""
    waits: bool = False
    """Whether it is in a collective, where it waits for others."""
    silent_seconds: float = 0.0
    """Since the rank itself was last heard of."""
    over: bool = False
    """Whether its work has ended well: it is not heard of any more, and nobody waits for it."""


@dataclass(frozen=True)
class Stalled:
    """A training that stands still."""

    rank: int
    mark: Mark
    silent: bool

    def __str__(self) -> str:
        where = f"at {self.mark.images_seen:,} images in phase {self.mark.phase!r}"
        if self.silent:
            return f"worker {self.rank} has not been heard of for {self.mark.silent_seconds:.0f} s ({where})"
        return f"worker {self.rank} hangs {where} for {self.mark.seconds:.0f} s"


@dataclass(frozen=True)
class Limits:
    """How long a rank may be at the same thing."""

    stall_seconds: float
    stall_steps: int

    @classmethod
    def of(cls, config: TrainConfig) -> "Limits":
        return cls(config.stall_seconds, config.stall_steps)

    def seconds(self, mark: Mark) -> float:
        """For a rank that is where `mark` says."""
        limit = max(self.stall_seconds, self.stall_steps * (mark.step_seconds or 0.0))
        factor = _PHASE_FACTORS.get(mark.phase, 1 if mark.step_seconds else _FIRST_UPDATE_FACTOR)
        return factor * limit


def judge(marks: Mapping[int, Mark], limits: Limits) -> Stalled | None:
    """The rank that all others wait for, if none of them moves on; `marks` holds every rank's.

    Of those whose work is not over that is one that is not heard of; else one that is not waiting
    in a collective; among those the one that is least far, and of several as far the one that was
    alive longest ago.
    """
    working = {rank: mark for rank, mark in marks.items() if not mark.over}
    if not working:
        return None

    def order(rank: int) -> tuple[bool, bool, int, int, float]:
        mark = working[rank]
        heard = mark.silent_seconds < SILENT_SECONDS
        return heard, mark.waits, mark.images_seen, get_args(Phase).index(mark.phase), -mark.seconds

    slowest = min(working, key=order)
    limit = limits.seconds(working[slowest])
    if all(mark.seconds > limit for mark in working.values()):
        return Stalled(slowest, working[slowest], working[slowest].silent_seconds >= SILENT_SECONDS)
    return None


class Pulse:
    """The marks of this rank: made by the thread that trains, read by any other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._phase: Phase = "start"
        self._images_seen = 0
        self._alive = clock()
        self._update_began: float | None = None
        self._first_update: float | None = None
        self._updates: deque[float] = deque(maxlen=_UPDATES)
        self._retries = store_statistics().retries
        self._over = False

    def mark(self, phase: Phase, images_seen: int) -> None:
        """The rank begins a phase."""
        now = self._clock()
        if phase == "update":
            if self._update_began is not None:
                self._updates.append(now - self._update_began)
            if self._first_update is None:
                self._first_update = now
            self._update_began = now
        self._phase, self._images_seen, self._alive = phase, images_seen, now

    def alive(self) -> None:
        """A part of the phase is done."""
        self._alive = self._clock()

    def over(self) -> None:
        """The rank has done all that it had to do."""
        self._over = True

    @property
    def training_seconds(self) -> float:
        """Since the first update began; 0 before."""
        return 0.0 if self._first_update is None else self._clock() - self._first_update

    def read(self) -> Mark:
        """Where the rank is now. One thread alone may read."""
        retries = store_statistics().retries
        if retries != self._retries:
            # A store that falters is waited for with a patience of its own (storage.retry_seconds).
            self._retries = retries
            self.alive()
        # A copy, since the training thread may add one meanwhile.
        updates = self._updates.copy()
        return Mark(
            self._phase,
            self._images_seen,
            self._clock() - self._alive,
            statistics.median(updates) if updates else None,
            in_collective(),
            over=self._over,
        )


def in_collective() -> bool:
    """Whether a thread of this process waits for other ranks; on a GPU the device waits instead."""
    return any(
        frame.f_code.co_filename.endswith("distributed_c10d.py")
        for top in sys._current_frames().values()
        for frame, _ in traceback.walk_stack(top)
    )


def stacks() -> str:
    """What every Python thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def end_process(run_url: str, rank: int, mark: Mark, linger_seconds: float = 0.0) -> None:
    """Keep the stacks of this rank in RUN/files and on standard error, and end the process.

    The end of one rank is that of all, so that it lingers until the others have kept theirs, too.
    No `finally` and no `except` of the hanging thread runs: it does not move.
    """
    text = f"Worker {rank}, {mark}:\n\n{stacks()}"
    sys.stderr.write(text)
    sys.stderr.flush()
    url = storage.join(run_url, "files", f"stacks-{mark.images_seen:012d}-worker-{rank}.txt")
    saving = threading.Thread(target=storage.write_bytes, args=(url, text.encode()), daemon=True)
    saving.start()
    saving.join(_SAVE_SECONDS)
    time.sleep(linger_seconds)
    os._exit(EXIT_CODE)


@contextmanager
def watched(pulse: Pulse, limits: Limits, run_url: str, say: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile this process, which trains alone, is ended if it stands still."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            stalled = judge({0: pulse.read()}, limits)
            if stalled is not None:
                say(
                    f"Stopped: {stalled}. Its stacks are in {storage.join(run_url, 'files')}; the same "
                    "command continues the run."
                )
                end_process(run_url, 0, stalled.mark)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
