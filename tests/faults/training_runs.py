"""Real trainings for the campaign: started as a user starts them, watched and killed from outside.

Every process that a row starts, and whatever these start, carries a mark in its environment, by
which all of them are found again and ended when the row is over. Every wait has a limit and says
what it waited for.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from pipeline import run_folder
from pipeline.config import RunConfig
from pipeline.data import shards
from pipeline.data.index import Index, load_index
from pipeline.training.checkpoint import images_saved, newest
from tests.faults.injection import Row
from tests.faults.training_notes import History, Notes, history
from tests.tiny_run import YAML, Home

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.faults.training_entry"
MARK = "NVAE_FAULTS_MARK"
BATCH = 4
CHECKPOINT_UPDATES = 40
START_SECONDS = 240.0
"""Longest wait for a launch to make its first update, on a machine that has other things to do."""
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class TrainingRow(Row):
    """One line of the table: what became of the images, and how soon training went on."""

    history: History | None = None
    """None: the fault leaves no history to compare."""
    recoveries: tuple[float, ...] = ()
    """Seconds from each fault to the first update after it."""
    untried: str = ""
    """Why nothing could be tried here."""

    def with_more(self, measured: str) -> "TrainingRow":
        return replace(self, measured=f"{self.measured}; {measured}")

    def line(self, seconds: float) -> str:
        lost = f"{self.history.lost:5,} {self.history.repeated:8,}" if self.history else f"{'':14}"
        median, worst = "", ""
        if self.recoveries:
            median, worst = f"{statistics.median(self.recoveries):.1f}", f"{max(self.recoveries):.1f}"
        return (
            f"{self.id:4} {self.tried:6,} {self.survived:8,} {lost} {median:>8} {worst:>6} {seconds:7.1f}  "
            f"{self.fault}: {f'NOT TRIED: {self.untried}' if self.untried else self.measured}"
        )


HEADING = (
    f"{'id':4} {'tried':>6} {'survived':>8} {'lost':>5} {'repeated':>8} {'recovery':>8} {'worst':>6} "
    f"{'seconds':>7}  fault: measured"
)


@dataclass
class Place:
    """Where a row works: a folder of its own, with a store that holds the data set `store:tiny`."""

    home: Home
    seed: int
    short: bool

    @property
    def folder(self) -> Path:
        return self.home.folder

    @property
    def index(self) -> Index:
        return load_index(f"{self.home.store}/data/tiny")


@contextmanager
def place(seed: int, short: bool) -> Iterator[Place]:
    """A place for one row, marked in this process's environment, which all that it starts inherit.

    Nothing of it is left behind, neither files nor processes.
    """
    mark = uuid4().hex
    with (
        tempfile.TemporaryDirectory(prefix="nvae-faults-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="nf", ignore_cleanup_errors=True) as ray_folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name in ("NVAE_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.delenv(name, raising=False)
        own = {MARK: mark, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"}
        for name, value in own.items():
            environment.setenv(name, value)
        home = Home(Path(folder))
        Path(home.yaml).write_text(YAML)
        shards.build("portraits:61", f"{home.store}/data/tiny", image_size=16, validation_count=6)
        try:
            yield Place(home, seed, short)
        finally:
            end_all(mark)


def marked(mark: str) -> list[int]:
    """The processes that were started with a mark; the dead that nobody has buried are none."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def end_all(mark: str) -> None:
    """Kill every process that carries the mark, until there is none."""

    def none_left() -> bool:
        pids = marked(mark)
        for pid in pids:
            kill(pid)
        return not pids

    wait_until(none_left, "the processes of the row to be gone", 60)


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Raises TimeoutError, with what was waited for, if it did not come true in that time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(POLL_SECONDS)


def small_updates(updates: int) -> tuple[str, ...]:
    """A training of so many small updates, with a checkpoint now and then."""
    return (
        f"data.lanes={BATCH}",
        f"train.total_images={updates * BATCH}",
        f"cadence.checkpoint_images={CHECKPOINT_UPDATES * BATCH}",
        f"cadence.log_images={CHECKPOINT_UPDATES * BATCH}",
        f"cadence.evaluate_images={updates * BATCH}",
    )


class Training:
    """`nvae train` of one run in processes of its own, as often as it is started; it takes notes."""

    def __init__(
        self, place: Place, name: str, *settings: str, workers: str = "2", store: str | None = None
    ) -> None:
        """`store` is another than that of the place, whose data set it reads all the same."""
        self.place, self.name, self.workers = place, name, workers
        self.store = store or place.home.store
        elsewhere = f"data.root={place.home.store}/data/tiny"
        self.settings = (elsewhere, *settings) if store else settings
        self.folder = place.folder / f"notes-{name}"
        self.folder.mkdir()
        self.notes = Notes(self.folder)
        self.output = place.folder / f"{name}.out"
        self.driver: subprocess.Popen[bytes] | None = None
        self.stopped_at: int | None = None
        """Images seen when it was stopped for good."""

    @property
    def run_url(self) -> str:
        return run_folder.folder(self.store, self.name)

    def start(self, *more: str, **environment: str) -> None:
        """Begin, or go on."""
        words = ["tiny.yaml", "--name", self.name, "--store", self.store, *self.settings, *more]
        if not any(word in ("--local", "--workers") for word in words):
            words += ["--workers", self.workers]
        with self.output.open("ab") as out:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(self.folder), "train", *words],
                cwd=self.place.folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Until the condition holds; raises if the driver ends before, or it takes too long."""
        assert self.driver is not None

        def held_or_ended() -> bool:
            ended = self.driver is not None and self.driver.poll() is not None
            if ended and not condition():
                raise RuntimeError(f"the training ended before {what}: {self.last_words()}")
            return ended or condition()

        try:
            wait_until(held_or_ended, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it said: {self.last_words()}") from None

    def wait_for_images(self, images: int, seconds: float = START_SECONDS) -> None:
        self.wait_for(lambda: self.notes.read().images_seen() >= images, f"{images} images", seconds)

    def wait_for_update(self, moment: float, launch: int) -> float:
        """Seconds from the moment to the first update by a later launch."""
        self.wait_for(
            lambda: self.notes.read().first_update_after(moment, launch) is not None,
            "an update of a new launch",
        )
        found = self.notes.first_update_after(moment, launch)
        assert found is not None
        return found - moment

    def finish(self, seconds: float = 600.0) -> None:
        """Wait for the end; raises if it is not a good one."""
        assert self.driver is not None
        try:
            code = self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for the end: {self.last_words()}") from None
        if code:
            raise RuntimeError(f"the training ended with {code}: {self.last_words()}")
        self.notes.read()

    def stop(self) -> None:
        """End it in order before its time."""
        assert self.driver is not None
        self.driver.terminate()
        self.finish()
        self.stopped_at = images_saved(self.run_url)

    def kill_driver(self) -> float:
        """SIGKILL of the driver; returns when that was."""
        assert self.driver is not None
        moment = time.monotonic()
        self.driver.kill()
        # Its entry in the table of processes must be gone, too: the lease looks there.
        self.driver.wait(60)
        return moment

    def last_words(self) -> str:
        return self.output.read_text(errors="replace")[-1500:]

    @property
    def config(self) -> RunConfig:
        return self.place.home.config(*self.settings)

    def history(self) -> History:
        """What led to the final weights, beside the plan."""
        return history(self.notes.read(), self.config, self.place.index, self.stopped_at)


def weights(run_url: str) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run: model, averages, optimizer."""
    checkpoint = newest(run_url)
    assert checkpoint is not None, f"{run_url} has no checkpoint"
    names = [name.removesuffix(".safetensors") for name in checkpoint.manifest.files]
    return {f"{name}/{key}": tensor for name in names for key, tensor in checkpoint.load(name).items()}


def distance(one: str, other: str) -> float:
    """Largest absolute difference between the newest checkpoints of two runs; inf if any is nan."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    unequal = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    differences = [
        (mine[key].double() - theirs[key].double()).abs().nan_to_num(float("inf")) for key in unequal
    ]
    return max((float(difference.max()) for difference in differences), default=0.0)
