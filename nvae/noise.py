# B images of this rank; L latents of an image, all groups together; Z, H, W of one group.
"""The latents' noise in training: each image's is its own, whoever trains on it.

It is a pure function of (seed, rollbacks, position), where the position is the image's place in
the endless stream of training images, the number that images seen counts. So nothing about it is
saved; no image meets the same noise twice, not in a later epoch and not after a rollback; and it
depends neither on the number of ranks nor on how batches are divided: a run that continues at
another width continues with the same noise.

Every image has a generator of its own on the model's device, and one draw for all its latents: B
kernels per update, whatever the number of groups, and no wait for the device. A CPU and a GPU
draw different numbers, and so may two kinds of either.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.distributions import Noise


def image_noise(
    positions: Sequence[int],
    config: NVAEConfig,
    device: torch.device | str = "cpu",
    *,
    seed: int,
    rollbacks: int = 0,
) -> Tensor:
    """(B, L) standard normal draws for the images at these positions (>= 0) of the stream.

    The first columns are the coarsest group's. An image takes 4 L bytes: 2 MB in `celeba64`.
    """
    first_key = int.from_bytes(hashlib.sha256(f"{seed}/{rollbacks}".encode()).digest()[:8]) >> 1
    noise = torch.empty(len(positions), config.num_latents, device=device)
    generator = torch.Generator(device)
    for row, position in zip(noise.unbind(), positions, strict=True):
        # Counted on rather than hashed one by one: a CPU generator knows only the lower 32 bits of
        # its key, and so no two of 2**32 images in succession share theirs.
        row.normal_(generator=generator.manual_seed(first_key + position))
    return noise


def by_group(noise: Tensor, config: NVAEConfig) -> Noise:
    """The draws (B, L) as a model asks for them: (B, Z, H, W) for one group after the other, once."""
    shapes = config.latent_shapes
    parts = torch.split(noise, [math.prod(shape) for shape in shapes], dim=1)
    groups = iter([part.view(len(noise), *shape) for part, shape in zip(parts, shapes, strict=True)])

    def next_group(shape: tuple[int, ...]) -> Tensor:
        eps = next(groups)
        if eps.shape != shape:
            raise ValueError(f"noise of shape {tuple(eps.shape)} was asked for as {shape}")
        return eps

    return next_group
