from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae.config import NVAEConfig
from nvae.pixels import centred, crop_border, to_model, to_uint8

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


@given(bits=st.integers(1, 8))
def test_every_stored_value_becomes_its_highest_bits_spread_from_minus_one_to_one(bits: int) -> None:
    levels = to_model(EVERY_VALUE, NVAEConfig(pixel_bits=bits)).flatten().tolist()
    exact = [2 * Fraction(value // 2 ** (8 - bits), 2**bits - 1) - 1 for value in range(256)]
    assert levels == pytest.approx([float(level) for level in exact], abs=1e-7)
    assert len(set(levels)) == 2**bits
    assert levels[0] == -1
    assert levels[-1] == 1


@given(bits=st.integers(1, 7))
def test_levels_are_those_of_the_published_formula(bits: int) -> None:
    x = EVERY_VALUE.float() / 255
    published = torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)
    assert torch.equal(to_model(EVERY_VALUE, NVAEConfig(pixel_bits=bits)), 2 * published - 1)


def test_eight_bit_images_survive_the_way_to_the_model_and_back() -> None:
    levels = to_model(EVERY_VALUE, NVAEConfig())
    assert torch.equal(to_uint8((levels + 1) / 2), EVERY_VALUE)


def test_binary_images_stay_zero_and_one_and_are_centred_for_the_stem() -> None:
    config = NVAEConfig(likelihood="bernoulli", image_channels=1)
    images = torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2)
    assert to_model(images, config).flatten().tolist() == [0, 1]
    assert centred(to_model(images, config), config).flatten().tolist() == [-1, 1]


def test_images_that_were_scaled_already_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_model(torch.rand(1, 3, 4, 4), NVAEConfig())


def test_means_outside_the_pixel_range_are_clamped_on_the_way_out() -> None:
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]


@given(border=st.integers(0, 3))
def test_the_border_is_cut_from_every_side(border: int) -> None:
    image = torch.arange(64).view(1, 8, 8)
    kept = [[r * 8 + c for c in range(border, 8 - border)] for r in range(border, 8 - border)]
    assert crop_border(image, border)[0].tolist() == kept
