import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae.config import NVAEConfig, NVAEConfigError, problems


def fields_of(values: dict[str, Any]) -> list[str]:
    return [field for field, _ in problems(values)]


def test_the_defaults_are_without_problems() -> None:
    assert problems({}) == []


def test_all_problems_are_reported_together() -> None:
    wrong = {"pixel_bits": 9, "likelihood": "poisson", "squeeze_excitation": 1, "depth": 3}
    assert set(fields_of(wrong)) == set(wrong)
    known = {key: value for key, value in wrong.items() if key != "depth"}
    with pytest.raises(NVAEConfigError) as caught:
        NVAEConfig(**known)  # type: ignore[arg-type]
    assert {field for field, _ in caught.value.problems} == set(known)
    assert "pixel_bits: must be a whole number from 1 to 8, not 9" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"image_size": 30, "preprocess_blocks": 2}, "image_size"),
        ({"image_size": 32, "groups_per_scale": [1] * 5, "preprocess_blocks": 1}, None),
        ({"image_size": 32, "groups_per_scale": [1] * 6, "preprocess_blocks": 1}, "image_size"),
        ({"border_pixels": 16, "image_size": 32}, "border_pixels"),
        ({"likelihood": "bernoulli", "image_channels": 3}, "image_channels"),
        ({"likelihood": "logistic_mixture", "image_channels": 1}, "image_channels"),
        ({"likelihood": "normal", "image_channels": 1}, None),
        ({"image_channels": 2}, "image_channels"),
        ({"groups_per_scale": []}, "groups_per_scale"),
        ({"groups_per_scale": [4, 0]}, "groups_per_scale"),
        ({"groups_per_scale": 4}, "groups_per_scale"),
        ({"groups_per_scale": [True]}, "groups_per_scale"),
        ({"groups_per_scale": [1], "encoder_channels": 16}, "decoder_channels"),
        ({"groups_per_scale": [2], "encoder_channels": 16}, None),
        ({"encoder_channels": 5, "decoder_channels": 3}, None),
        ({"encoder_channels": 4, "cell_family": "mbconv_den"}, "encoder_channels"),
        ({"decoder_channels": 4, "cell_family": "mbconv_den"}, "decoder_channels"),
        ({"decoder_channels": 4, "cell_family": "mbconv_den", "postprocess_cells": 1}, None),
        ({"pixel_bits": True}, "pixel_bits"),
        ({"latent_channels": 2.0}, "latent_channels"),
    ],
)
def test_values_that_do_not_fit_each_other_are_named(values: dict[str, Any], field: str | None) -> None:
    assert fields_of(values) == ([] if field is None else [field])


def test_a_list_of_groups_becomes_a_tuple_so_that_configs_compare_and_hash() -> None:
    config = NVAEConfig(groups_per_scale=[2, 3])  # type: ignore[arg-type]
    assert config == NVAEConfig(groups_per_scale=(2, 3))
    assert hash(config) == hash(NVAEConfig(groups_per_scale=(2, 3)))


def test_a_config_survives_the_way_through_a_plain_dictionary() -> None:
    config = NVAEConfig(groups_per_scale=(2, 3), likelihood="normal", flow_pairs=2)
    assert NVAEConfig(**dataclasses.asdict(config)) == config


@given(
    groups=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    blocks=st.integers(0, 3),
    coarsest=st.integers(1, 4),
)
def test_latents_halve_with_every_coarser_scale_down_to_the_coarsest(
    groups: tuple[int, ...], blocks: int, coarsest: int
) -> None:
    size = coarsest << (blocks + len(groups) - 1)
    if size < 4:
        return
    config = NVAEConfig(image_size=size, groups_per_scale=groups, preprocess_blocks=blocks)
    expected = [
        (20, coarsest << scale, coarsest << scale) for scale, n in enumerate(groups) for _ in range(n)
    ]
    assert list(config.latent_shapes) == expected
    assert config.num_groups == len(expected)


def test_the_border_does_not_count_as_dimensions() -> None:
    mnist = NVAEConfig(image_size=32, border_pixels=2, image_channels=1, likelihood="bernoulli")
    assert mnist.dimensions == 784
    assert NVAEConfig(image_size=64).dimensions == 3 * 64 * 64
