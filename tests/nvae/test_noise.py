"""The noise of training: each image's own, by its place in the stream, and standard normal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, lists
from torch.testing import assert_close

from nvae.noise import by_group, image_noise
from tests.nvae.tiny import tiny_config

CONFIG = tiny_config()
FAR = 2**40


@settings(max_examples=50, deadline=None)
@given(lists(integers(0, FAR), min_size=1, max_size=8, unique=True), integers(1, 8), integers(0, 2**63))
def test_the_noise_of_an_image_is_the_same_in_whatever_batch_it_comes(positions, parts, seed):
    together = image_noise(positions, CONFIG, seed=seed)
    shares = [positions[part::parts] for part in range(parts)]
    apart = {
        position: row
        for share in shares
        for position, row in zip(share, image_noise(share, CONFIG, seed=seed), strict=True)
    }
    assert torch.equal(torch.stack([apart[position] for position in positions]), together)


def test_another_seed_position_or_number_of_rollbacks_is_another_noise():
    reference = image_noise([7], CONFIG, seed=1)
    others = [
        image_noise([8], CONFIG, seed=1),
        image_noise([7 + 50_000], CONFIG, seed=1),
        image_noise([7], CONFIG, seed=2),
        image_noise([7], CONFIG, seed=1, rollbacks=1),
    ]
    assert all(not (other == reference).any() for other in others)


def test_noise_is_standard_normal_within_images_and_from_one_image_to_the_next():
    noise = image_noise(range(2000), CONFIG, seed=3)
    images, latents = noise.shape
    assert latents == 3 * (4 * 4 + 2 * 8 * 8)
    for along, count in ((0, images), (1, latents)):
        # The mean and variance of each latent and of each image; the largest of 2,000 is below 5 deviations.
        assert noise.mean(along).abs().max() < 5 / count**0.5
        assert (noise.var(along) - 1).abs().max() < 6 * (2 / count) ** 0.5
    neighbours = (noise[1:] * noise[:-1]).mean(0)
    assert neighbours.abs().max() < 5 / images**0.5


def test_every_group_gets_latents_of_its_own_coarsest_first():
    noise = image_noise([4, 9], CONFIG, seed=0)
    draw = by_group(noise, CONFIG)
    groups = [draw((2, *shape)) for shape in CONFIG.latent_shapes]
    assert_close(torch.cat([group.flatten(1) for group in groups], dim=1), noise, rtol=0, atol=0)


def test_noise_for_other_images_than_there_are_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match=r"noise of shape \(2, 3, 4, 4\) was asked for as \(5, 3, 4, 4\)"):
        by_group(image_noise([0, 1], CONFIG, seed=0), CONFIG)((5, *CONFIG.latent_shapes[0]))
