"""T4: a hundred promotions at once, on SQLite and on a real MLflow server, and processes killed among them.

    python -m tests.faults.promotion

Each racer is a process of its own with a candidate of its own, whose score is known, so that the race is
about the decision; sixteen of them run at a time. In rows `killed` a third of them get SIGKILL at a moment
drawn by chance. Afterwards one more command runs, as it would. Then the best of all that stand in the
history must have the alias, every attempt that was not killed must be in it once, the numbers without a
gap, and the scores of successive holders must fall. The last row takes the server away: an attempt fails in
one message, nothing is half-done, and repeated after the server's return it goes through.
"""

import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.models.names import UnreachableError
from pipeline.models.promotion import Promotions, new_entry
from pipeline.models.promotion_history import ACCEPTED, PROMOTION
from tests.faults import campaign
from tests.mlflow_server import MlflowServer, serving
from tests.pipeline.models.promoting import ALIAS, BASIS, NAME, attempt, with_versions

RACERS, AT_A_TIME = 100, 16
ROWS = ("sqlite", "server", "sqlite-killed", "server-killed", "away")


@dataclass
class Outcome:
    """Attempts, and how many of them ended as they must."""

    tried: int
    survived: int


def run(names: Sequence[str], seed: int, short: bool) -> list[Outcome]:
    print(f"{'row':14} {'tried':>6} {'survived':>8}  killed  in the history  seconds")
    racers = 24 if short else RACERS
    outcomes = []
    for name in names:
        with _mlflow(name) as (uri, server):
            began = time.monotonic()
            if name == "away":
                outcome, killed, entries = _away(uri, server), 0, 2
            else:
                outcome, killed, entries = _raced(
                    uri, racers, random.Random(f"{seed}/{name}"), "killed" in name
                )
            seconds = time.monotonic() - began
        outcomes.append(outcome)
        line = f"{name:14} {outcome.tried:6} {outcome.survived:8}  {killed:6}  {entries:14}  {seconds:7.1f}"
        print(line, flush=True)
    return outcomes


@contextmanager
def _mlflow(row: str) -> Iterator[tuple[str, MlflowServer | None]]:
    folder = Path(tempfile.mkdtemp(prefix="nvae-promotion-"))
    try:
        if row.startswith("sqlite"):
            uri = f"sqlite:///{folder}/mlflow.db"
            MlflowClient(uri).search_experiments()
            yield uri, None
        else:
            with serving(folder) as server:
                yield server.url, server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _raced(uri: str, racers: int, chance: random.Random, kill: bool) -> tuple[Outcome, int, int]:
    scores = [2 + n / racers for n in range(racers)]
    chance.shuffle(scores)
    # In a process of its own, so that none of the racers inherits a connection.
    run_id = _in_a_process(with_versions, uri, racers)
    killed = set(_race(uri, run_id, scores, chance, kill))
    again = Promotions(uri, NAME)
    again.settle(ALIAS)
    lines = again.history().lines
    entered = [int(line.entry.version) for line in lines if line.entry]
    finished = set(range(1, racers + 1)) - killed
    best = min(entered, key=lambda version: scores[version - 1])
    steps = [step.score or 0 for step in again.history().steps(ALIAS)]
    fine = (
        again.aliases() == {ALIAS: str(best)}
        and len(entered) == len(lines) == len(set(entered))
        and finished <= set(entered)
        and steps == sorted(steps, reverse=True)
    )
    return Outcome(racers, racers * fine), len(killed), len(entered)


def _race(uri: str, run_id: str, scores: Sequence[float], chance: random.Random, kill: bool) -> Iterator[int]:
    """Every version promoted by a process; the versions whose processes were killed."""
    context = multiprocessing.get_context("fork")
    waiting = list(range(1, len(scores) + 1))
    running: dict[int, tuple[BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            version = waiting.pop(0)
            racer = context.Process(target=attempt, args=(uri, run_id, version, scores[version - 1]))
            racer.start()
            doomed = kill and chance.random() < 1 / 3
            running[version] = racer, time.monotonic() + (chance.uniform(0, 3) if doomed else 600)
        for version, (racer, until) in list(running.items()):
            if time.monotonic() > until and racer.is_alive():
                racer.kill()
            if racer.exitcode is not None:
                del running[version]
                if racer.exitcode < 0:
                    yield version
                elif racer.exitcode:
                    raise RuntimeError(f"the promotion of version {version} failed")
        time.sleep(0.01)


def _away(uri: str, server: MlflowServer | None) -> Outcome:
    assert server is not None
    run_id = _in_a_process(with_versions, uri, 2)
    attempt(uri, run_id, 1, 4.0)
    promotions = Promotions(uri, NAME)
    before = promotions.history().lines, promotions.aliases()
    server.kill()
    entry = new_entry(PROMOTION, ALIAS, "2", "1", "1", basis=BASIS, score=3.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UnreachableError, match="cannot be used"):
        patch.setattr("pipeline.models.promotion.TRIES_SECONDS", 0.5)
        promotions.append(entry, run_id)
    server.start()
    untouched = (promotions.history().lines, promotions.aliases()) == before
    done = attempt(uri, run_id, 2, 3.0) == ACCEPTED and promotions.aliases() == {ALIAS: "2"}
    return Outcome(1, int(untouched and done))


def _in_a_process(make: Callable[[str, int], str], uri: str, count: int) -> str:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    process = context.Process(target=lambda: answers.put(make(uri, count)))
    process.start()
    answer = answers.get(timeout=300)
    process.join()
    return answer


if __name__ == "__main__":
    assert __doc__ is not None
    main: Callable[..., int] = campaign.command
    sys.exit(main("tests.faults.promotion", __doc__, ROWS, run, sys.argv[1:]))
