"""Outages of MLflow under a real training: a real server behind a proxy, killed, slow, full, lying.

    python -m tests.faults.tracking_faults --seed 7

Each scenario trains a tiny run to its end. Survived is what MLflow has every point of once
in the end, with the state that the run is in, if the outage is seen to have been one: `faults`
are the requests that met it, and without any a scenario has failed. The seed chooses when outages
begin and end.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import registration, run_folder
from pipeline import run as runs
from tests.faults.tracking_place import LOST_FOR_GOOD, Injections, Place, launch, places
from tests.faults.tracking_witness import witnessed
from tests.http_faults import Fail, Request, Reset, Response
from tests.mlflow_server import history
from tests.tiny_run import points


@dataclass(frozen=True)
class Says(Fail):
    """A body of its own in place of the answer."""

    body: str = ""

    def response(self, request: Request) -> Response:
        headers = {"content-type": "text/html", "content-length": str(len(self.body))}
        return Response(self.status, "OK", headers, self.body.encode())


HTML = "<html><body>Please log in to the airport's network</body></html>"
TOO_MANY = Fail(429, "SlowDown", (("retry-after", "60"),))


@dataclass
class Counts:
    """What became of one scenario."""

    name: str
    tried: int = 0
    survived: int = 0
    faults: int = 0
    """Requests that met the outage."""
    points: int = 0
    lost: int = 0
    doubled: int = 0
    slowest_call_ms: float = 0.0
    """Of all calls that the training made of its tracker."""
    broken: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{self.name:34} {self.tried:5} {self.survived:8} {self.faults:6} {self.points:6} "
            f"{self.lost:4} {self.doubled:7} {self.slowest_call_ms:10.2f}"
        )


HEADING = f"{'outage':34} tried survived faults points lost doubled slowest_ms"


# -- scenarios --------------------------------------------------------------------------


def away_at_the_start(place: Place, name: str) -> None:
    _, end = place.moments()
    place.fail(Reset())
    place.train(name, **{f"at_{end}": lambda _: place.mend()})


def away_in_the_middle(place: Place, name: str) -> None:
    place.during(Reset(), name)


def away_to_the_end(place: Place, name: str) -> None:
    """Trained, but not registered; a replay delivers, and the same command registers."""
    begin, _ = place.moments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "PATIENCE_SECONDS", 2.0)
        place.train(name, **{f"at_{begin}": lambda _: place.fail(Reset())})
    place.mend()
    record = run_folder.known_record(place.home.store, name)
    assert record.state == "finished" and record.result["model"] is None
    place.replay(name)
    check(place, name, "FINISHED")
    place.train(name)
    assert run_folder.known_record(place.home.store, name).result["model"] is not None


def away_for_a_whole_launch(place: Place, name: str) -> None:
    place.fail(Reset())
    place.train(name, at_24=lambda worker: worker.stop())
    assert run_folder.known_record(place.home.store, name).state == "stopped"
    place.mend()
    place.train(name)


def killed_and_started_again(place: Place, name: str) -> None:
    place.during_fault_of_server(name, place.kill_server, place.start_server)


def half_a_minute_for_an_answer(place: Place, name: str) -> None:
    """Four of them: the time limit doubles three times before one comes in time."""
    place.slow_answers(30, 4, name)


def too_many_requests(place: Place, name: str) -> None:
    place.during(TOO_MANY, name)


def internal_errors(place: Place, name: str) -> None:
    place.during(Fail(500), name)


def html_of_a_proxy(place: Place, name: str) -> None:
    place.during(Says(200, body=HTML), name)


def yes_to_everything(place: Place, name: str) -> None:
    """Status 200 and valid JSON, of somebody who stores nothing."""
    place.during(Says(200, body="{}"), name)


def garbage_at_the_start(place: Place, name: str) -> None:
    _, end = place.moments()
    place.fail(Says(200, body='{"run": {"status": 7}}'))
    place.train(name, **{f"at_{end}": lambda _: place.mend()})


def answers_that_never_arrive(place: Place, name: str) -> None:
    """Three requests in ten are served, and their answers lost: nobody knows what was stored."""
    place.proxy.add(Reset(after=0), probability=0.3)
    # The registry, at the end, is another matter: it needs many answers in a row.
    place.train(name, at_44=lambda _: place.mend())


def full_disk_of_the_server(place: Place, name: str) -> None:
    place.during_fault_of_server(name, place.fill_disk, place.make_room)


def trainings_killed_in_an_outage(place: Place, name: str) -> None:
    """SIGKILL in the middle of three launches, MLflow away in the second; then one to the end.

    Each is a process in a working directory of its own, as on another machine.
    """
    moments = sorted(place.random.sample(range(4, 48, 4), 3))
    for number, moment in enumerate(moments):
        if number == 1:
            place.fail(Reset())
        if number == 2:
            place.mend()
        # Whatever its courier is doing at that time.
        ended = _launch_elsewhere(place, name, {moment: partial(_die, place.random.uniform(0, 3))})
        assert ended == -signal.SIGKILL, f"the launch to be killed at {moment} images ended with {ended}"
    assert _launch_elsewhere(place, name, {}) == 0


def _die(after_seconds: float, worker: Any) -> None:
    time.sleep(after_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _launch_elsewhere(place: Place, name: str, at: Injections) -> int | None:
    """The exit code of a process that trains, with `at` as for `launch`."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=_launch_in, args=(folder, place.home, place.proxy.url, name, at), daemon=True
        )
        process.start()
        process.join(LOST_FOR_GOOD)
        process.kill()  # It has ended, or never will.
        process.join()
        return process.exitcode


def _launch_in(folder: str, *arguments: Any) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    launch(*arguments)


SCENARIOS = (
    away_at_the_start,
    away_in_the_middle,
    away_to_the_end,
    away_for_a_whole_launch,
    killed_and_started_again,
    half_a_minute_for_an_answer,
    too_many_requests,
    internal_errors,
    html_of_a_proxy,
    yes_to_everything,
    garbage_at_the_start,
    answers_that_never_arrive,
    full_disk_of_the_server,
    trainings_killed_in_an_outage,
)


# -- what is counted --------------------------------------------------------------------


def check(place: Place, name: str, status: str, counts: Counts | None = None) -> None:
    """Asserts that MLflow has every point of the journal once, and the run's state."""
    journal = points(place.home.run_url(name))
    client = MlflowClient(place.server.database)
    experiment = client.get_experiment_by_name(runs.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    there = history(place.server.database, run.info.run_id)
    stored = [(metric, at) for metric, curve in there.items() for at, _ in curve]
    lost, doubled = len(journal.keys() - set(stored)), len(stored) - len(set(stored))
    if counts is not None:
        counts.points, counts.lost, counts.doubled = len(journal), lost, doubled
    assert (lost, doubled) == (0, 0)
    assert run.info.status == status
    assert set(journal) == set(stored)


def attempt(place: Place, scenario: Callable[[Place, str], None]) -> Counts:
    """One scenario, counted."""
    name = scenario.__name__.replace("_", "-")
    counts = Counts(scenario.__name__.replace("_", " "), tried=1)
    with witnessed() as witness:
        try:
            place.begin(witness)
            scenario(place, name)
            assert place.faults, "not tried: no request met the outage"
            check(place, name, "FINISHED", counts)
            missing = place.names - points(place.home.run_url(name)).keys()
            assert not missing, f"the journal lacks {len(missing)} points"
        except (Exception, pytest.fail.Exception) as error:
            counts.broken.append(f"{type(error).__name__}: {str(error)[:500]}")
        else:
            counts.survived = 1
    counts.faults = place.faults
    counts.slowest_call_ms = 1000 * max(witness.call_seconds, default=0.0)
    return counts


def run(seed: int, names: Sequence[str] = ()) -> list[Counts]:
    """Every scenario, or those named; prints a line for each as soon as it is there."""
    print(HEADING, flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="nvae-faults-") as folder, places(Path(folder), seed) as place:
        for scenario in SCENARIOS:
            if names and scenario.__name__ not in names:
                continue
            outcomes.append(attempt(place, scenario))
            print(outcomes[-1].line(), flush=True)
            for what in outcomes[-1].broken:
                print(f"     NOT SURVIVED: {what}", flush=True)
    return outcomes


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    known = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("--only", default=",".join(known), help=f"some of {','.join(known)}")
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no outages {', '.join(unknown)}; there are {', '.join(known)}")
    # For tiny models: on a busy machine several threads wait for each other most of the time.
    torch.set_num_threads(1)
    outcomes = run(asked.seed, names)
    return int(any(counts.survived < counts.tried for counts in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
