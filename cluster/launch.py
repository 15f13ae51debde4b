"""Run any pipeline entry on W Ray Train workers and bring its answer back.

An entry is a function `(arguments, worker) -> answer` of the pipeline, named as
`package.module:function`; arguments and answer are plain mappings. So the pipeline never
imports Ray, and the same entry runs in this process with a LocalWorker.

Ray Train's own run name is unique to each launch: with a name used before it would resume
from its own snapshot and train nothing. What a run resumes from is decided by our
checkpoints alone. `fit` runs in a thread beside the main one, which keeps Ctrl-C ours:
the first asks the run to checkpoint and leave, the second lets Ray abort it.
"""

import importlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
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
from pipeline.run_folder import RunError

MAX_FAILURES = 3
"""Restarts of the worker group after a worker or node was lost."""
COLLECTIVE_TIMEOUT_SECONDS = 300
"""A rank that waits this long for another gives up, and the group is restarted."""

Answer = dict[str, Any]


def launch(
    entry: str,
    arguments: Mapping[str, Any],
    *,
    workers: int,
    run_url: str,
    say: Callable[[str], None],
) -> Answer:
    """Run `entry(arguments, worker)` on `workers` ranks; returns rank 0's answer.

    Connects to the cluster of RAY_ADDRESS, or starts a local Ray. `run_url` is the run's
    folder: a stop request there ends the run in order, Ray's own files go below it.
    Raises RunError with the workers' own message if the entry fails on all tries.
    """
    with ray_connection(workers):
        use_gpu = _enough(workers)
        console = Queue(actor_options={"num_cpus": 0})
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "entry": entry,
                "arguments": dict(arguments),
                "run_url": run_url,
                "console": console,
            },
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                name=f"launch-{uuid.uuid4().hex[:12]}",
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
                **storage.for_ray(storage.join(run_url, "ray")),
            ),
        )
        with _interrupts_ask_to_stop(run_url, say):
            return _fit(trainer, console, say)


def _work(config: dict[str, Any]) -> Answer:
    """What each Ray Train worker executes."""
    module, _, function = config["entry"].partition(":")
    entry = getattr(importlib.import_module(module), function)
    worker = RayWorker(config["run_url"], config["console"])
    answer: Answer = entry(config["arguments"], worker)
    return answer


def _fit(trainer: TorchTrainer, console: Queue, say: Callable[[str], None]) -> Answer:
    """Train in a thread; show the workers' lines meanwhile."""
    outcome: list[Answer | BaseException] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value)
        except BaseException as error:  # handed to the caller's thread below
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive() or not console.empty():
        try:
            say(console.get(timeout=0.2))
        except Empty:
            continue
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def ray_connection(workers: int) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or a Ray of our own on this machine."""
    address = os.environ.get("RAY_ADDRESS", "local")
    local = address == "local"
    # More ranks than cores are allowed on one machine: they are slow, not wrong.
    limits = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False} if local else {}
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **limits)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def _enough(workers: int) -> bool:
    """Whether to use GPUs: if the cluster has any. Raises RunError if it has too few."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < workers:
        raise RunError(
            f"{workers} workers were asked for, but the cluster has {gpus} GPUs; "
            f"use --workers {gpus} or fewer."
        )
    return gpus > 0


@contextmanager
def _interrupts_ask_to_stop(run_url: str, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop; the next one is Python's usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        say("Stopping: a checkpoint is written first. Ctrl-C again ends at once.")
        run_folder.request_stop(run_url)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
