"""What the tests let trials of a search execute: trainings with a fault of their own.

The fault is chosen by a setting that the space draws and that changes nothing else, so that each
trial of one search meets another: a norm to which no gradient would ever be clipped.
"""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline import run
from pipeline.training.worker import Worker
from tests.injecting import Injecting

FAULTS = ("none", "nan", "exception", "out_of_memory", "hang", "killed_once", "killed")
AT_IMAGES = 16
NORM = 1_000_000
"""What number `n` of the faults is added to."""


def fault_of(arguments: Mapping[str, Any]) -> str:
    return FAULTS[int(arguments["config"]["optimizer"]["gradient_clip_norm"]) - NORM]


def work_with_a_fault(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    fault = fault_of(arguments)

    def strike(injecting: Injecting) -> None:
        if fault == "exception":
            raise RuntimeError("the disk is on fire")
        if fault == "out_of_memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        if fault == "hang":
            time.sleep(3600)
        marker = Path(arguments["url"]) / "killed"
        if fault == "killed" or (fault == "killed_once" and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if fault == "nan":
        poison = dict.fromkeys(range(AT_IMAGES, 1000, 4), spoil)
        return run.work(arguments, Injecting(worker, poison))
    return run.work(arguments, Injecting(worker, {AT_IMAGES: strike}))


def spoil(injecting: Injecting) -> None:
    """Every update from here on meets a weight that is no number."""
    with torch.no_grad():
        next(iter(injecting.model.parameters())).fill_(float("nan"))
