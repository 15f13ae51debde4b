"""A trial of a search: an ordinary run, trained where Ray Tune puts it.

A trial of one worker trains in a thread of Tune's own actor, which is used for one trial after the
other, so that starting a process and importing torch does not eat the budget; a trial of several
workers starts Ray Train from there. Either way it is the same run as that of `nvae train`: of its
own name, with its own lease, checkpoints, curves and recovery, and it continues when it is started
again.

After each evaluation a trial of one worker waits until the scheduler has decided, a matter of
milliseconds, so that one that is pruned makes one update more at most. With several workers the
news travels by the board and the training goes on meanwhile.
"""

import gc
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from ray import tune

from cluster.launch import entry_point, launch
from pipeline import lease, progress, run, run_folder
from pipeline.config import RunConfig
from pipeline.preparation import Prepared, prepare
from pipeline.search import ledger
from pipeline.search.definition import Definition
from pipeline.search.ledger import State, Trial
from pipeline.training.checkpoint import BEST_METRIC, images_saved
from pipeline.training.journal import StoredJournal, decode
from pipeline.training.latest import newest_line
from pipeline.training.run_description import PARENT_TAG
from pipeline.training.watchdog import Limits, watched
from pipeline.training.worker import TRAINING_SECONDS, LocalWorker, Poll
from pipeline.width import Workers

IMAGES, BITS, SECONDS = "images_seen", "bits_per_dim", "device_seconds"
WORST = 1.0e6
"""Bits per dimension that Tune is told in the place of what is no number: it has no use for those."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "OutOfMemoryError")
_LOOK_SECONDS = 1.0
_LEASE_SECONDS = 120.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common."""

    name: str
    url: str
    """The search's folder."""
    store: str
    tracking: str
    definition: Definition
    workers: int
    """Of each trial."""
    mlflow_run_id: str
    """The search's own MLflow run, under which those of its trials stand; "" if it is not known."""
    entry: str
    """What each worker of a trial executes, as `launch` takes it."""


def trainable(shared: Shared) -> type[tune.Trainable]:
    """What Tune runs. The settings of a trial are in the store, under the number that Tune passes on."""

    class Trial(_TrialActor):
        given = shared

    return Trial


class _TrialActor(tune.Trainable):  # type: ignore[misc]
    given: Shared

    def setup(self, config: Mapping[str, Any]) -> None:
        threading.Thread(target=_end_with, args=(os.getppid(),), name="node", daemon=True).start()
        self._training = TrialTraining(self.given, config["number"])

    def reset_config(self, config: Mapping[str, Any]) -> bool:
        """The next trial, in this process."""
        self._training.leave()
        self._training = TrialTraining(self.given, config["number"])
        return True

    def step(self) -> Result:
        return self._training.next()

    def cleanup(self) -> None:
        self._training.leave()


def _end_with(raylet: int) -> None:
    """End this process when that of its node is gone.

    Ray would let the task at hand end first, and here that is the wait for an evaluation: nobody
    would hear of it, and the trial's lease would be held for ever.
    """
    while os.getppid() == raylet:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


class TrialTraining:
    """The training of one trial, in a thread that waits after each evaluation to be asked for the next."""

    def __init__(self, shared: Shared, number: int) -> None:
        self._shared = shared
        self._number = number
        self._results: queue.Queue[Result] = queue.Queue()
        self._wanted = threading.Event()
        self._leaving = False
        self._thread = threading.Thread(target=self._train, name=f"trial {number}", daemon=True)
        self._thread.start()

    def next(self) -> Result:
        """The next evaluation, or how the trial ended: `done` is true then."""
        self._wanted.set()
        return self._results.get()

    def leave(self) -> None:
        """End the training in order: it saves a checkpoint, if it is not over yet."""
        self._leaving = True
        self._wanted.set()
        if self._shared.workers > 1 and self._thread.is_alive():
            run_folder.request_stop(self._run_url)
        self._thread.join()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _run_name(self) -> str:
        return ledger.run_name(self._shared.name, self._number)

    @property
    def _run_url(self) -> str:
        return run_folder.folder(self._shared.store, self._run_name)

    def _train(self) -> None:
        try:
            end = self._run()
            state, reason = _ended(end)
            model = end.get("result", {}).get("model")
        except Exception as error:
            state, reason, model = *failure(error), None
        self._results.put({"done": True, "state": state, "reason": reason, "model": model})

    def _run(self) -> dict[str, Any]:
        shared = self._shared
        trial = ledger.read_trial(shared.url, self._number)
        self._clock = _Clock(trial, self._run_url, shared.workers)
        for images_seen, bits in missed(self._run_url, trial):
            self._tell(images_seen, bits, self._clock.estimate(images_seen))
        if self._leaving:
            return {"state": "stopped", "reason": ""}
        prepared = prepare(
            trial_config(shared, trial),
            name=self._run_name,
            store_url=shared.store,
            tracking_uri=shared.tracking,
            workers=Workers(shared.workers, shared.workers),
        )
        tags = {"search": shared.name, "search.trial": str(self._number)}
        if shared.mlflow_run_id:
            tags[PARENT_TAG] = shared.mlflow_run_id
        with _held(prepared.url):
            spec = run.begin(prepared, tags, trial=f"{shared.name}/{self._number}")
            with run.running(spec) as end:
                work = self._work_here if shared.workers == 1 else self._work_on_workers
                end.update(work(prepared, spec))
        return end

    def _work_here(self, prepared: Prepared, spec: run.RunSpec) -> dict[str, Any]:
        run_folder.note_launch(spec.url, 1)
        limits = Limits.of(prepared.config.train)
        with (
            Poll(partial(run_folder.stop_requested, spec.url)) as asked,
            _TrialWorker(self._decided, lambda: self._leaving or asked()) as worker,
            watched(worker.pulse, limits, spec.url, progress.say),
        ):
            self._clock.begin()
            return entry_point(self._shared.entry)(asdict(spec), worker)

    def _work_on_workers(self, prepared: Prepared, spec: run.RunSpec) -> dict[str, Any]:
        def starting(workers: int, kind: str) -> None:
            run_folder.note_launch(spec.url, workers)
            self._clock.begin()

        return launch(
            self._shared.entry,
            asdict(spec),
            widths=prepared.widths,
            run_url=spec.url,
            say=progress.say,
            progress=partial(images_saved, spec.url),
            starting=starting,
            heard=self._noted,
            limits=Limits.of(prepared.config.train),
        )

    def _noted(self, evaluation: Mapping[str, float]) -> None:
        """An evaluation of several workers, which train on."""
        if BEST_METRIC in evaluation:
            seconds = self._clock.read(evaluation[TRAINING_SECONDS])
            self._results.put(_result(evaluation["images_seen"], evaluation[BEST_METRIC], seconds))

    def _decided(self, evaluation: Mapping[str, float], alive: Callable[[], None]) -> None:
        """An evaluation of this process, which trains on when the next one is asked for."""
        if BEST_METRIC in evaluation:
            seconds = self._clock.read(evaluation[TRAINING_SECONDS])
            with self._clock.waiting():
                self._tell(evaluation["images_seen"], evaluation[BEST_METRIC], seconds, alive)

    def _tell(
        self, images_seen: float, bits: float, seconds: float, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Pass an evaluation on, and wait for the next question."""
        self._wanted.clear()
        self._results.put(_result(images_seen, bits, seconds))
        while not self._wanted.wait(_LOOK_SECONDS):
            alive()


@contextmanager
def _held(run_url: str) -> Iterator[None]:
    """The run's lease; who held it before may take a moment to die with the search it belonged to."""
    limit = time.monotonic() + _LEASE_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lease.held(run_url, progress.say))
                break
            except lease.LeaseError:
                if time.monotonic() > limit:
                    raise
                time.sleep(_LOOK_SECONDS)
        yield


def _result(images_seen: float, bits: float, seconds: float) -> Result:
    finite = bits if math.isfinite(bits) else WORST
    return {IMAGES: int(images_seen), BITS: min(finite, WORST), SECONDS: seconds}


def trial_config(shared: Shared, trial: Trial) -> RunConfig:
    """The settings of a trial's run; its model is a version of the search's own."""
    named = {} if shared.definition.base.registry.name else {"registry.name": f"nvae-{shared.name}"}
    return shared.definition.with_settings({**trial.settings, **named})


def missed(run_url: str, trial: Trial) -> Iterator[tuple[int, float]]:
    """Evaluations that the run's journal has and the ledger has not: (images seen, bits/dim).

    There are some if the driver was killed, or lost, just after one.
    """
    journal = StoredJournal(run_url)
    found = {
        int(entry.body["at"]): float(entry.body["values"][BEST_METRIC])
        for segment in journal.segments()
        for entry in decode(journal.read(segment))
        if entry.kind == "metrics" and BEST_METRIC in entry.body["values"]
    }
    known = trial.last.images_seen if trial.last else 0
    yield from sorted((at, bits) for at, bits in found.items() if at > known)


def failure(error: Exception) -> tuple[State, str]:
    """What an error says of a trial, and the reason in a line."""
    text = f"{type(error).__name__}: {error}"
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return "out_of_memory", first or type(error).__name__
    if "hangs at" in text or "has not been heard of" in text:
        return "hung", first
    return "failed", f"{type(error).__name__}: {first}".removesuffix(": ")


def _ended(end: Mapping[str, Any]) -> tuple[State, str]:
    """A run's end as that of a trial, and why."""
    if end["state"] in ("finished", "diverged"):
        return end["state"], end["reason"]
    return "stopped", end["reason"] or "asked to stop"


class _TrialWorker(LocalWorker):
    """The only worker of a trial, in this process."""

    def __init__(
        self,
        decided: Callable[[Mapping[str, float], Callable[[], None]], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        super().__init__(asked_to_stop=asked_to_stop)
        self._decided = decided

    def report(self, metrics: Mapping[str, float]) -> None:
        told = {**metrics, TRAINING_SECONDS: self.pulse.training_seconds}
        self._decided(told, self.pulse.alive)


class _Clock:
    """Device time that a training has taken, of all its devices, as if it had never been broken off.

    What a run has to do again after a crash does not count: trials are compared by this time, and
    none of them is to blame for a lost node. What it had taken up to its checkpoint follows from its
    speed before; nor does it count how long the scheduler was waited for.
    """

    def __init__(self, trial: Trial, run_url: str, devices: int) -> None:
        self._trial, self._run_url, self._devices = trial, run_url, devices
        self._before = self._waited = 0.0

    def begin(self) -> None:
        """The training is about to start, or to go on from its newest checkpoint."""
        self._before = self.estimate(images_saved(self._run_url))

    def read(self, training_seconds: float) -> float:
        """Device-seconds when the training of this start has lasted so long."""
        return self._before + self._devices * (training_seconds - self._waited)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def estimate(self, images_seen: int) -> float:
        """Device-seconds up to so many images, by what is known of the trial's speed."""
        last = self._trial.last
        if last is not None:
            return last.device_seconds * images_seen / last.images_seen
        speed = newest_line(self._run_url).numbers.get("speed/images_per_second", 0.0)
        return self._devices * images_seen / speed if speed else 0.0
