# B images, C colours, H x W pixels.
"""uint8 images and what the model makes of them: the one place where the pixel range is decided.

Stored images are uint8: 0..255, or 0 and 1 where the likelihood is bernoulli. The model works
on n-bit levels in [-1, 1], or on 0 and 1. Likelihoods give means and draws in [0, 1].
"""

import torch
from torch import Tensor

from nvae.config import NVAEConfig


def to_model(images: Tensor, config: NVAEConfig) -> Tensor:
    """uint8 (B, C, H, W) as the model takes them: fp32, in [-1, 1] (bernoulli: 0 and 1).

    Values keep their highest `pixel_bits` bits: 2**bits levels, evenly spaced from -1 to 1.
    Raises ValueError for other types, since floats would be scaled twice.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}; pass stored pixels, unscaled")
    if config.likelihood == "bernoulli":
        return images.float()
    levels = images >> (8 - config.pixel_bits)
    in_unit_range: Tensor = levels.float() / (2**config.pixel_bits - 1)
    return 2 * in_unit_range - 1


def centred(images: Tensor, config: NVAEConfig) -> Tensor:
    """Images as the model takes them, in [-1, 1] whatever the likelihood: what the stem sees."""
    return 2 * images - 1 if config.likelihood == "bernoulli" else images


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1], as likelihoods give them, as uint8 0..255."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def crop_border(per_pixel: Tensor, border_pixels: int) -> Tensor:
    """(..., H, W) without the padding on each side, which does not count in the likelihood."""
    if border_pixels == 0:
        return per_pixel
    return per_pixel[..., border_pixels:-border_pixels, border_pixels:-border_pixels]
