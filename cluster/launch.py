"""Run any pipeline entry on W Ray Train workers and bring its answer back.

An entry is a function `(arguments, worker) -> answer` of the pipeline, named as
`package.module:function`; arguments and answer are plain mappings. So the pipeline never
imports Ray, and the same entry runs in this process with a LocalWorker.

What a lost worker costs is decided here and not by Ray's failure policy, which would also
try again, three times, what a user has to mend. Each try has a run name of its own: with a
name used before, Ray would resume from its own snapshot and train nothing. What a run
resumes from is decided by our checkpoints alone.

`fit` runs in a thread beside the main one, which keeps Ctrl-C ours: the first asks the run
to write a checkpoint and leave, the second ends everything at once.
"""

import importlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Read by Ray when it is imported. Lines are forwarded by the workers' own queue, and a
# worker stays in the directory it was started in.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from cluster.ray_worker import RayWorker
from pipeline import run_folder, storage
from pipeline.errors import FailedError, InputError
from pipeline.run_folder import RunError
from pipeline.training.worker import StopSignals

MAX_FAILURES = 3
"""Times in a row that the workers are started again without having come any further."""
COLLECTIVE_TIMEOUT_SECONDS = 300
"""A rank that waits this long for another gives up, and the group is restarted."""

Answer = dict[str, Any]

logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """What a worker raises for an error that trying again does not mend; its text says what it is.

    The errors themselves may need more than a text to be unpickled on the driver.
    """

    def __init__(self, message: str, is_input: bool) -> None:
        super().__init__(message, is_input)
        self.message, self.is_input = message, is_input


def launch(
    entry: str,
    arguments: Mapping[str, Any],
    *,
    workers: int,
    run_url: str,
    say: Callable[[str], None],
    progress: Callable[[], int] = lambda: 0,
) -> Answer:
    """Run `entry(arguments, worker)` on `workers` ranks; returns rank 0's answer.

    Connects to the cluster of RAY_ADDRESS, or starts a local Ray. `run_url` is the run's
    folder: a stop request there ends the run in order, Ray's own files go below it. After
    the loss of a worker the entry is run again, as long as `progress` grows.

    Raises RunError with the message of an InputError that a worker raised, FailedError if
    the workers failed too often.
    """
    with ray_connection(workers):
        use_gpu = _enough(workers)
        console = Queue(actor_options={"num_cpus": 0})
        task = {"entry": entry, "arguments": dict(arguments), "run_url": run_url, "console": console}
        failures, reached = 0, progress()
        with StopSignals() as signals:
            while True:
                try:
                    return _fit(_trainer(task, workers, use_gpu), console, say, signals)
                except ray.train.TrainingFailedError as error:
                    _raise_if_refused(error)
                    came_further = progress() > reached
                    failures, reached = (1 if came_further else failures + 1), progress()
                    if failures > MAX_FAILURES:
                        raise FailedError(
                            f"The workers failed {failures} times without coming any further; the last "
                            f"time: {_in_short(error)}. `nvae -v train ...` shows everything; when the "
                            "cause is mended, the same command continues the run."
                        ) from error
                    logger.info("the workers failed", exc_info=error)
                    say(f"Lost a worker ({_in_short(error)}); starting the workers again ...")
                finally:
                    storage.delete(_ray_folder(run_url), recursive=True)


def _trainer(task: dict[str, Any], workers: int, use_gpu: bool) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config=task,
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=f"launch-{uuid.uuid4().hex[:12]}",
            failure_config=ray.train.FailureConfig(max_failures=0),
            **storage.for_ray(_ray_folder(task["run_url"])),
        ),
    )


def _ray_folder(run_url: str) -> str:
    """Ray's own files: the marker by which it sees that all nodes share a storage."""
    return storage.join(run_url, "ray")


def _work(task: dict[str, Any]) -> Answer:
    """What each Ray Train worker executes."""
    module, _, function = task["entry"].partition(":")
    entry = getattr(importlib.import_module(module), function)
    worker = RayWorker(task["run_url"], task["console"])
    try:
        with worker.warnings_shown():
            answer: Answer = entry(task["arguments"], worker)
    except (InputError, FailedError) as error:
        raise _RefusedError(str(error), isinstance(error, InputError)) from error
    return answer


def _fit(trainer: TorchTrainer, console: Queue, say: Callable[[str], None], signals: StopSignals) -> Answer:
    """Train in a thread; meanwhile show the workers' lines and pass a wish to stop on."""
    outcome: list[Answer | BaseException] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except BaseException as error:  # raised below, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    asked = False
    while thread.is_alive() or not console.empty():
        if signals.received and not asked:
            run_folder.request_stop(trainer.train_loop_config["run_url"])
            asked = True
        try:
            say(console.get(timeout=0.2))
        except Empty:
            continue
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _worker_errors(error: ray.train.TrainingFailedError) -> list[Exception]:
    """What the ranks raised, in their order; the error itself if it was none of theirs."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return [failures[rank] for rank in sorted(failures)] or [error]


def _raise_if_refused(error: ray.train.TrainingFailedError) -> None:
    """Raise what trying again does not mend, as one error without the workers' tracebacks."""
    for refused in _worker_errors(error):
        if isinstance(refused, _RefusedError):
            kind: type[Exception] = RunError if refused.is_input else FailedError
            raise kind(refused.message) from error


def _in_short(error: ray.train.TrainingFailedError) -> str:
    """The first line of the first worker's error."""
    first = _worker_errors(error)[0]
    return f"{type(first).__name__}: {next(iter(str(first).splitlines()), '')}"[:200]


@contextmanager
def ray_connection(workers: int) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or a Ray of our own on this machine."""
    address = os.environ.get("RAY_ADDRESS", "local")
    # More ranks than cores are allowed on one machine: they are slow, not wrong.
    limits = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            **(limits if address == "local" else {}),
        )
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def _enough(workers: int) -> bool:
    """Whether to use GPUs: if the cluster has any. Raises RunError if it has too few of what is used.

    Ray itself would wait for them without a word.
    """
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    there = int(resources.get(kind, 0))
    if there < workers:
        raise RunError(
            f"{workers} workers were asked for, but the cluster has {there} {kind}s; "
            f"use --workers {there} or fewer."
        )
    return kind == "GPU"
