"""U2: `nvae tune` is killed at random moments, again and again; the same command finishes the search.

    python -m tests.faults.search --seed 7

Each row is one search on this machine, two trials at a time, whose driver gets SIGKILL at moments
drawn by chance: while Ray starts, while trials train, save, are registered, or are drawn. With
random and grid search every trial that comes out must be that of a search that nobody touched: the
same draws and the same scores to the last bit. With TPE and ASHA, whose decisions depend on the order
in which trials end, every number must be there once and have ended, each evaluation once. While it
goes on, no more than two trials hold a lease.
"""

import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import lease
from pipeline.data import shards
from pipeline.record_file import RecordError
from pipeline.search import ledger as ledgers
from pipeline.search.ledger import UNFINISHED, Trial
from tests.cluster.processes import command as nvae_command
from tests.faults import campaign
from tests.tiny_run import YAML, Home

CONCURRENT = 2
STEP, TOTAL = 40, 800
SEARCH = """
run: tiny.yaml
settings:
  train: {{total_images: {total}}}
  cadence: {{evaluate_images: {step}, log_images: {step}, checkpoint_images: {step}}}
  objective: {{kl_warmup_fraction: 0.0}}
search: {{searcher: {searcher}, scheduler: {scheduler}, random_trials: 3, reduction_factor: 2}}
space:
  objective.spectral_coefficient: {coefficients}
  model.groups_per_scale: {{total: {{integer: [2, 4]}}, skew: {skews}}}
"""
LONGEST_SECONDS = 20.0
"""Until a kill, from the start or from the first evaluation of this launch on."""


@dataclass(frozen=True)
class Row:
    """One kind of search."""

    name: str
    searcher: str
    scheduler: str
    coefficients: str
    skews: str
    trials: int
    kills: int


ROWS = {
    row.name: row
    for row in (
        Row("random", "random", "none", "{log_uniform: [1.0e-4, 1]}", "{uniform: [0, 2]}", 6, 4),
        Row("grid", "grid", "none", "{choice: [0.001, 0.1]}", "{choice: [0, 2]}", 12, 3),
        Row("tpe", "tpe", "asha", "{log_uniform: [1.0e-4, 1]}", "{uniform: [0, 2]}", 8, 3),
    )
}


@dataclass
class Outcome:
    """How a row ended: kills, and how many of them the search survived."""

    tried: int
    survived: int


class Leases:
    """How many trials of a search are being trained, looked at all the time."""

    def __init__(self, home: Home, name: str, trials: int) -> None:
        self.most = 0
        self._urls = [home.run_url(ledgers.run_name(name, number)) for number in range(1, trials + 1)]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.3):
            self.most = max(self.most, sum(lease.holder(url) is not None for url in self._urls))


def run(names: Sequence[str], seed: int, short: bool) -> list[Outcome]:
    print(f"{'row':8} {'kills':>6} {'survived':>8}  lost  doubled  at a time  seconds until it trains again")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="nvae-search-") as folder, pytest.MonkeyPatch.context() as patch:
        for variable in ("NVAE_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        patch.chdir(folder)
        home = Home(Path(folder))
        Path(home.yaml).write_text(YAML)
        shards.build("portraits:24", f"{home.store}/data/tiny", image_size=16, validation_fraction=0.25)
        for name in names:
            outcomes.append(_row(home, ROWS[name], random.Random(f"{seed}/{name}"), short))
    return outcomes


def _row(home: Home, row: Row, chance: random.Random, short: bool) -> Outcome:
    file = home.folder / f"{row.name}.yaml"
    file.write_text(
        SEARCH.format(
            total=TOTAL,
            step=STEP,
            searcher=row.searcher,
            scheduler=row.scheduler,
            coefficients=row.coefficients,
            skews=row.skews,
        )
    )
    kills, pauses = 0, []
    arguments = ["tune", str(file), "--trials", str(row.trials), "--concurrent", str(CONCURRENT)]
    with Leases(home, row.name, row.trials) as leases:
        for _ in range(1 if short else row.kills):
            was_killed, pause = _killed(home, row, arguments, chance)
            kills, pauses = kills + was_killed, pauses + pause
        _finished(arguments)
    found = ledgers.read_trials(ledgers.folder(home.store, row.name))
    lost = set(range(1, row.trials + 1)) - {trial.number for trial in found if trial.state not in UNFINISHED}
    doubled = [trial.number for trial in found if not _once(trial)]
    fine = not lost and not doubled and leases.most == CONCURRENT
    if row.searcher in ("random", "grid"):
        _finished([*arguments, "--name", f"{row.name}-untouched"])
        untouched = ledgers.read_trials(ledgers.folder(home.store, f"{row.name}-untouched"))
        fine = fine and list(map(_facts, found)) == list(map(_facts, untouched))
    again = ", ".join(f"{pause:.0f}" for pause in pauses)
    line = (
        f"{row.name:8} {kills:6} {kills * fine:8}  {len(lost):4}  {len(doubled):7}  {leases.most:9}  {again}"
    )
    print(line, flush=True)
    return Outcome(kills, kills * fine)


def _killed(
    home: Home, row: Row, arguments: Sequence[str], chance: random.Random
) -> tuple[bool, list[float]]:
    """One launch, killed unless it was over by then: one in four while it starts, others while it trains.

    Returns whether it was killed, and how long it had taken to evaluate anything, if it had.
    """
    url, began = ledgers.folder(home.store, row.name), time.monotonic()
    amid_the_start, seconds = chance.random() < 0.25, chance.uniform(0, LONGEST_SECONDS)
    before, pause = _evaluations(url), []
    with nvae_command(*arguments) as searching:
        while not searching.ended:
            if not pause and _evaluations(url) > before:
                pause.append(time.monotonic() - began)
            since = began if amid_the_start else began + pause[0] if pause else math.inf
            if time.monotonic() - since >= seconds:
                break
            time.sleep(0.2)
        return not searching.ended, pause


def _finished(arguments: Sequence[str]) -> None:
    with nvae_command(*arguments) as searching:
        if searching.wait(900) != 0:
            raise RuntimeError(searching.said)


def _evaluations(url: str) -> int:
    try:
        return sum(len(trial.evaluations) for trial in ledgers.read_trials(url))
    except RecordError:
        return 0  # being written


def _once(trial: Trial) -> bool:
    """Whether it was evaluated at each of its places once, up to its end."""
    places = [each.images_seen for each in trial.evaluations]
    last = TOTAL if trial.state == "finished" else places[-1] if places else 0
    return trial.state in ("finished", "pruned") and places == list(range(STEP, last + 1, STEP))


def _facts(trial: Trial) -> tuple[object, ...]:
    scores = tuple((each.images_seen, each.bits_per_dim) for each in trial.evaluations)
    return trial.number, dict(trial.drawn), dict(trial.settings), trial.state, scores


if __name__ == "__main__":
    assert __doc__ is not None
    main: Callable[..., int] = campaign.command
    sys.exit(main("tests.faults.search", __doc__, ROWS, run, sys.argv[1:]))
