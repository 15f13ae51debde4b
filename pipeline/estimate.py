# B images; L latents of an image, all groups together.
"""What a run asks of each of its workers: parameters, memory, work. Known before there is a device.

The model, its optimizer and its average are made on torch's meta device, where tensors have shapes,
types and storages, but neither values nor memory, and one update is made there. A ledger notes when
each storage comes and goes and what each operation computes (allocation_ledger.py). So the peak is
that of everything together: what the backward pass keeps and what it computes again, gradients,
copies that live for a moment only. The update is that of nvae/step.py written out once more,
without what cannot be asked of tensors without values; tests compare both.

Rejected: adding up weights, gradients and what is saved for the backward pass, with an allowance
for the rest (the penalties' stacked weights and the optimizer's copy of the gradients are each as
large as the model, and only their moment decides whether they count); torch's fake tensors, with
which nvae/step.py itself runs and autocast works, but each operation takes 0.3 ms (5 s for the
smallest preset); a small model on the CPU, enlarged by rule.

Not counted are the workspaces of kernels, what the allocator loses between its blocks, and
evaluations. So what is estimated to need more than a device has cannot be trained there; what is
estimated to need barely less may fail all the same.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from nvae import objective
from nvae.health import Buffers
from nvae.levers import levers_for
from nvae.model import NVAE
from nvae.noise import by_group, image_noise
from nvae.optimizer import make_ema, make_optimizer
from nvae.pixels import to_model
from nvae.spectral import batch_norm_scale_penalty
from nvae.step import Coefficients, StepSettings, update
from pipeline.allocation_ledger import AllocationLedger
from pipeline.config import (
    CadenceConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

_GPU = torch.device("cuda")

MEASURED_UPDATES = 3
"""Of `achieved_flops`, after one that is not measured: its penalties take ten times the work."""


@dataclass(frozen=True)
class Estimate:
    """What a run asks of each of its workers."""

    parameters: int
    """Numbers that are trained."""
    memory_bytes: int
    """Of all tensors on the worker's device at the peak of an update; see above for what is not in it."""
    flops_per_image: float
    """Multiplications and additions of one update, forward and backward, per image of the worker's
    share: those of convolutions and matrix products, what is recomputed included."""


def estimate(config: RunConfig, workers: int = 1, device: torch.device = _GPU) -> Estimate:
    """What each of `workers` that share `train.batch_size` needs to train by `config` on such a device.

    Takes seconds, whatever the size of the batch, and no memory to speak of.
    """
    share = -(-config.train.batch_size // workers)
    parts = -(-share // (config.train.micro_batch_size or share))
    largest = -(-share // parts)
    if config.model.latent_shapes[0][-1] == 1:
        # A batch norm of one value refuses; with other workers' images it would not.
        largest = max(largest, 2)
    # The last part needs most: it has the penalties, and finds the gradients of those before it. Where
    # workers exchange gradients, the room of these is never given back.
    imagined = _imagine(config, largest, keeping_gradients=parts > 1 or workers > 1, device=device)
    return Estimate(
        parameters=imagined.parameters,
        memory_bytes=imagined.peak_bytes + (share - largest) * _input_bytes(config),
        flops_per_image=imagined.flops_of_images / largest + imagined.flops_of_weights / share,
    )


def achieved_flops(config: RunConfig, device: torch.device) -> float:
    """FLOP/s of this device in the shortest of a few updates of one micro-batch of noise.

    Without `train.micro_batch_size` that is the whole batch, as one worker would hold it.
    """
    images = config.train.micro_batch_size or config.train.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = _model(config).to(device)
    model.use(levers_for(device, config.train.levers))
    optimizer = make_optimizer(model, config.optimizer.weight_decay)
    ema = make_ema(model, config.optimizer.ema_decay)
    shape = (images, config.model.image_channels, config.model.image_size, config.model.image_size)
    levels = 2 if config.model.likelihood == "bernoulli" else 256
    generator = torch.Generator().manual_seed(config.train.seed)
    pictures = torch.randint(0, levels, shape, dtype=torch.uint8, generator=generator).to(device)
    noise = image_noise(range(images), config.model, device, seed=config.train.seed)
    seconds = []
    for _ in range(1 + MEASURED_UPDATES):
        began = time.perf_counter()
        _update(config, model, optimizer, pictures, noise, ema)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    imagined = _imagine(config, images, keeping_gradients=False, device=device)
    return (imagined.flops_of_images + imagined.flops_of_weights) / min(seconds[1:])


def training_seconds(
    estimate: Estimate, config: RunConfig, flops_per_second: float, workers: int = 1
) -> float:
    """How long `workers` take for `train.total_images` at that rate each, if none waits for another.

    The start, evaluations and checkpoints come on top.
    """
    return estimate.flops_per_image * config.train.total_images / (flops_per_second * workers)


# --- one update -------------------------------------------------------------------------------


def _model(config: RunConfig) -> NVAE:
    model = NVAE(config.model)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    return model


def _update(
    config: RunConfig,
    model: NVAE,
    optimizer: Optimizer,
    images: Tensor,
    noise: Tensor,
    ema: AveragedModel,
) -> None:
    """One as in a training while its KL warms up, but that the weights stay what they are."""
    update(
        model,
        optimizer,
        images,
        Coefficients(learning_rate=0.0, kl=0.5, spectral=config.objective.spectral_coefficient),
        StepSettings(
            precision=config.train.precision,
            kl_balancing=config.objective.kl_balancing,
            gradient_clip_norm=config.optimizer.gradient_clip_norm,
        ),
        noise=noise,
        flip=torch.zeros(len(images), dtype=torch.bool, device=images.device),
        weights=torch.ones(len(images), device=images.device),
        ema=ema,
    )


def _input_bytes(config: RunConfig) -> int:
    """Of one image of a worker's share: it as it was read and as it was mirrored, noise, flag, weight."""
    model = config.model
    return 2 * model.image_channels * model.image_size**2 + 4 * model.num_latents + 1 + 4


# --- the same without values ------------------------------------------------------------------


@dataclass(frozen=True)
class _Imagined:
    """What one update would take."""

    parameters: int
    peak_bytes: int
    flops_of_images: int
    flops_of_weights: int
    """Of the spectral penalty, once per update."""


def _imagine(config: RunConfig, images: int, keeping_gradients: bool, device: torch.device) -> _Imagined:
    """One update with so many images; perhaps with gradients that are there already."""
    return _imagine_once(_essence(config), images, keeping_gradients, torch.device(device.type))


def _essence(config: RunConfig) -> RunConfig:
    """The same for all configurations whose updates allocate and compute the same."""
    return RunConfig(
        data=DataConfig(root="none"),
        model=config.model,
        objective=ObjectiveConfig(
            spectral_coefficient=float(config.objective.spectral_coefficient > 0),
            kl_balancing=config.objective.kl_balancing,
        ),
        optimizer=OptimizerConfig(weight_decay=float(config.optimizer.weight_decay > 0)),
        train=TrainConfig(
            total_images=1,
            batch_size=1,
            precision=config.train.precision,
            activation_checkpointing=config.train.activation_checkpointing,
            levers=config.train.levers,
        ),
        cadence=CadenceConfig(log_images=1, evaluate_images=1, checkpoint_images=1),
    )


@lru_cache(maxsize=256)
def _imagine_once(config: RunConfig, images: int, keeping_gradients: bool, device: torch.device) -> _Imagined:
    shape = config.model
    ledger = AllocationLedger()
    with ledger, torch.device("meta"):
        model = _model(config)
        model.use(levers_for(device, config.train.levers))
        optimizer = make_optimizer(model, config.optimizer.weight_decay)
        ema = make_ema(model, config.optimizer.ema_decay)
        optimizer.zero_grad()
        for parameter in model.parameters():
            if parameter.grad is None:  # Packed ones are never.
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # The first one makes its state.
        pictures = torch.empty(images, shape.image_channels, *[shape.image_size] * 2, dtype=torch.uint8)
        noise = torch.empty(images, shape.num_latents)
        weights = torch.empty(images)
        ledger.begin()
        if not keeping_gradients:
            optimizer.zero_grad()
        before, mirrored = Buffers(model), pictures.flip(-1)
        with _Autocast(), model.shared_weights() as stacked:
            loss = _loss(config, model, mirrored, noise, weights)
            if config.objective.spectral_coefficient:
                loss = loss + model.spectral(stacked) + batch_norm_scale_penalty(model)
            # Loss.backward() is one of torch's functions, and within such no mode for functions holds.
            Variable._execution_engine.run_backward(
                (loss,),
                (torch.ones_like(loss),),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
            del loss
        optimizer.step()
        ema.update_parameters(model)
        del before
    return _Imagined(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        peak_bytes=ledger.peak_bytes,
        flops_of_images=ledger.flops_of_images,
        flops_of_weights=ledger.flops_of_weights,
    )


def _loss(config: RunConfig, model: NVAE, images: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """While the KL warms up, when it is balanced."""
    levels = to_model(images, config.model)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        output = model(levels, by_group(noise, config.model))
    reconstruction = objective.reconstruction(output, levels, config.model)
    kl = objective.kl_per_channel(output).sum(dim=2)
    if config.objective.kl_balancing:
        kl = objective.balance(kl.detach(), weights, config.model) * kl
    return (weights * (reconstruction + kl.sum(dim=1))).sum()


class _Autocast(TorchFunctionMode):
    """Lets tensors without values seem to be on the CPU, and does for them what autocast does there.

    On a GPU it does the same to what an NVAE is made of.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _device_of:
            return torch.device("cpu")
        if torch.is_autocast_enabled("cpu"):
            if func in (F.conv2d, F.linear):
                args = [x.bfloat16() if isinstance(x, Tensor) else x for x in args]
            elif func is F.interpolate:
                args = [args[0].float(), *args[1:]]
        return func(*args, **kwargs)


_device_of = Tensor.device.__get__
