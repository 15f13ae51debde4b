"""Where outages of MLflow are tried: a store with a data set, a real server, a proxy in front of it.

Every outage is one that is seen to be there, and it ends only when the training has met it:
otherwise a training that is quick enough would pass through it unharmed, and prove nothing.
"""

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline import run as runs
from pipeline import run_folder
from pipeline.data import shards
from pipeline.training import checkpoint_writer, machine
from pipeline.training.run_description import status_of
from pipeline.training.tracking import replay
from pipeline.training.worker import LocalWorker
from tests.fault_proxy import FaultProxy
from tests.faults.tracking_witness import Witness
from tests.http_faults import Fault, Stall
from tests.injecting import Injecting
from tests.mlflow_server import MlflowServer, serving
from tests.tiny_run import IMAGES, YAML, Home, points

LOST_FOR_GOOD = 240.0
"""Seconds after which what is waited for will not come."""
_PROBE_SECONDS = 30.0
"""For a request of ours past the proxy, to a server that has other things to do."""
_NO_FILE_BEYOND = 4096
"""Bytes. MLflow's database is larger from the start, so that none of it can be written."""

Injections = Mapping[int, Callable[[Any], object]]


@dataclass
class Place:
    """The scenarios of one campaign work here one after the other."""

    home: Home
    server: MlflowServer
    proxy: FaultProxy
    random: random.Random
    names: set[tuple[str, int]]
    """(metric, images seen) of a training that nothing happens to, without what machine and writer say.

    The machine is looked at every few seconds, and saves end when they end: a log line may lack either."""
    witness: Witness = field(default_factory=Witness)
    """Of the scenario under way."""
    _met_of_server: int = 0

    @property
    def faults(self) -> int:
        """How many requests met the faults of the scenario under way."""
        return self.proxy.injected.total() + self._met_of_server

    def begin(self, witness: Witness) -> None:
        """For the next scenario: everything as it should be, however the last one ended."""
        self.proxy.reset()
        if not self.server_answers():
            self.server.kill()
            self.server.start()
        self.server.allow_files_of(-1)
        self.witness, self._met_of_server = witness, 0

    def moments(self) -> tuple[int, int]:
        """Images seen when an outage begins and when it ends; curves come in between, to be delivered."""
        log = self.home.config().cadence.log_images
        pairs = [(begin, end) for begin, end in combinations(range(4, 48, 4), 2) if begin // log < end // log]
        return self.random.choice(pairs)

    def train(self, name: str, **injections: Callable[[Any], object]) -> None:
        """A launch through the proxy. `at_16=f` calls f before the update that begins at 16 images."""
        at = {int(moment.removeprefix("at_")): action for moment, action in injections.items()}
        launch(self.home, self.proxy.url, name, at)

    def replay(self, name: str) -> None:
        url = self.home.run_url(name)
        record = run_folder.known_record(self.home.store, name)
        replay(url, self.proxy.url, status_of(record.state))

    # -- faults of all answers ------------------------------------------------------------

    def during(self, fault: Fault, name: str) -> None:
        """A launch with a fault of all answers between two moments; it ends when it was noticed."""
        begin, end = self.moments()
        self.train(name, **{f"at_{begin}": lambda _: self.fail(fault), f"at_{end}": lambda _: self.mend()})

    def fail(self, fault: Fault) -> None:
        self.proxy.add(fault)

    def mend(self) -> None:
        (rule,) = self.proxy.rules
        wait_until(lambda: rule.struck > 0, "a request that meets the fault")
        self.proxy.clear()

    def slow_answers(self, seconds: float, times: int, name: str) -> None:
        """A launch that goes on when so many answers were slow, and one of them was waited for."""
        begin, end = self.moments()

        def wait_for_them(_: Any) -> None:
            (rule,) = self.proxy.rules
            wait_until(lambda: rule.struck == times, f"{times} slow answers")
            wait_until(
                lambda: max(self.witness.answer_seconds, default=0.0) >= seconds,
                f"an answer after {seconds:.0f} s that was waited for",
            )

        slow = Stall(seconds)
        self.train(
            name,
            **{f"at_{begin}": lambda _: self.proxy.add(slow, times=times), f"at_{end}": wait_for_them},
        )

    # -- faults of the server itself ------------------------------------------------------

    def during_fault_of_server(
        self, name: str, fault: Callable[[], object], mend: Callable[[], object]
    ) -> None:
        """A launch with the server broken between two moments, until deliveries have failed of it."""
        begin, end = self.moments()
        before = 0

        def begin_it(_: Any) -> None:
            nonlocal before
            fault()
            before = len(self.witness.errors)

        def end_it(_: Any) -> None:
            wait_until(lambda: len(self.witness.errors) > before, "a delivery that meets the fault")
            mend()
            self._met_of_server += len(self.witness.errors) - before

        self.train(name, **{f"at_{begin}": begin_it, f"at_{end}": end_it})

    def kill_server(self) -> None:
        """Raises if it does not answer before, or does after."""
        assert self.server_answers(), "the server was not there to be killed"
        self.server.kill()
        assert not self.server_answers(), "the server was killed, and somebody answers"

    def start_server(self) -> None:
        """Raises if none was away."""
        assert not self.server_answers(), "a server answers that was never killed"
        self.server.start()
        assert self.server_answers(), "the server was started again, and nobody answers"

    def server_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.server.url}/health", timeout=_PROBE_SECONDS) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return True  # Not well, but there.
        except OSError:
            return False

    def fill_disk(self) -> None:
        """Raises if the server does not say that it cannot write."""
        self.server.allow_files_of(_NO_FILE_BEYOND)
        said = self._refusal_to_write()
        assert "disk" in said, f"with its disk full, the server says {said!r} to what has to be written"

    def make_room(self) -> None:
        self.server.allow_files_of(-1)
        said = self._refusal_to_write()
        assert not said, f"with room again, the server says {said!r} to what has to be written"

    def _refusal_to_write(self) -> str:
        """What the server answers to a tag of ours, past the proxy; "" if it took it."""
        tag = {"experiment_id": "0", "key": "probe", "value": str(time.time())}
        request = urllib.request.Request(
            f"{self.server.url}/api/2.0/mlflow/experiments/set-experiment-tag",
            json.dumps(tag).encode(),
            {"content-type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode(errors='replace')[:500]}"
        return ""


def launch(home: Home, tracking: str, name: str, at: Injections) -> None:
    """Train to the end in this process, with something done before the updates at so many images."""
    spec = runs.begin(home.prepare(name, tracking=tracking))
    with runs.running(spec) as end:
        run_folder.note_launch(spec.url, 1)
        end.update(runs.work(vars(spec), Injecting(LocalWorker(), at)))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Raises TimeoutError, with what was waited for, if it does not come true."""
    deadline = time.monotonic() + LOST_FOR_GOOD
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {LOST_FOR_GOOD:.0f} s in vain for {what}")
        time.sleep(0.05)


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
