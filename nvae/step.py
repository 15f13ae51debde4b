# B images of this rank, C colours, H x W pixels, G latent groups, L latents in all groups.
"""One update of an NVAE. Set the first breakpoint in `update`.

It takes uint8 images and changes weights, and knows no files, no clock and no schedule. On
several ranks `model` is wrapped in DistributedDataParallel and every rank calls `update` with
its share of the batch. The result is the update that one process would make with the whole
batch, up to the order of summation: batch norms and KL balancing take their statistics over
all ranks, losses are divided by the weight of the global batch, and penalties are alike on all
ranks, as are their gradients.

An update that is not sound (health.py: something is not finite, or beyond the caller's limits)
leaves everything as it was, on all ranks: they add up one short vector, and all decide by the sum.
Asking for it is the one moment at which the host waits for the device; stepping under a mask on
the device instead would take an optimizer of our own. What the caller wants all ranks to know
(that one was asked to stop) travels in the same vector.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nvae import objective
from nvae.collectives import backward, sum_over_ranks, world_size
from nvae.health import Buffers, Limits, Reading, agree, magnitude
from nvae.model import NVAE
from nvae.noise import by_group
from nvae.optimizer import all_gradients, all_weights, clip
from nvae.pixels import to_model
from nvae.spectral import Matrices, batch_norm_scale_penalty


@dataclass(frozen=True)
class Coefficients:
    """What the schedules decide for one update."""

    learning_rate: float
    kl: float
    """Weight of the KL in [0, 1]. Below 1 the groups are balanced."""
    spectral: float
    """Weight of spectral regularization and batch-norm scale penalty. At 0 they are not computed."""


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from update to update."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the network under autocast. Statistics, likelihoods and penalties stay in fp32."""
    micro_batches: int = 1
    """Parts of a rank's images that pass one after the other, their gradients added up; the same
    number on all ranks. Batch norm and KL balancing see one part (of all ranks) at a time, so
    that the update is not exactly that of the undivided batch."""
    kl_balancing: bool = True
    gradient_clip_norm: float | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class StepResult:
    """What happened, as tensors on the device: adding them up costs nothing, reading them waits.

    First sums over this rank's images, each times its weight; then values that are the same on
    all ranks. Any may be infinite or nan if the update was not made.
    """

    images: Tensor
    """The sum of the weights."""
    reconstruction: Tensor
    """-log p(x given z) in nats."""
    kl_per_channel: Tensor
    """(G, Z) in nats, without coefficient or balance."""

    loss: Tensor
    """What was minimized: the mean over the global batch, with coefficients and penalties."""
    spectral: Tensor
    batch_norm_scale: Tensor
    gradient_norm: Tensor
    """L2 norm of the gradient before clipping and weight decay."""
    reading: Reading
    """What the host knows already: whether the update was made, and if not, why."""

    @property
    def kl_per_group(self) -> Tensor:
        """(G,) in nats: a sum over this rank's images."""
        return self.kl_per_channel.sum(dim=1)

    @property
    def nelbo(self) -> Tensor:
        """In nats, without coefficient or balance: a sum over this rank's images."""
        return self.reconstruction + self.kl_per_channel.sum()


def update(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    coefficients: Coefficients,
    settings: StepSettings,
    *,
    noise: Tensor,
    flip: Tensor | None = None,
    weights: Tensor | None = None,
    ema: AveragedModel | None = None,
    limits: Limits = NO_LIMITS,
    ballot: Sequence[float] = (),
) -> StepResult:
    """Train `model` on this rank's images, uint8 (B, C, H, W), and average its weights into `ema`.

    `noise` (B, L) are the standard normal draws of the images' latents, as `nvae.noise.image_noise`
    makes them; `flip` (B,) says which images to mirror; `weights` (B,) weighs them in the loss (0:
    not counted; default: all 1). The numbers of `ballot`, equally many on all ranks, come back
    added up over ranks.
    """
    network: NVAE = model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[assignment]
    batch = _Batch.of(images, noise, flip, weights)
    global_weight = sum_over_ranks(batch.weights.sum())
    before = Buffers(network)
    optimizer.zero_grad()
    total, penalties = _gradients(model, network, batch, global_weight, coefficients, settings)
    with record_function("step/optimizer"):
        agreement = agree(
            loss=total.loss / global_weight,
            penalties=penalties.loss.detach(),
            gradient_norm=magnitude(all_gradients(optimizer)),
            buffers=before.numbers,
            weights=all_weights(optimizer),
            ballot=ballot,
            limits=limits,
        )
        if agreement.reading.made:
            _clip(optimizer, agreement.gradient_norm, settings, limits)
            _step(optimizer, coefficients)
            if ema is not None:
                ema.update_parameters(network)
        else:
            before.restore()
    return StepResult(
        images=batch.weights.sum(),
        reconstruction=total.reconstruction,
        kl_per_channel=total.kl_per_channel,
        loss=agreement.loss,
        spectral=penalties.spectral.detach(),
        batch_norm_scale=penalties.batch_norm_scale.detach(),
        gradient_norm=agreement.gradient_norm,
        reading=agreement.reading,
    )


@dataclass(frozen=True)
class _Batch:
    """This rank's images, uint8 (B, C, H, W), their latents' noise (B, L) and their weights (B,)."""

    images: Tensor
    noise: Tensor
    weights: Tensor

    @classmethod
    def of(cls, images: Tensor, noise: Tensor, flip: Tensor | None, weights: Tensor | None) -> "_Batch":
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if weights is None:
            weights = torch.ones(len(images), device=images.device)
        return cls(images, noise, weights)

    def split(self, parts: int) -> "Iterator[_Batch]":
        """`parts` batches whose sizes differ by at most one."""
        columns = (self.images, self.noise, self.weights)
        return (_Batch(*rows) for rows in zip(*(c.tensor_split(parts) for c in columns), strict=True))


@dataclass(frozen=True)
class _Terms:
    """Weighted sums over the images of a part: the loss, differentiable, and what is reported."""

    loss: Tensor
    reconstruction: Tensor
    kl_per_channel: Tensor


@dataclass(frozen=True)
class _Penalties:
    """By the weights alone: with and without the coefficient."""

    loss: Tensor
    spectral: Tensor
    batch_norm_scale: Tensor


def _gradients(
    model: nn.Module,
    network: NVAE,
    batch: _Batch,
    global_weight: Tensor,
    coefficients: Coefficients,
    settings: StepSettings,
) -> tuple[_Terms, _Penalties]:
    """Leaves the gradient of the global batch's loss in the parameters; returns what it was made of."""
    done: list[_Terms] = []
    for part in batch.split(settings.micro_batches):
        is_last = len(done) == settings.micro_batches - 1
        # The penalties use the weights that the convolutions have computed anyway.
        with _communicating(model, is_last), network.shared_weights() as stacked:
            with record_function("step/forward"):
                terms = _forward(model, network, part, coefficients, settings)
            # The loss is a sum over ranks, of which DistributedDataParallel makes a mean.
            loss = terms.loss * (world_size() / global_weight)
            if is_last:
                with record_function("step/penalties"):
                    penalties = _penalties(network, coefficients, stacked)
                loss = loss + penalties.loss
            with record_function("step/backward"):
                backward(loss)
        # Detached: a graph, even a spent one, keeps what its checkpointed cells would need.
        done.append(replace(terms, loss=terms.loss.detach()))
        del terms, loss
    return _add(done), penalties


def _forward(
    model: nn.Module,
    network: NVAE,
    batch: _Batch,
    coefficients: Coefficients,
    settings: StepSettings,
) -> _Terms:
    config, weights = network.config, batch.weights
    # fp32, but for a model that was made double to check another against.
    levels = to_model(batch.images, config).to(network.stem.weight.dtype)
    with torch.autocast(levels.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        output = model(levels, by_group(batch.noise, config))
    reconstruction = objective.reconstruction(output, levels, config)
    kl_per_channel = objective.kl_per_channel(output)
    charged = kl = kl_per_channel.sum(dim=2)
    if settings.kl_balancing and coefficients.kl < 1:
        charged = objective.balance(kl.detach(), weights, config) * kl
    loss = reconstruction + coefficients.kl * charged.sum(dim=1)
    return _Terms(
        loss=(weights * loss).sum(),
        reconstruction=(weights * reconstruction.detach()).sum(),
        kl_per_channel=torch.tensordot(weights.to(kl), kl_per_channel.detach(), dims=1),
    )


def _penalties(network: NVAE, coefficients: Coefficients, stacked: Matrices) -> _Penalties:
    """Alike on all ranks: weights and singular vectors are. After a forward pass, which may
    initialize weights from data."""
    if coefficients.spectral == 0:
        none = network.stem.weight.new_zeros(())
        return _Penalties(none, none, none)
    spectral, batch_norm_scale = network.spectral(stacked), batch_norm_scale_penalty(network)
    return _Penalties(coefficients.spectral * (spectral + batch_norm_scale), spectral, batch_norm_scale)


def _add(terms: Sequence[_Terms]) -> _Terms:
    return _Terms(
        loss=torch.stack([term.loss for term in terms]).sum(0),
        reconstruction=torch.stack([term.reconstruction for term in terms]).sum(0),
        kl_per_channel=torch.stack([term.kl_per_channel for term in terms]).sum(0),
    )


def _clip(optimizer: Optimizer, gradient_norm: Tensor, settings: StepSettings, limits: Limits) -> None:
    highest = math.inf if settings.gradient_clip_norm is None else settings.gradient_clip_norm
    if limits.clip:
        highest = min(highest, limits.gradient_norm)
    if math.isfinite(highest):
        clip(optimizer, gradient_norm, highest)


def _step(optimizer: Optimizer, coefficients: Coefficients) -> None:
    for group in optimizer.param_groups:
        group["lr"] = coefficients.learning_rate
    optimizer.step()


def _communicating(model: nn.Module, yes: bool) -> AbstractContextManager[object]:
    """Whether the backward pass in it averages gradients over ranks, or keeps them for the next."""
    if yes or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
