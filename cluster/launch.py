"""Run any pipeline entry on Ray Train workers and bring its answer back.

An entry is a function `(arguments, worker) -> answer` of the pipeline, named as
`package.module:function`; arguments and answer are plain mappings. So the pipeline never
imports Ray, and the same entry runs in this process with a LocalWorker.

What a lost worker costs, and on how many workers to go on, is decided here and not by Ray's
failure and scaling policies: they would try again, three times, what a user has to mend, and
wait for nodes that are dead. Each start has a run name of its own: with a name used before,
Ray would resume from its own snapshot and train nothing. What a run resumes from is decided
by our checkpoints alone, so that every start is the same, whatever came before it.

`fit` runs in a thread beside the main one, which keeps Ctrl-C ours: the first asks the run
to write a checkpoint and leave, the second ends everything at once. The main thread watches
over the group meanwhile (supervision.py).
"""

import importlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from cluster.board import board
from cluster.failures import START_FAILED, Failures, RefusedError
from cluster.nodes import kind_of_places, ray_connection, wait_for_places
from cluster.ray_worker import RayWorker, TorchGroup
from cluster.supervision import Supervisor
from pipeline import run_folder, storage
from pipeline.errors import FailedError, InputError
from pipeline.training.watchdog import Limits
from pipeline.training.worker import Poll, StopSignals

FORMING_SECONDS = 300
"""A rank that waits this long for the others to come gives up, and the group is started anew."""

Answer = dict[str, Any]

logger = logging.getLogger(__name__)


def launch(
    entry: str,
    arguments: Mapping[str, Any],
    *,
    widths: Sequence[int],
    run_url: str,
    say: Callable[[str], None],
    progress: Callable[[], int] = lambda: 0,
    starting: Callable[[int, str], None] = lambda workers, kind: None,
    heard: Callable[[Mapping[str, float]], None] = lambda evaluation: None,
    limits: Limits | None = None,
) -> Answer:
    """Run `entry(arguments, worker)` on as many ranks as can be; returns rank 0's answer.

    Connects to the cluster of RAY_ADDRESS, or starts a local Ray. `run_url` is the run's
    folder: a stop request there ends the run in order, Ray's own files go below it. `widths`
    are the numbers of workers that will do, fewest first; `starting` is told of each start: how
    many, and whether on "GPU" or "CPU"; `heard` is told what each evaluation found. After the loss
    of a worker the entry is run again, on the nodes that are left, as long as `progress` grows; so it
    is when nodes leave or, some minutes after the last start, come back. A group that stands still
    for longer than the `limits` is ended.

    An entry that is asked to leave answers with `state` "stopped", and does so, too, if it was
    not started. Raises RunError with the message of an InputError that a worker raised,
    FailedError if the workers failed too often.
    """
    stop_file = partial(run_folder.stop_requested, run_url)
    # The handlers outlive the connection to Ray, and a signal while it is made is heeded.
    with StopSignals() as signals, Poll(stop_file) as asked, ray_connection(max(widths)), board() as actor:

        def unwanted() -> bool:
            return signals.received or asked()

        failures = Failures(progress)
        # Asked anew for each start: nodes with GPUs may have come.
        while workers := wait_for_places(widths, kind := kind_of_places(), say, unwanted):
            starting(workers, kind)
            start = _Start(entry, dict(arguments), run_url, actor, uuid.uuid4().hex[:12])
            supervisor = Supervisor(actor, start.group, workers, widths, kind, say, heard, unwanted, limits)
            try:
                answer: Answer = supervisor.watch(_trainer(start, workers, kind == "GPU").fit)
                if answer.get("state") != "stopped" or unwanted():
                    return answer
                reason = supervisor.reason or "A worker was told to end"
                say(f"{reason}; the run is saved and started again ...")
            except START_FAILED as error:
                pause = failures.note(error, supervisor.reason_to_end)
                logger.info("the workers failed", exc_info=error)
                if unwanted():
                    return {"state": "stopped", "reason": f"{failures.last}, with nothing saved at the end"}
                say(f"{failures.last}; starting the workers again ...")
                _sleep(pause, unwanted)
            finally:
                _clear(_ray_folder(run_url))
    return {"state": "stopped", "reason": ""}


def entry_point(name: str) -> Callable[[Mapping[str, Any], Any], Answer]:
    """The function `package.module:function`."""
    module, _, function = name.partition(":")
    entry: Callable[[Mapping[str, Any], Any], Answer] = getattr(importlib.import_module(module), function)
    return entry


@dataclass(frozen=True)
class _Start:
    """What the workers of one start are sent."""

    entry: str
    arguments: Mapping[str, Any]
    run_url: str
    board: Any
    group: str


def _trainer(start: _Start, workers: int, use_gpu: bool) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config={"start": start},
        torch_config=TorchGroup(timeout_s=FORMING_SECONDS),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=f"launch-{start.group}",
            failure_config=ray.train.FailureConfig(max_failures=0),
            **storage.for_ray(_ray_folder(start.run_url)),
        ),
    )


def _ray_folder(run_url: str) -> str:
    """Ray's own files: the marker by which it sees that all nodes share a storage."""
    return storage.join(run_url, "ray")


def _clear(url: str) -> None:
    """Of no meaning any more, and no reason to lose an answer."""
    try:
        storage.delete(url, recursive=True)
    except storage.StoreError as error:
        logger.warning("%s could not be deleted: %s", url, error)


def _work(sent: dict[str, _Start]) -> Answer:
    """What each Ray Train worker executes."""
    start = sent["start"]
    entry = entry_point(start.entry)
    worker = RayWorker(start.run_url, start.board, start.group)
    try:
        with worker.reporting():
            answer: Answer = entry(start.arguments, worker)
    except (InputError, FailedError) as error:
        raise RefusedError(str(error), isinstance(error, InputError)) from error
    return answer


def _sleep(seconds: float, unwanted: Callable[[], bool]) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not unwanted():
        time.sleep(min(1.0, seconds))
