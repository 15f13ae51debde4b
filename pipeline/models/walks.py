# B images; Z latent channels, H, W of one group.
"""Between two images, and around one: interpolation and traversal of the latents.

The latents of an image are written as the noise that the priors would have drawn them from:
eps = (z - mu_p) / sigma_p, group by group on the way down. From this noise `NVAE.sample` gives back
the reconstruction, so that an image that was encoded and one that was drawn from a seed are
the same kind of thing, and both can be mixed and changed without touching the model.

Interpolation turns one noise into the other on the sphere, each group for itself: a mean of two
normal draws is shorter than either by a factor of 0.7, which the decoder shows as an image at a
lower temperature, flat and average. Lengths are interpolated linearly, since the noise of
an encoded image may be shorter or longer than a draw; so the ends are exact.

Rejected: interpolating z itself. The priors of the finer groups move with the coarser latents;
finer latents that stay behind are improbable under them. In noise they move along.
Rejected, too: one sphere for all groups together. The finest groups have nearly all of the dimensions,
and their angle would decide how the coarse ones turn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.distributions import Noise
from nvae.model import NVAE
from nvae.pixels import to_model
from pipeline.models.inference import inference, latent_noise
from pipeline.models.sampling import Images, Temperature, picture, tempered

Latents = tuple[Tensor, ...]
"""The noise of each group, coarsest first: (B, Z, H, W), standard normal under the priors."""

# Draws 0 and 1 of an image are its sample and batch norm's recalibration.
_RESAMPLING_DRAW = 2


def drawn(model: NVAE, seed: int, indices: Sequence[int], temperature: Temperature, draw: int = 0) -> Latents:
    """The latents of the samples with these numbers, as `sample_images` draws them."""
    with inference(model) as device:
        noise = tempered(latent_noise(seed, indices, device, draw), temperature, model.config)
        return tuple(noise((len(indices), *shape)) for shape in model.config.latent_shapes)


def encoded(model: NVAE, images: Tensor) -> Latents:
    """The latents of images, uint8 (B, C, H, W) with the border: their posteriors' means.

    Means, and not draws: whoever names an image expects this one, each time.
    """
    with inference(model) as device:
        groups = model(to_model(images.to(device), model.config), _no_noise(device)).groups
        return tuple((group.z - group.prior.mu) / group.prior.sigma for group in groups)


def decoded(model: NVAE, latents: Latents, batch_size: int = 16) -> Images:
    """The images (N, H, W, C) that these latents are of, their pixels at their means."""
    batches = zip(*(torch.split(group, batch_size) for group in latents), strict=True)
    with inference(model):
        pictures = [
            picture(model.sample(len(batch[0]), _given(batch)).mean(), model.config) for batch in batches
        ]
    return np.concatenate(pictures)


def between(start: Latents, end: Latents, steps: int) -> Latents:
    """`steps` >= 2 latents from `start` to `end`, each of one image, both included."""
    positions = torch.linspace(0, 1, steps).tolist()
    return tuple(
        torch.cat([_turned(one, other, position) for position in positions])
        for one, other in zip(start, end, strict=True)
    )


def _turned(start: Tensor, end: Tensor, position: float) -> Tensor:
    """Between two vectors (1, Z, H, W) on the sphere, its radius linear in `position`, 0 to 1."""
    if position in (0, 1):
        return start if position == 0 else end
    lengths = start.norm(), end.norm()
    if min(lengths) == 0:
        return torch.lerp(start, end, position)
    one, other = start / lengths[0], end / lengths[1]
    angle = (one * other).sum().clamp(-1, 1).acos()
    # Parallel or opposite: there is no arc, or there are many.
    if angle.sin() < 1e-4:
        return torch.lerp(start, end, position)
    direction = (((1 - position) * angle).sin() * one + (position * angle).sin() * other) / angle.sin()
    turned: Tensor = direction * torch.lerp(lengths[0], lengths[1], position)
    return turned


def resampled(
    model: NVAE, kept: Latents, groups: Sequence[int], count: int, seed: int, temperature: Temperature
) -> Latents:
    """`count` images that share all latents of the one in `kept` but those of `groups`, drawn anew.

    What the others share is their noise: they follow the priors that the new ones give them.
    """
    new = drawn(model, seed, range(count), temperature, _RESAMPLING_DRAW)
    return tuple(
        new[group] if group in groups else eps.expand(count, -1, -1, -1) for group, eps in enumerate(kept)
    )


def rows_of_groups(config: NVAEConfig, each_group: bool, with_finer: bool) -> list[range]:
    """Which groups each row of a traversal draws anew, coarsest first: those of one scale, or one group.

    `with_finer` adds all that follow.
    """
    rows, first = [], 0
    for groups in [1] * config.num_groups if each_group else config.groups_per_scale:
        rows.append(range(first, config.num_groups if with_finer else first + groups))
        first += groups
    return rows


def _given(latents: Sequence[Tensor]) -> Noise:
    groups = iter(latents)

    def noise(shape: tuple[int, ...]) -> Tensor:
        eps = next(groups)
        if eps.shape != shape:
            raise ValueError(f"latents of shape {tuple(eps.shape)} were asked for as {shape}")
        return eps

    return noise


def _no_noise(device: torch.device) -> Noise:
    return lambda shape: torch.zeros(shape, device=device)
