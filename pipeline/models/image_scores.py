# B images, G latent groups (coarsest first), Z channels of a group, K draws, C colours, H x W pixels.
"""What a model says of single images, from K draws that share one pass of the encoder.

A pass down the decoder takes as many rows, images times draws, as the caller says that memory
holds. Draws are then added up one by one in float64, in their own order: in how many passes they
were made changes the kernels' rounding at most. The log-weights are never kept: their
log-sum-exp is carried from draw to draw, so that K may be a thousand.

Rejected: one image at a time with all its draws. A decoder pass is no faster for it, and the
encoder, which sees one image then, is several times slower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvae.model import NVAE, Features, Output
from nvae.objective import kl_per_channel, log_importance_weight, reconstruction
from nvae.pixels import centred, crop_border
from pipeline.models.inference import latent_noise


@dataclass(frozen=True)
class ImageScores:
    """Of each image by itself, in float64; all but `log_likelihood` are means over the draws."""

    reconstruction: Tensor
    """(B,) -log p(x given z), nats."""
    kl_per_channel: Tensor
    """(B, G, Z) nats."""
    log_likelihood: Tensor
    """(B,) the importance-weighted estimate of log p(x), nats."""
    squared_error: Tensor
    """(B,) mean over colour values, on 0..255, of the distance of the likelihood's mean."""
    posterior_means: Tensor
    """(B, L) of all latents, the coarsest group's first."""


def score_images(
    model: NVAE, images: Tensor, positions: Sequence[int], draws: int, *, rows: int, seed: int
) -> ImageScores:
    """Scores of `images` (B, C, H, W), as the model takes them, at these places of the split.

    `rows` is how many images times draws the decoder takes at once; B if that is more. The noise
    is a function of seed, place and draw. To be called within `inference(model)`.
    """
    features = model.encode(images)
    together = max(1, rows // len(images))
    sums: list[Tensor] | None = None
    log_sum = images.new_full((len(images),), -math.inf, dtype=torch.float64)
    for first in range(0, draws, together):
        numbers = range(first, min(first + together, draws))
        noise = latent_noise(seed, positions, images.device, numbers)
        count = len(numbers)
        repeated = images.repeat(count, 1, 1, 1)
        output = model.decode(_repeated(features, count), noise)
        *means, log_weights = _row_scores(output, repeated, model)
        for draw in range(count):
            part = slice(draw * len(images), (draw + 1) * len(images))
            log_sum = torch.logaddexp(log_sum, log_weights[part].double())
            now = [each[part].double() for each in means]
            sums = now if sums is None else [old + new for old, new in zip(sums, now, strict=True)]
    assert sums is not None, "at least one draw is needed"
    reconstruction_B, kl_BGZ, error_B, latents_BL = (each / draws for each in sums)
    return ImageScores(reconstruction_B, kl_BGZ, log_sum - math.log(draws), error_B, latents_BL)


def _repeated(features: Features, count: int) -> Features:
    if count == 1:
        return features
    return Features(tuple(each.repeat(count, 1, 1, 1) for each in features.per_group))


def _row_scores(output: Output, images: Tensor, model: NVAE) -> tuple[Tensor, ...]:
    """Of each row: reconstruction, KL (G, Z), squared error, posterior means (L,), log-weight."""
    config = model.config
    reconstruction_R = reconstruction(output, images, config)
    original = centred(images, config) / 2 + 0.5
    distance = crop_border(output.likelihood.mean() - original, config.border_pixels)
    return (
        reconstruction_R,
        kl_per_channel(output),
        (255 * distance.double()).square().mean(dim=(1, 2, 3)),
        torch.cat([group.posterior.mu.flatten(1) for group in output.groups], dim=1),
        log_importance_weight(output, reconstruction_R),
    )
