"""Models small enough for tests, and repeatable noise."""

from typing import Any

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.distributions import Noise
from nvae.model import NVAE


def tiny_config(**changes: Any) -> NVAEConfig:
    """16x16 colour images, two scales with one and two groups."""
    settings: dict[str, Any] = {
        "image_size": 16,
        "groups_per_scale": (1, 2),
        "latent_channels": 3,
        "encoder_channels": 8,
        "decoder_channels": 8,
        "preprocess_blocks": 1,
        "preprocess_cells": 2,
        "postprocess_cells": 2,
        "mixture_components": 2,
    }
    return NVAEConfig(**settings | changes)


def tiny_model(seed: int = 0, **changes: Any) -> NVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NVAE(tiny_config(**changes))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_noise(seed: int) -> Noise:
    """Standard normal draws: the same ones for every source with this seed."""
    generator = seeded(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def latent_noise(config: NVAEConfig, count: int = 2, seed: int = 1) -> Tensor:
    """(count, L) standard normal draws, as an update takes them."""
    return normal_noise(seed)((count, config.num_latents))


def uniform_noise(seed: int) -> Noise:
    generator = seeded(seed)
    return lambda shape: torch.rand(shape, generator=generator)


def stored_images(config: NVAEConfig, count: int = 2, seed: int = 0) -> Tensor:
    """Random uint8 images, as a loader would hand them over."""
    high = 2 if config.likelihood == "bernoulli" else 256
    shape = (count, config.image_channels, config.image_size, config.image_size)
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=seeded(seed))
