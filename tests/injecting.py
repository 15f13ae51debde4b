"""Trouble for a training, from outside: nothing in the product knows of it.

A worker is told before every update how far the training is, and has the model in its hands when
it wraps it. `Injecting` stands in front of any worker, Ray's too, and lets a test do something at
a chosen number of images: break a weight, a gradient, a statistic, an image; stop; crash.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nvae import step
from nvae.batch_norm import BatchNorm
from pipeline.training.worker import Phase, Worker


class Injecting:
    """`worker`, but that something is done before the update that begins after so many images.

    Or, under (phase, images seen), before that phase. What is done gets this object, and with it
    the model.
    """

    model: nn.Module

    def __init__(self, worker: Worker, injections: Mapping[Any, "Injection"]) -> None:
        self._worker, self._injections = worker, injections
        self._stopping = False
        self.lines: list[str] = []
        """What was said to the user."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def wrap(self, model: nn.Module) -> nn.Module:
        self.model = model
        return self._worker.wrap(model)

    def mark(self, phase: Phase, images_seen: int) -> None:
        self._worker.mark(phase, images_seen)
        for place in (images_seen,) if phase == "update" else ((phase, images_seen),):
            if place in self._injections:
                self._injections[place](self)

    def stop_wanted(self) -> bool:
        return self._stopping or self._worker.stop_wanted()

    def stop_requested(self) -> bool:
        wanted = torch.tensor(float(self.stop_wanted()), device=self.device)
        return bool(self.all_reduce(wanted))

    def stop(self) -> None:
        self._stopping = True

    def say(self, line: str) -> None:
        self.lines.append(line)
        self._worker.say(line)


Injection = Callable[[Injecting], object]


class CrashError(Exception):
    """What ends a process in the middle, as far as the loop can tell."""


def crash(_: Injecting) -> None:
    raise CrashError


def stop(at: Injecting) -> None:
    at.stop()


def break_weight(at: Injecting, value: float = math.nan) -> None:
    """For good: until weights come back from elsewhere."""
    with torch.no_grad():
        next(at.model.parameters()).view(-1)[0] = value


def break_statistic(at: Injecting, value: float = math.nan) -> None:
    """One running variance, after the forward pass of one update."""
    layer = next(module for module in at.model.modules() if isinstance(module, BatchNorm))

    def poison(module: nn.Module, arguments: Any, output: Any) -> None:
        handle.remove()
        layer.running_var[0] = value

    handle = layer.register_forward_hook(poison)


def break_loss(_: Injecting, value: float = math.nan) -> None:
    """The loss of one update, summed over this rank's images, and nothing that it is made of."""
    original = step._forward

    def poison(*arguments: Any) -> Any:
        step._forward = original
        terms = original(*arguments)
        return replace(terms, loss=terms.loss * value)

    step._forward = poison


def break_image(at: Injecting, value: float = math.nan) -> None:
    """One image of one update, as the model sees it: its loss, and all statistics."""

    def poison(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        handle.remove()
        images = arguments[0].clone()
        images[0] = value
        return (images, *arguments[1:])

    handle = at.model.register_forward_pre_hook(poison)


def break_gradient(at: Injecting, factor: float = math.nan) -> None:
    """The gradients of one update, multiplied; those of one parameter if it is no number."""
    parameters = list(at.model.parameters())

    def multiply(parameter: nn.Parameter) -> None:
        def poison(gradient: Tensor) -> Tensor:
            handle.remove()
            return gradient * factor

        handle = parameter.register_hook(poison)

    for parameter in parameters if math.isfinite(factor) else parameters[:1]:
        multiply(parameter)
