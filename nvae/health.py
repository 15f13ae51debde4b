"""Whether an update may be made: what all ranks agree on before the weights move.

Each rank puts a few numbers into one vector, the vectors are added up in the one collective that
an update has at its end anyway, and the sum comes to the host in one transfer, the one moment at
which the host waits for the device. From then on every rank holds the same floats, bit for bit,
so that all of them decide alike by plain comparisons: nothing is decided before the sum, nothing
after it from a value of one rank alone.

A nan or an infinity of any rank survives the sum, wherever it arose: in the loss, in the gradient,
in the statistics of a batch norm, in the weights. The last two need not show in the loss: an
infinite bias in front of the soft clamp of a posterior is a finite loss.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Flag, auto

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn.utils import get_total_norm

from nvae.collectives import sum_over_ranks, world_size
from nvae.model import NVAE

SMALL = 65_536
"""Values in a tensor that `magnitude` copies."""


class Trouble(Flag):
    """What was wrong with an update; several may be."""

    NONE = 0
    LOSS = auto()
    """The loss or a penalty was not finite."""
    GRADIENT = auto()
    """The gradient was not finite."""
    STATISTICS = auto()
    """The statistics of a batch norm, or other buffers, were not finite after the forward pass."""
    WEIGHTS = auto()
    """The weights were not finite: the cause lies in an earlier update, or in the memory."""
    LOSS_SPIKE = auto()
    """The loss was finite and above its limit."""
    GRADIENT_SPIKE = auto()
    """The gradient's norm was finite and above its limit."""


@dataclass(frozen=True)
class Limits:
    """What an update may not exceed, and what becomes of one whose gradient does."""

    loss: float = math.inf
    """Of the mean over the global batch, without penalties."""
    gradient_norm: float = math.inf
    clip: bool = False
    """Shorten a gradient that is too long, and make the update, instead of leaving it out."""


@dataclass(frozen=True)
class Reading:
    """What is known of an update on the host, the same on all ranks."""

    loss: float
    """Mean over the global batch, with KL coefficients and balancing, without penalties."""
    gradient_norm: float
    """L2 norm of the gradient before clipping and weight decay."""
    trouble: Trouble = Trouble.NONE
    made: bool = True
    """Whether the update was made. If not, the weights and all other state are as before."""
    votes: tuple[float, ...] = ()
    """The ranks' ballots added up."""


@dataclass(frozen=True)
class Agreement:
    """The sums over ranks: on the device for the curves, on the host for decisions."""

    loss: Tensor
    """With penalties."""
    gradient_norm: Tensor
    reading: Reading


def agree(
    *,
    loss: Tensor,
    penalties: Tensor,
    gradient_norm: Tensor,
    buffers: Iterable[Tensor],
    weights: Iterable[Tensor],
    ballot: Sequence[float],
    limits: Limits,
) -> Agreement:
    """What the ranks find together; a meeting of all of them, at which the host waits for the device.

    `loss` is this rank's part of a sum over ranks; penalties and gradient are alike on all of them.
    """
    mine = torch.stack(
        [
            loss,
            # Shared out, so that the sum is what every rank has, bit for bit the same on each.
            penalties / world_size(),
            gradient_norm / world_size(),
            magnitude(buffers).to(loss),
            magnitude(weights).to(loss),
            *(loss.new_full((), vote) for vote in ballot),
        ]
    )
    sums = sum_over_ranks(mine)
    data_loss, penalty, norm, statistics, parameters, *votes = sums.tolist()
    trouble = Trouble.NONE
    for what, value in (
        (Trouble.LOSS, data_loss + penalty),
        (Trouble.GRADIENT, norm),
        (Trouble.STATISTICS, statistics),
        (Trouble.WEIGHTS, parameters),
    ):
        if not math.isfinite(value):
            trouble |= what
    if math.isfinite(data_loss) and data_loss > limits.loss:
        trouble |= Trouble.LOSS_SPIKE
    if math.isfinite(norm) and norm > limits.gradient_norm:
        trouble |= Trouble.GRADIENT_SPIKE
    made = trouble is Trouble.NONE or (limits.clip and trouble is Trouble.GRADIENT_SPIKE)
    return Agreement(sums[0] + sums[1], sums[2], Reading(data_loss, norm, trouble, made, tuple(votes)))


@torch.no_grad()
def magnitude(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all values: not finite if one is not, or is beyond 1e19 and of no use either.

    On a CPU it takes a third of the time of the sum of absolute values, or of the largest. Most
    tensors of a model are small, and together, in a copy, take half the time of one by one.
    """
    small: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() <= SMALL:
            small[tensor.dtype].append(tensor)
        else:
            parts.append(tensor)
    parts += [flatten(together) for together in small.values()]
    return get_total_norm(parts, foreach=True)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All values of tensors of one type, one after the other, in a copy.

    By the routine with which torch packs gradients: with views made in Python it takes twice as long.
    """
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    # Of a single tensor torch makes a view.
    return flat.clone() if len(tensors) == 1 else flat


class Buffers:
    """A copy of a model's buffers, to put back. One tensor per type: few and large copies."""

    def __init__(self, model: NVAE) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in model.packs.buffers if model.levers.packed else model.buffers():
            self._buffers[buffer.dtype].append(buffer)
        self._copies = {dtype: flatten(buffers) for dtype, buffers in self._buffers.items()}

    @property
    def numbers(self) -> list[Tensor]:
        """The model's buffers of floating point, as they are now."""
        return [b for dtype, buffers in self._buffers.items() if dtype.is_floating_point for b in buffers]

    def restore(self) -> None:
        for dtype, buffers in self._buffers.items():
            parts = torch.split(self._copies[dtype], [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
