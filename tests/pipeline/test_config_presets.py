"""The presets: published hyperparameters, published sizes, headings that say where from."""

import json
from pathlib import Path

import pytest
import torch

from nvae.model import NVAE
from pipeline.config_file import load, presets, to_mapping

ROOT = Path(__file__).parents[2]

# Trainable parameters of the published implementation, in millions, to its two decimals.
PUBLISHED_MILLIONS = {
    "mnist": 33.36,
    "cifar10": 130.85,
    "celeba64": 153.28,
    "imagenet32": 268.51,
    "ffhq256": 330.80,
}
# Images of the training split, epochs, epochs of warm-up, GPUs, images per GPU.
PUBLISHED_TRAINING = {
    "mnist": (60_000, 400, 5, 2, 200),
    "cifar10": (50_000, 400, 5, 8, 32),
    "celeba64": (162_770, 90, 5, 8, 16),
    "imagenet32": (1_281_147, 45, 1, 24, 24),
    "celebahq256": (27_000, 300, 5, 24, 4),
    "ffhq256": (63_000, 200, 5, 24, 4),
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_a_preset_has_as_many_parameters_as_the_published_model(name):
    with torch.device("meta"):
        model = NVAE(load(name).model)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert round(count / 1e6, 2) == PUBLISHED_MILLIONS[name]


@pytest.mark.parametrize("name", PUBLISHED_TRAINING)
def test_a_preset_trains_as_long_and_on_as_large_batches_as_published(name):
    images, epochs, warmup_epochs, gpus, images_per_gpu = PUBLISHED_TRAINING[name]
    config = load(name)
    assert config.train.total_images == epochs * images
    assert config.optimizer.warmup_images == warmup_epochs * images
    assert config.train.batch_size == gpus * images_per_gpu
    assert config.train.micro_batch_size == images_per_gpu


def test_groups_grow_towards_the_finer_scales_as_published():
    assert load("ffhq256").model.groups_per_scale == (4, 4, 4, 8, 16)
    assert load("celeba64").model.groups_per_scale == (5, 10, 20)
    assert load("mnist").model.groups_per_scale == (5, 10)


@pytest.mark.parametrize("name", presets())
def test_a_preset_opens_with_its_source_result_cost_and_command(name):
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    heading = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for part in ("Source", "Reaches", "Cost", "Run"):
        assert f"# {part}" in heading
    assert f"nvae train {name}" in heading


def test_the_benchmark_measures_the_models_of_the_presets():
    """The benchmark runs where only torch is installed, so it cannot read YAML."""
    recorded = json.loads((ROOT / "tests" / "benchmarks" / "presets.json").read_text())
    assert recorded == {name: to_mapping(load(name))["model"] for name in recorded}
    assert "ffhq256" in recorded
