"""What the driver and the ranks of a training tell each other while it runs.

The board is an actor on the driver's node, so that no loss of another node takes it along. A
rank reports every second, by itself, from a thread: its lines of text, its mark, and what its
process was told; the answer is what the driver wishes. The driver asks as often, and says its
wish each time, so that a board that was started anew knows everything again. Nothing here is
part of a step. Rejected: Ray's queue, which carries lines one way only, and files in the store,
of which every rank would have to look for some.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.training.watchdog import Mark

REPORT_SECONDS = 1.0

Wish = Literal["go on", "leave", "end"]
"""What the driver wants of all ranks: to leave after a checkpoint, or to keep their stacks and end."""


@dataclass(frozen=True)
class Report:
    """What one rank tells."""

    mark: Mark
    node: str
    """Ray's number of the node that it is on."""
    told_to_leave: bool
    """Whether its process received a SIGTERM."""


@dataclass(frozen=True)
class News:
    """What the driver learns."""

    lines: tuple[str, ...] = ()
    evaluations: tuple[Mapping[str, float], ...] = ()
    """What rank 0 found since, in its order."""
    reports: Mapping[int, Report] = field(default_factory=dict)
    """The latest of each rank of the group that was asked for."""


class _Board:
    """The actor. A group is the ranks of one start; what those of an earlier one still tell is dropped."""

    def __init__(self) -> None:
        self._group, self._wish = "", "go on"
        self._lines: list[str] = []
        self._evaluations: list[Mapping[str, float]] = []
        self._reports: dict[int, tuple[float, Report]] = {}

    def report(
        self,
        group: str,
        rank: int,
        lines: list[str],
        evaluations: list[Mapping[str, float]],
        report: Report,
    ) -> str:
        self._lines += lines
        self._evaluations += evaluations
        if group != self._group:
            return "go on"
        self._reports[rank] = time.monotonic(), report
        return self._wish

    def news(self, group: str, wish: Wish) -> News:
        if group != self._group:
            self._group, self._reports = group, {}
        self._wish = wish
        lines, self._lines = self._lines, []
        found, self._evaluations = self._evaluations, []
        reports = {rank: _aged(*told) for rank, told in self._reports.items()}
        return News(tuple(lines), tuple(found), reports)


def _aged(heard: float, report: Report) -> Report:
    """The report as it is now: nothing was heard of the rank since."""
    since = time.monotonic() - heard
    mark = replace(report.mark, seconds=report.mark.seconds + since, silent_seconds=since)
    return replace(report, mark=mark)


@contextmanager
def board() -> Iterator[Any]:
    """A board for one launch: a handle that travels to the ranks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(_Board)
        .options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)
        .remote()
    )
    try:
        yield actor
    finally:
        ray.kill(actor)


class Reporter:
    """Reports for one rank, from a thread of its own; knows what the driver wishes."""

    def __init__(self, actor: Any, group: str, rank: int) -> None:
        self.wish: Wish = "go on"
        self._actor, self._group, self._rank = actor, group, rank
        self._lines: list[str] = []
        self._evaluations: list[Mapping[str, float]] = []
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Show a line to the user with the next report."""
        with self._lock:
            self._lines.append(line)

    def tell(self, evaluation: Mapping[str, float]) -> None:
        """Let the driver know of an evaluation with the next report."""
        with self._lock:
            self._evaluations.append(dict(evaluation))

    def send(self, report: Report) -> None:
        """Report, and learn the wish. What does not get through is sent again."""
        with self._lock:
            lines, found = list(self._lines), list(self._evaluations)
        try:
            self.wish = ray.get(self._actor.report.remote(self._group, self._rank, lines, found, report))
        except RayError:
            return  # The board is being started anew, or the driver is gone and we soon are.
        with self._lock:
            del self._lines[: len(lines)], self._evaluations[: len(found)]
