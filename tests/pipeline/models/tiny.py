"""A model that is small enough for every test, and the configuration around it."""

from typing import Any

import torch

from nvae.config import NVAEConfig
from nvae.model import NVAE
from pipeline import config_file
from pipeline.config import RunConfig

TINY = {
    "image_size": 8,
    "groups_per_scale": [1, 2],
    "latent_channels": 2,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "preprocess_blocks": 1,
    "preprocess_cells": 1,
    "postprocess_cells": 1,
    "mixture_components": 2,
}


def tiny_config(**model: Any) -> RunConfig:
    return config_file.from_mapping(
        {
            "data": {"root": "/no/data"},
            "model": TINY | model,
            "train": {"total_images": 100, "batch_size": 4},
            "cadence": {"log_images": 4, "evaluate_images": 8, "checkpoint_images": 8},
            "sampling": {"count": 2},
        }
    )


def tiny_model(seed: int = 0, **model: Any) -> NVAE:
    """A model whose random weights make a difference: its priors depend on the coarser latents."""
    torch.manual_seed(seed)
    made = NVAE(tiny_config(**model).model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def tiny_images(count: int, config: NVAEConfig, seed: int = 0) -> torch.Tensor:
    """(count, C, H, W) uint8, as the loader gives them."""
    shape = (count, config.image_channels, config.image_size, config.image_size)
    highest = 2 if config.likelihood == "bernoulli" else 256
    return torch.randint(highest, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
