"""The objective against recorded values, and against sums written out."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nvae.config import NVAEConfig
from nvae.model import Output
from nvae.objective import (
    active_channels,
    balance,
    balancing_capacities,
    bits_per_dim,
    importance_weighted_bound,
    kl_per_group,
    log_importance_weight,
    nelbo,
    reconstruction,
)
from nvae.pixels import to_model
from tests.nvae.published_cases import ORACLE
from tests.nvae.tiny import normal_noise, seeded, stored_images, tiny_config, tiny_model

RECORDED = ORACLE / "schedules.npz"
NEEDS_RECORDED = pytest.mark.skipif(not RECORDED.exists(), reason=f"no schedules.npz in {ORACLE}")


def encoded(**changes: Any) -> tuple[Output, Tensor, NVAEConfig]:
    model = tiny_model(**changes).eval()
    images = to_model(stored_images(model.config), model.config)
    return model(images, normal_noise(0)), images, model.config


@NEEDS_RECORDED
@pytest.mark.parametrize("number", range(9))
def test_capacities_are_the_published_ones(number):
    with np.load(RECORDED) as recorded:
        groups = recorded[f"groups_{number}"].tolist()
        expected = torch.from_numpy(recorded[f"groups_{number}_alpha_square"])
    # The published list begins with the finest scale.
    assert_close(balancing_capacities(groups[::-1]), expected)


@NEEDS_RECORDED
def test_the_balance_is_the_published_one():
    with np.load(RECORDED) as recorded:
        kl, beta = torch.from_numpy(recorded["klbal_kl"]), float(recorded["klbal_beta"])
        config = NVAEConfig(groups_per_scale=recorded["klbal_groups"].tolist()[::-1], image_size=64)
        gamma = balance(kl, torch.ones(len(kl)), config)
        assert_close(gamma, torch.from_numpy(recorded["klbal_coeffs"]))
        assert_close(beta * kl @ gamma, torch.from_numpy(recorded["klbal_out"]))


def test_images_without_weight_do_not_count_in_the_balance():
    config, kl = tiny_config(), torch.rand(4, 3, generator=seeded(0))
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert_close(balance(kl, weights, config), balance(kl[::2], torch.ones(2), config))


def test_the_border_does_not_count_in_the_reconstruction():
    output, images, config = encoded(likelihood="bernoulli", image_channels=1, border_pixels=2)
    log_prob = output.likelihood.log_prob(images)
    assert_close(reconstruction(output, images, config), -log_prob[:, 2:14, 2:14].sum((1, 2)))
    whole = replace(config, border_pixels=0)
    assert_close(reconstruction(output, images, whole), -log_prob.sum((1, 2)))


def test_one_importance_weighted_draw_is_minus_the_nelbo_with_the_drawn_kl():
    output, images, config = encoded(flow_pairs=1)
    cost = reconstruction(output, images, config)
    # With flows the KL is the drawn log q - log p.
    bound = importance_weighted_bound(log_importance_weight(output, cost)[None])
    assert_close(bound, -nelbo(cost, kl_per_group(output)))


def test_the_importance_weighted_bound_is_the_log_of_the_mean_weight():
    log_weights = torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
    assert_close(importance_weighted_bound(log_weights), log_weights.exp().mean(0).log())
    # Weights that no float can hold.
    assert_close(importance_weighted_bound(log_weights - 5000), importance_weighted_bound(log_weights) - 5000)


def test_a_uniform_model_of_bytes_costs_eight_bits_per_dim():
    config = tiny_config(border_pixels=1)
    assert bits_per_dim(3 * 14**2 * math.log(256), config) == pytest.approx(8)


def test_a_channel_is_active_above_a_tenth_of_a_nat():
    assert active_channels(torch.tensor([0.0, 0.1, 0.11, 3.0])).tolist() == [False, False, True, True]
