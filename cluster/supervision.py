"""Watching over one start of the workers: their lines, their marks, and reasons to let them leave.

All this happens in the driver, beside the training. A group leaves after a checkpoint when the
user wants it, when one of its nodes is about to be taken away, and when the cluster can hold a
wider one; it is ended when it stands still.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.board import News, Wish
from cluster.nodes import leaving_nodes, places, widest
from pipeline.training.watchdog import Limits, judge

GROW_SECONDS = 300.0
"""A group that is narrower than it could be trains at least so long, whatever nodes come and go:
a start costs about half a minute."""
_LOOK_SECONDS = 2.0
"""Between two looks at the nodes."""
_ROUND_SECONDS = 1.0
"""Between two looks at the board. Each takes the processors of three processes a moment, which the
ranks of one machine notice."""


class Supervisor:
    """Watches one group of workers. `reason` says why it was made to leave or ended, if it was."""

    def __init__(
        self,
        board: Any,
        group: str,
        workers: int,
        widths: Sequence[int],
        kind: str,
        say: Callable[[str], None],
        heard: Callable[[Mapping[str, float]], None],
        unwanted: Callable[[], bool],
        limits: Limits | None,
    ) -> None:
        self.reason = ""
        self._board, self._group = board, group
        self._workers, self._widths, self._kind = workers, widths, kind
        self._say, self._heard, self._unwanted = say, heard, unwanted
        self._limits = limits
        self._wish: Wish = "go on"
        self._began = self._looked = time.monotonic()

    @property
    def reason_to_end(self) -> str:
        """Why the group was ended, if it was; a group that was only asked to leave may fail of itself."""
        return self.reason if self._wish == "end" else ""

    def watch(self, fit: Callable[[], Any]) -> dict[str, Any]:
        """Call `fit` in a thread and watch until it is over; returns what it returned, or raises."""
        outcome: list[Any] = []

        def call() -> None:
            try:
                outcome.append(fit().return_value)
            except BaseException as error:  # raised below, in the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=call, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            self._decide(self._news())
            thread.join(_ROUND_SECONDS)
        self._news()
        result = outcome[0]
        if isinstance(result, BaseException):
            raise result
        answer: dict[str, Any] = result
        return answer

    def _news(self) -> News:
        news: News = ray.get(self._board.news.remote(self._group, self._wish))
        for line in news.lines:
            self._say(line)
        for evaluation in news.evaluations:
            self._heard(evaluation)
        return news

    def _decide(self, news: News) -> None:
        """Whether the group is to leave, or to be ended. Once decided, it stays so."""
        if self._wish == "go on" and self._unwanted():
            self._wish = "leave"
        if self._wish == "go on":
            self.reason = self._reason_to_leave(news)
            self._wish = "leave" if self.reason else "go on"
        if self._wish != "end" and self._limits is not None and len(news.reports) == self._workers:
            stalled = judge({rank: each.mark for rank, each in news.reports.items()}, self._limits)
            if stalled is not None:
                self.reason, self._wish = f"Ended, for {stalled}", "end"
                self._say(f"{self.reason}. The stacks of all workers that answer go to the run's files/.")

    def _reason_to_leave(self, news: News) -> str:
        told = [str(rank) for rank, report in news.reports.items() if report.told_to_leave]
        if told:
            return f"Worker {', '.join(told)} was told to end"
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return ""
        self._looked = time.monotonic()
        leaving = leaving_nodes()
        hit = [str(rank) for rank, report in news.reports.items() if report.node in leaving]
        if hit:
            return f"The node of worker {', '.join(hit)} is being taken away"
        return self._reason_to_grow()

    def _reason_to_grow(self) -> str:
        could_be_wider = self._workers < self._widths[-1]
        if not could_be_wider or time.monotonic() - self._began < GROW_SECONDS:
            return ""
        there = places(self._kind)
        wider = widest(self._widths, min(there.total, self._workers + there.free))
        return f"There is room for {wider} workers" if wider > self._workers else ""
