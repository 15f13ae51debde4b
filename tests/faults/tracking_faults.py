"""Outages of MLflow under a real training: a real server behind a proxy, killed, slow, full, lying.

    python -m tests.faults.tracking_faults --seed 7

Each scenario trains a tiny run to its end. Survived is what MLflow has every point of once
in the end, with the state that the run is in. The seed chooses when outages begin and end.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import registration, run_folder
from pipeline import run as runs
from pipeline.data import shards
from pipeline.training import checkpoint_writer, machine
from pipeline.training.run_description import status_of
from pipeline.training.tracking import RunTracker, replay
from pipeline.training.worker import LocalWorker
from tests.fault_proxy import Fail, Fault, FaultProxy, Request, Reset, Response, Stall
from tests.injecting import Injecting
from tests.mlflow_server import MlflowServer, history, serving
from tests.tiny_run import IMAGES, YAML, Home, points

LOST_FOR_GOOD = 240.0
"""Seconds after which what is waited for will not come."""
Injections = Mapping[int, Callable[[Any], object]]


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
    points: int = 0
    lost: int = 0
    doubled: int = 0
    slowest_call_ms: float = 0.0
    """Of all calls that the training made of its tracker."""
    broken: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{self.name:34} {self.tried:5} {self.survived:8} {self.points:6} {self.lost:4} {self.doubled:7} "
            f"{self.slowest_call_ms:10.2f}"
        )


HEADING = f"{'outage':34} tried survived points lost doubled slowest_ms"


@dataclass
class Place:
    """Where scenarios work: a store with a data set, a server, a proxy in front of it."""

    home: Home
    server: MlflowServer
    proxy: FaultProxy
    random: random.Random
    names: set[tuple[str, int]]
    """(metric, images seen) of a training that nothing happens to, without what machine and writer say.

    The machine is looked at every few seconds, and saves end when they end: a log line may lack either."""

    def moments(self) -> tuple[int, int]:
        """Images seen when an outage begins and when it ends."""
        begin, end = sorted(self.random.sample(range(4, 48, 4), 2))
        return begin, end

    def train(self, name: str, **injections: Callable[[Any], object]) -> None:
        """A launch through the proxy. `at_16=f` calls f before the update that begins at 16 images."""
        at = {int(moment.removeprefix("at_")): action for moment, action in injections.items()}
        launch(self.home, self.proxy.url, name, at)

    def replay(self, name: str) -> None:
        url = self.home.run_url(name)
        record = run_folder.known_record(self.home.store, name)
        replay(url, self.proxy.url, status_of(record.state))

    def during(self, fault: Fault, name: str) -> None:
        """A launch with a fault of all answers between two moments; it ends when it was noticed."""
        begin, end = self.moments()
        self.train(name, **{f"at_{begin}": lambda _: self.fail(fault), f"at_{end}": lambda _: self.mend()})

    def fail(self, fault: Fault) -> None:
        self.proxy.add(fault)

    def mend(self) -> None:
        (rule,) = self.proxy.rules
        wait_until(lambda: rule.struck > 0)
        self.proxy.clear()


def launch(home: Home, tracking: str, name: str, at: Injections) -> None:
    """Train to the end in this process, with something done before the updates at so many images."""
    spec = runs.begin(home.prepare(name, tracking=tracking))
    with runs.running(spec) as end:
        run_folder.note_launch(spec.url, 1)
        end.update(runs.work(vars(spec), Injecting(LocalWorker(), at)))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LOST_FOR_GOOD
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


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
    begin, end = place.moments()
    place.train(
        name,
        **{f"at_{begin}": lambda _: place.server.kill(), f"at_{end}": lambda _: place.server.start()},
    )


def half_a_minute_for_an_answer(place: Place, name: str) -> None:
    """Four of them: the time limit doubles three times before one comes in time."""
    begin, _ = place.moments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTracker.close, "__defaults__", (3 * LOST_FOR_GOOD,))
        place.train(name, **{f"at_{begin}": lambda _: place.proxy.add(Stall(30), times=4)})


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
    begin, end = place.moments()

    def make_room(_: Any) -> None:
        time.sleep(3)  # Time for the courier to meet it; nothing tells when it has.
        place.server.allow_files_of(-1)

    place.train(name, **{f"at_{begin}": lambda _: place.server.allow_files_of(4096), f"at_{end}": make_room})


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
    place.proxy.reset()
    with timed_calls() as seconds:
        try:
            scenario(place, name)
            check(place, name, "FINISHED", counts)
            missing = place.names - points(place.home.run_url(name)).keys()
            assert not missing, f"the journal lacks {len(missing)} points"
        except (Exception, pytest.fail.Exception) as error:
            counts.broken.append(f"{type(error).__name__}: {str(error)[:500]}")
        else:
            counts.survived = 1
    counts.slowest_call_ms = 1000 * max(seconds, default=0.0)
    return counts


@contextmanager
def timed_calls() -> Iterator[list[float]]:
    """The seconds that each call of a tracker takes, while it is used as ever."""
    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds.append(time.perf_counter() - began)

        return measured

    with pytest.MonkeyPatch.context() as patch:
        for name in ("log", "picture", "tag", "status"):
            patch.setattr(RunTracker, name, timed(getattr(RunTracker, name)))
        yield seconds


@contextmanager
def places(folder: Path, seed: int) -> Iterator[Place]:
    """A place for any number of scenarios."""
    home = Home(folder)
    Path(home.yaml).write_text(YAML)
    shards.build(f"portraits:{IMAGES}", f"{home.store}/data/tiny", image_size=16, validation_fraction=0.25)
    with (
        serving(folder / "mlflow") as server,
        FaultProxy(server.url, seed) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        place = Place(home, server, proxy, random.Random(seed), set())
        place.train("undisturbed")
        noted = points(home.run_url("undisturbed"))
        # Not those that come when the clock or the background wants it.
        by_chance = {*machine.NAMES, *checkpoint_writer.NAMES}
        place.names.update(point for point in noted if point[0] not in by_chance)
        yield place


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
    parser.add_argument("--only", default="", help="scenarios, by their names")
    asked = parser.parse_args(arguments)
    # For tiny models: on a busy machine several threads wait for each other most of the time.
    torch.set_num_threads(1)
    outcomes = run(asked.seed, [name for name in asked.only.split(",") if name])
    return int(any(counts.survived < counts.tried for counts in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
