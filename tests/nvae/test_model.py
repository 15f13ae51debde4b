import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nvae.batch_norm import ActivationCheckpointing, BatchNorm
from nvae.cells import CELL_FAMILIES
from nvae.config import CellFamily, NVAEConfig
from nvae.distributions import Noise
from nvae.layers import Conv2d
from nvae.model import NVAE, Output
from nvae.pixels import to_model
from tests.nvae.tiny import normal_noise, stored_images, tiny_model, uniform_noise

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "flows": {"flow_pairs": 2},
    "no residual posteriors": {"residual_posterior": False},
    "no gates": {"squeeze_excitation": False},
    "unequal widths": {"encoder_channels": 5, "decoder_channels": 7},
    "one scale": {"groups_per_scale": (2,)},
    "three scales": {"groups_per_scale": (1, 1, 2)},
    "two cells per group": {"encoder_cells_per_group": 2, "decoder_cells_per_group": 2},
    "two blocks of one cell": {"preprocess_blocks": 2, "preprocess_cells": 1, "postprocess_cells": 1},
    "no blocks": {"preprocess_blocks": 0},
    "plain": {"groups_per_scale": (1,)},
    "plain with flows": {"groups_per_scale": (1,), "flow_pairs": 1},
    "5 bits": {"pixel_bits": 5},
    "normal": {"likelihood": "normal"},
    "grey": {"likelihood": "normal", "image_channels": 1},
    "binary": {"likelihood": "bernoulli", "image_channels": 1, "border_pixels": 2},
}
EVERY_VARIANT = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
SOME = ("default", "flows", "plain with flows", "normal", "binary")
SOME_VARIANTS = pytest.mark.parametrize("changes", [VARIANTS[name] for name in SOME], ids=SOME)


def images_for(model: NVAE, count: int = 2) -> Tensor:
    return to_model(stored_images(model.config, count), model.config)


def loss_of(output: Output, images: Tensor) -> Tensor:
    """The NELBO, summed over images, border included."""
    kl = torch.stack([group.kl for group in output.groups])
    return kl.sum() - output.likelihood.log_prob(images).sum()


# --- shapes and wiring -------------------------------------------------------------------------


@EVERY_VARIANT
def test_a_pass_gives_every_group_and_every_pixel_of_every_image(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    images, config = images_for(model), model.config
    output = model(images, normal_noise(0))
    assert [tuple(group.z.shape[1:]) for group in output.groups] == list(config.latent_shapes)
    for group in output.groups:
        assert group.kl_per_channel.shape == (2, config.latent_channels)
        assert group.kl.shape == group.log_q.shape == group.log_p.shape == (2,)
    assert output.likelihood.log_prob(images).shape == (2, config.image_size, config.image_size)
    for picture in (output.likelihood.mean(), output.likelihood.sample(uniform_noise(1))):
        assert picture.shape == images.shape
        assert 0 <= picture.min() <= picture.max() <= 1


@EVERY_VARIANT
def test_every_parameter_takes_part_in_training(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    images = images_for(model)
    loss_of(model(images, normal_noise(0)), images).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("family", CELL_FAMILIES)
def test_every_cell_family_trains_and_samples(family: CellFamily) -> None:
    model = tiny_model(cell_family=family)
    images = images_for(model)
    loss = loss_of(model(images, normal_noise(0)), images)
    loss.backward()
    assert loss.isfinite()
    assert model.eval().sample(2, normal_noise(1)).mean().isfinite().all()


def test_a_model_of_residual_elu_cells_repeats_its_values_after_loading() -> None:
    trained, loaded = tiny_model(cell_family="res_elu"), tiny_model(seed=1, cell_family="res_elu")
    images = images_for(trained)
    trained(images, normal_noise(0))
    loaded.load_state_dict(trained.state_dict())
    expected = trained.eval()(images, normal_noise(1)).likelihood.logits
    assert torch.equal(loaded.train()(images, normal_noise(1)).likelihood.logits, expected)


@SOME_VARIANTS
def test_forward_is_encode_then_decode(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes).eval()
    images = images_for(model)
    together = model(images, normal_noise(0))
    apart = model.decode(model.encode(images), normal_noise(0))
    assert torch.equal(together.likelihood.logits, apart.likelihood.logits)
    assert all(torch.equal(a.kl, b.kl) for a, b in zip(together.groups, apart.groups, strict=True))


@EVERY_VARIANT
def test_noise_is_asked_for_once_per_group_coarsest_first(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes).eval()
    asked: list[tuple[int, ...]] = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        asked.append(shape)
        return torch.zeros(shape)

    expected = [(2, *shape) for shape in model.config.latent_shapes]
    model(images_for(model), noise)
    assert asked == expected
    asked.clear()
    model.sample(2, noise)
    assert asked == expected


# --- latents -----------------------------------------------------------------------------------


def test_the_first_prior_is_standard_normal_with_the_floor_added_to_sigma() -> None:
    first = tiny_model()(torch.zeros(2, 3, 16, 16), normal_noise(0)).groups[0]
    assert not first.prior.mu.any()
    assert_close(first.prior.sigma, torch.full_like(first.prior.sigma, 1.01))


def test_with_residual_posteriors_a_silent_encoder_repeats_the_prior() -> None:
    model = tiny_model().eval()
    for head in model.posterior_heads:
        assert isinstance(head, Conv2d)
        assert head.bias is not None
        assert head.log_weight_norm is not None
        head.bias.data.zero_()
        head.log_weight_norm.data.fill_(-1000)
    output = model(images_for(model), normal_noise(0))
    for group in output.groups:
        assert_close(group.kl, torch.zeros(2), atol=1e-5, rtol=0)
        assert_close(group.log_q, group.log_p)
    assert output.groups[1].prior.mu.any()


def test_without_flows_kl_is_the_mean_log_ratio_of_many_draws() -> None:
    model = tiny_model(groups_per_scale=(1,)).eval()
    features = model.encode(images_for(model, 1))
    with torch.no_grad():
        noise = normal_noise(0)
        groups = [model.decode(features, noise).groups[0] for _ in range(500)]
    ratios = torch.stack([group.log_q - group.log_p for group in groups])
    standard_error = ratios.std().item() / len(ratios) ** 0.5
    assert groups[0].kl.item() == pytest.approx(ratios.mean().item(), abs=5 * standard_error)


def test_with_flows_kl_is_the_log_ratio_of_the_draw_before_and_after_them() -> None:
    output = tiny_model(flow_pairs=1)(torch.zeros(2, 3, 16, 16), normal_noise(0))
    for group in output.groups:
        assert not torch.equal(group.drawn, group.z)
        expected = group.posterior.log_prob(group.drawn) - group.prior.log_prob(group.z)
        assert_close(group.kl_per_channel, expected.sum((2, 3)))
        assert_close(group.kl, group.log_q - group.log_p, atol=1e-3, rtol=1e-4)


def test_a_temperature_is_the_same_as_shorter_noise() -> None:
    model, noise = tiny_model(flow_pairs=1).eval(), normal_noise(0)
    drawn: list[Tensor] = []

    def shorter(shape: tuple[int, ...]) -> Tensor:
        drawn.append(noise(shape))
        return 0.7 * drawn[-1]

    expected = model.sample(2, shorter).logits
    assert_close(model.sample(2, replay(drawn), temperature=0.7).logits, expected)


def replay(draws: list[Tensor]) -> Noise:
    remaining = iter(draws)
    return lambda shape: next(remaining)


def test_samples_of_different_noise_differ_and_of_one_noise_do_not() -> None:
    model = tiny_model().eval()
    first, again, other = (model.sample(2, normal_noise(seed)).logits for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# --- precision and memory ----------------------------------------------------------------------


@SOME_VARIANTS
def test_bfloat16_stays_close_and_keeps_distributions_in_float32(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    images = images_for(model, 4)
    expected = model(images, normal_noise(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, normal_noise(0))
        loss = loss_of(found, images)
    assert loss.dtype == found.likelihood.logits.dtype == torch.float32
    for group in found.groups:
        assert {t.dtype for t in (group.z, group.kl, group.prior.sigma, group.posterior.mu)} == {
            torch.float32
        }
    assert loss.item() == pytest.approx(loss_of(expected, images).item(), rel=0.02)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}  # type: ignore[union-attr]


def test_convolutions_of_the_towers_run_in_bfloat16() -> None:
    model, seen = tiny_model(), []
    for cell in model.decoder_tower.modules():
        if isinstance(cell, BatchNorm):
            cell.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(images_for(model), normal_noise(0))
    assert set(seen) == {torch.bfloat16}


@SOME_VARIANTS
def test_a_model_in_float64_computes_in_float64(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes).double()
    output = model(images_for(model).double(), normal_noise(0))
    assert output.likelihood.logits.dtype == torch.float64
    assert {group.kl.dtype for group in output.groups} == {torch.float64}


@pytest.mark.parametrize("mode", ["none", "cells"])
@pytest.mark.parametrize("family", ["res_mbconv", "res_elu"])
def test_checkpointing_changes_neither_values_nor_gradients_nor_statistics(
    mode: ActivationCheckpointing, family: CellFamily
) -> None:
    reference = tiny_model(flow_pairs=1, cell_family=family)
    model = copy.deepcopy(reference)
    reference.set_activation_checkpointing("batch_norm")
    model.set_activation_checkpointing(mode)
    images = images_for(model)
    for one in (reference, model):
        loss_of(one(images, normal_noise(0)), images).backward()
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    for (name, ours), expected in pairs:
        assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for ours, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert_close(ours, expected)


# --- size --------------------------------------------------------------------------------------

_PUBLISHED = NVAEConfig(encoder_cells_per_group=2, decoder_cells_per_group=2)
_COLOUR = dataclasses.replace(_PUBLISHED, preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2)


def published(width: int, groups: tuple[int, ...], size: int, flow_pairs: int) -> NVAEConfig:
    return dataclasses.replace(
        _COLOUR,
        encoder_channels=width,
        decoder_channels=width,
        groups_per_scale=groups,
        image_size=size,
        flow_pairs=flow_pairs,
    )


@functools.cache
def without_memory(config: NVAEConfig) -> NVAE:
    with torch.device("meta"):
        return NVAE(config)


FFHQ = published(30, (4, 4, 4, 8, 16), 256, 2)
MNIST = dataclasses.replace(
    _PUBLISHED, groups_per_scale=(5, 10), likelihood="bernoulli", image_channels=1, border_pixels=2
)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(MNIST, 33.36, id="mnist"),
        pytest.param(published(128, (30,), 32, 1), 130.85, id="cifar10"),
        pytest.param(published(64, (5, 10, 20), 64, 1), 153.28, id="celeba64"),
        pytest.param(published(192, (28,), 32, 1), 268.51, id="imagenet32"),
        pytest.param(FFHQ, 330.80, id="ffhq256"),
    ],
)
def test_published_models_have_their_published_number_of_parameters(
    config: NVAEConfig, millions: float
) -> None:
    model = without_memory(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_the_ffhq_model_has_its_published_number_of_layers() -> None:
    model = without_memory(FFHQ)
    assert sum(isinstance(module, Conv2d) for module in model.modules()) == 986
    assert sum(isinstance(module, BatchNorm) for module in model.modules()) == 460


def test_a_model_without_memory_shows_its_shapes() -> None:
    model = without_memory(published(30, (1, 1), 64, 1)).eval()
    images = torch.empty(1, 3, 64, 64, device="meta")
    output = model(images, lambda shape: torch.empty(shape, device="meta"))
    assert output.likelihood.logits.shape == (1, 100, 64, 64)
