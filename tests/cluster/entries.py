"""What the tests let Ray's workers execute, beside the pipeline's own entries."""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline import config_file, run
from pipeline.config_file import ConfigError, Problem
from pipeline.data.index import load_index
from pipeline.data.loader import training_batches
from pipeline.training.checkpoint import images_saved
from pipeline.training.machine import Machine
from pipeline.training.metrics import Metrics
from pipeline.training.tracking import NullTracker
from pipeline.training.train import Training, TrainState, step
from pipeline.training.watchdog import Phase
from pipeline.training.worker import Worker


def few_updates(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """What all ranks saw and did in the updates of one log interval, and whether they are one model.

    The last rank warns of something.
    """
    if worker.rank == worker.world_size - 1:
        logging.getLogger("pipeline.data").warning("%d samples smell", 2)
    config = config_file.from_mapping(arguments["config"])
    data = load_index(config.data.root)
    training = Training(config, data, worker, NullTracker(), None)
    state = TrainState.create(config, worker, None, None)
    model = worker.wrap(state.model)
    metrics = Metrics(worker, config.model, Machine(worker.device, {}))
    total = arguments["images"]
    # Sum over ranks of a row for each position: its place in the data set is seen by one rank.
    seen = torch.zeros(total, dtype=torch.float64)
    for batch in training_batches(
        config, data, rank=worker.rank, world_size=worker.world_size, start=0, stop=total
    ):
        seen[batch.positions] = torch.tensor([float(key.rpartition("-")[2]) for key in batch.keys]).double()
        step(training, state, model, batch, metrics)
    weights = torch.cat([tensor.double().flatten() for tensor in state.model.state_dict().values()])
    means = worker.all_reduce(weights.clone()) / worker.world_size
    apart = worker.all_reduce((weights - means).abs().max())
    return {
        "images": worker.all_reduce(seen).tolist(),
        "images_seen": state.images_seen,
        "apart": apart.item(),
        "metrics": metrics.reduce(),
    }


def work_killed_once(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A training whose last rank is killed, once, when there is a checkpoint."""
    url, killed = arguments["url"], Path(arguments["url"]) / "killed"

    def kill() -> None:
        while not images_saved(url):
            time.sleep(0.01)
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if worker.rank == worker.world_size - 1 and not killed.exists():
        threading.Thread(target=kill, daemon=True).start()
    return run.work(arguments, worker)


def refuse(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """One rank finds a user's mistake while the others wait for it."""
    _note_try(arguments, worker)
    if worker.rank == worker.world_size - 1:
        raise ConfigError([Problem("here", "train.seed", "is odd"), Problem("there", "data", "is odd")])
    worker.barrier()
    return {}


def fail(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A bug: trying again does not help."""
    _note_try(arguments, worker)
    raise ZeroDivisionError("a bug of ours")


def _note_try(arguments: Mapping[str, Any], worker: Worker) -> None:
    """Leave a file for this process; returns when every rank has."""
    Path(arguments["tries"], f"{os.getpid()}-{worker.rank}").touch()
    worker.barrier()


def work_hung_once(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A training whose last rank sleeps for ever, once, when there is a checkpoint."""
    slept = Path(arguments["url"]) / "slept"
    last = worker.rank == worker.world_size - 1
    return run.work(arguments, _Sleepy(worker, slept) if last and not slept.exists() else worker)


class _Sleepy:
    """A worker that falls asleep between two batches."""

    def __init__(self, worker: Worker, slept: Path) -> None:
        self._worker, self._slept = worker, slept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def mark(self, phase: Phase, images_seen: int) -> None:
        self._worker.mark(phase, images_seen)
        if phase == "batch" and images_saved(str(self._slept.parent)):
            self._slept.touch()
            asleep_for_ever()


def work_hung_at_the_end_once(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A training whose first rank sleeps for ever, once, when it registers the model."""
    slept = Path(arguments["url"]) / "slept"
    first = worker.rank == 0
    return run.work(arguments, _SleepyAtTheEnd(worker, slept) if first and not slept.exists() else worker)


class _SleepyAtTheEnd(_Sleepy):
    """A worker that falls asleep when it is about to ask the registry, which the first alone does."""

    def mark(self, phase: Phase, images_seen: int) -> None:
        self._worker.mark(phase, images_seen)

    def alive(self) -> None:
        self._slept.touch()
        asleep_for_ever()


def asleep_for_ever() -> None:
    threading.Event().wait()


def wait_long(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """All ranks wait for the first, who comes late."""
    if worker.rank == 0:
        time.sleep(arguments["seconds"])
    return {"met": int(worker.all_reduce(torch.ones(())))}
