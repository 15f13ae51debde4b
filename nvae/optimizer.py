"""What an update is given besides the model: its optimizer, and the average of its weights.

Both exist twice: as torch has them, and on packed tensors (packing.py), where they take the same values
to the last bit in a few passes over memory instead of thousands of small operations. On two cores
they and the check of the weights (health.py) took a fifth of a step of a small model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adamax, Optimizer
from torch.optim.swa_utils import AveragedModel

from nvae.batch_norm import BatchNorm
from nvae.model import NVAE
from nvae.packing import Packed, pieces

_BETAS = (0.9, 0.999)
_EPSILON = 1e-3


def make_optimizer(model: nn.Module, weight_decay: float) -> Adamax:
    """Adamax as published. Weight decay is part of the gradient and holds for all parameters.

    The model is on its device already, and has been told its levers.
    """
    if isinstance(model, NVAE) and model.levers.packed:
        return PackedAdamax(model.packs.weights, weight_decay)
    return Adamax(model.parameters(), betas=_BETAS, eps=_EPSILON, weight_decay=weight_decay, foreach=True)


class PackedAdamax(Adamax):
    """Adamax on packed parameters, whose gradients are packed, too: autograd adds to them in place.

    Gradients that somebody else has put in their place (DistributedDataParallel keeps them in its
    buckets) are left there, and copied when `gradient` is asked for.

    Its state is torch's, tensor by tensor, and may be put back from outside; it is packed when next
    needed. `step` raises ValueError where its parameters have been updated differently often.
    """

    def __init__(self, weights: Packed, weight_decay: float) -> None:
        super().__init__(weights.tensors, betas=_BETAS, eps=_EPSILON, weight_decay=weight_decay)
        self.weights = weights
        self._gradient = torch.empty(0)
        self._gradients: list[Tensor] = []
        self._averages: Packed | None = None
        self._maxima: Packed | None = None

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = False) -> None:
        """Every parameter has a gradient from now on, which is zero; none is never set."""
        weights = self.weights.flat
        if self._gradient.shape != weights.shape or self._gradient.device != weights.device:
            self._gradient = torch.zeros_like(weights)
            self._gradients = self.weights.views(self._gradient)
        else:
            self._gradient.zero_()
        if elsewhere := self._elsewhere():
            torch._foreach_zero_([gradient for _, gradient in elsewhere])
        for parameter, gradient in zip(self.weights.tensors, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """All gradients since `zero_grad` in one tensor, of which `step` makes use."""
        if elsewhere := self._elsewhere():
            places, values = zip(*elsewhere, strict=True)
            torch._foreach_copy_(places, values)
        return self._gradient

    def _elsewhere(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a place for a gradient and the gradient that is not there."""
        pairs = zip(self._gradients, self.weights.tensors, strict=True)
        return [(g, p.grad) for g, p in pairs if p.grad is not None and p.grad is not g]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        beta1, beta2 = group["betas"]
        averages, maxima = self._packed_state()
        steps = [self.state[parameter]["step"] for parameter in self.weights.tensors]
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
        size = -(group["lr"] / (1 - beta1 ** steps[0].item()))
        for weight, gradient, average, maximum in pieces(self.weights.flat, self._gradient, averages, maxima):
            if group["weight_decay"]:
                gradient = gradient.add(weight, alpha=group["weight_decay"])
            average.lerp_(gradient, 1 - beta1)
            torch.maximum(maximum.mul_(beta2), gradient.abs().add_(group["eps"]), out=maximum)
            weight.addcdiv_(average, maximum, value=size)

    def _packed_state(self) -> tuple[Tensor, Tensor]:
        states = [self.state[parameter] for parameter in self.weights.tensors]
        for state, parameter in zip(states, self.weights.tensors, strict=True):
            if not state:
                state |= {
                    "step": torch.tensor(0.0, device="cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_inf": torch.zeros_like(parameter),
                }
        if len({float(state["step"]) for state in states}) > 1:
            raise ValueError("the optimizer's state is of parameters that were updated differently often")
        self._averages = _packed(self._averages, [state["exp_avg"] for state in states])
        self._maxima = _packed(self._maxima, [state["exp_inf"] for state in states])
        return self._averages.flat, self._maxima.flat


def _packed(before: Packed | None, tensors: Sequence[Tensor]) -> Packed:
    return before if before is not None and before.is_of(tensors) else Packed(tensors)


@torch.no_grad()
def clip(optimizer: Optimizer, gradient_norm: Tensor, highest: float) -> None:
    """Shorten the gradient to the norm `highest` if it is longer, as torch.nn.utils does."""
    factor = (highest / (gradient_norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(all_gradients(optimizer), factor)


def all_gradients(optimizer: Optimizer) -> list[Tensor]:
    """After the backward pass: tensors that hold all gradients, each value once; few if packed."""
    if isinstance(optimizer, PackedAdamax):
        return [piece for [piece] in pieces(optimizer.gradient())]
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def all_weights(optimizer: Optimizer) -> list[Tensor]:
    """Tensors that hold all weights, likewise."""
    if isinstance(optimizer, PackedAdamax):
        return [piece for [piece] in pieces(optimizer.weights.flat)]
    # Not from the model: walking through a deep one takes milliseconds.
    return [p for group in optimizer.param_groups for p in group["params"]]


_Tensors = tuple[Tensor, ...] | list[Tensor]


class WeightAverage(AveragedModel):
    """Exponential moving average of a model's weights and batch norm statistics.

    `decay` is reached by a ramp, so that the first weights are soon forgotten. Other buffers
    (counters, singular vectors) are those of the model. `n_averaged` counts the updates and
    stays on the CPU, where asking for it does not wait for the device.
    """

    def __init__(self, model: NVAE, decay: float) -> None:
        def step(count: int) -> float:
            return 1 - min(decay, (1 + count) / (10 + count))

        def average(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, step(int(count)))

        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self._step_size = step

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if isinstance(model, NVAE) and model.levers.packed:
            self._update_packed(model)
            return
        super().update_parameters(model)
        for mine, theirs in zip(self.module.modules(), model.modules(), strict=True):
            averaged = {"running_mean", "running_var"} if isinstance(theirs, BatchNorm) else set()
            for name, buffer in theirs.named_buffers(recurse=False):
                if name not in averaged:
                    mine.get_buffer(name).copy_(buffer)

    def _update_packed(self, model: NVAE) -> None:
        averaged: NVAE = self.module  # type: ignore[assignment]
        mine, theirs = averaged.packs, model.packs
        count = int(self.n_averaged)
        for average, current in (
            *pieces(mine.weights.flat, theirs.weights.flat),
            *pieces(mine.statistics.flat, theirs.statistics.flat),
        ):
            average.lerp_(current, self._step_size(count)) if count else average.copy_(current)
        for packed, source in zip(mine.others, theirs.others, strict=True):
            packed.flat.copy_(source.flat)
        self.n_averaged += 1


def make_ema(model: NVAE, decay: float) -> WeightAverage:
    return WeightAverage(model, decay)
