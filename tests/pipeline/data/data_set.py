"""A data set of a few tiny images in several small shards, and the settings to read it by."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import RunConfig
from pipeline.data import shards
from pipeline.data.index import Index

SIZE = 8
TRAINING, VALIDATED = 50, 11


def build(folder: Path, target: str, channels: int = 3, size: int = SIZE) -> Index:
    """A data set of random images in several small shards."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(TRAINING + VALIDATED):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGB" if channels == 3 else "L").save(
            folder / f"images/{number:03d}.png"
        )
    fraction = VALIDATED / (TRAINING + VALIDATED)
    options = {
        "image_size": size,
        "validation_fraction": fraction,
        "channels": channels,
        "shard_bytes": 13_000,
    }
    return shards.build(str(folder / "images"), target, **options).index


def config(*, batch_size: int = 12, model: dict | None = None, seed: int = 1, **data) -> RunConfig:
    settings = {
        "data": {"root": "unused", "shuffle_window": 4} | data,
        "model": {"image_size": SIZE, "preprocess_blocks": 0, "groups_per_scale": (1,)} | (model or {}),
        "train": {"total_images": 10**6, "batch_size": batch_size, "seed": seed},
        "cadence": {"log_images": 1, "evaluate_images": 1, "checkpoint_images": 1},
    }
    return RunConfig.model_validate(settings)
