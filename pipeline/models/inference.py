"""How a trained model is used: its state, and the noise of each image.

The noise of image i is a function of (seed, i) alone. It is drawn on the CPU, by one
generator per image, group by group in generative order; so image i is the same picture
whether it is drawn alone or among 50,000, in whatever batches, on whatever device.

The generator is numpy's PCG64 on a 128-bit hash. torch's CPU generator keeps the low 32 bits
of its seed: among 50,000 images it would draw some picture twice with a probability of 1/4,
and its normal numbers depend on the vector instructions of the processor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvae.distributions import Noise
from nvae.levers import levers_for
from nvae.model import NVAE


def latent_noise(
    seed: int, indices: Sequence[int], device: torch.device | str = "cpu", draw: int | range = 0
) -> Noise:
    """Standard normal noise of the images with these indices, for one walk down the groups.

    Called with (B, Z, H, W) once per group, coarsest first; B is the number of indices. `draw`
    numbers independent draws for the same image; of a range, all images of one draw come before
    those of the next, and B is indices times draws.
    """
    draws = [draw] if isinstance(draw, int) else draw
    generators = [_generator(f"latent/{seed}/{index}/{each}") for each in draws for index in indices]
    return _stacked(generators, np.random.Generator.standard_normal, device)


def pixel_noise(seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Uniform noise on [0, 1) of the images with these indices, for drawing their pixels."""
    generators = [_generator(f"pixels/{seed}/{index}") for index in indices]
    return _stacked(generators, np.random.Generator.random, device)


def _generator(what: str) -> np.random.Generator:
    digest = blake2b(what.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest)))


def _stacked(
    generators: Sequence[np.random.Generator], draw: Callable[..., Any], device: torch.device | str
) -> Noise:
    def noise(shape: tuple[int, ...]) -> Tensor:
        if shape[0] != len(generators):
            raise ValueError(f"noise for {len(generators)} images was asked for {shape[0]}")
        drawn = [draw(generator, shape[1:], dtype=np.float32) for generator in generators]
        return torch.from_numpy(np.stack(drawn)).to(device)

    return noise


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Within it: eval mode, no gradients, full float32. Afterwards everything is as before.

    Yields the model's device. Training flags are put back module by module. Neither autocast
    nor TF32 is used: a likelihood or a picture should depend on the machine no more than it
    must. An NVAE uses the levers of its device, whatever it is trained with.
    """
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    levers = model.levers if isinstance(model, NVAE) else None
    model.eval()
    if isinstance(model, NVAE):
        model.use(levers_for(device))
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield device
    finally:
        for module, flag in training.items():
            module.training = flag
        if isinstance(model, NVAE) and levers is not None:
            model.use(levers)
