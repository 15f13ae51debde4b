import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers

from nvae.model import NVAE
from pipeline.models import walks
from pipeline.models.sampling import Images, reconstruct, sample_images
from tests.pipeline.models.tiny import tiny_images, tiny_model

MODEL = tiny_model()
GREY = {"likelihood": "bernoulli", "image_channels": 1, "border_pixels": 1}


def nearly_equal(a: Images, b: Images) -> bool:
    """Equal but for one grey level of rounding."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max(initial=0)) <= 1


def latents(seed: int) -> walks.Latents:
    return walks.drawn(MODEL, seed, [0], 0.7)


def test_the_latents_of_a_sample_give_back_the_sample():
    decoded = walks.decoded(MODEL, walks.drawn(MODEL, 5, range(7), [1.0, 0.6]), batch_size=3)
    assert nearly_equal(decoded, sample_images(MODEL, 7, [1.0, 0.6], seed=5))


@pytest.mark.parametrize("model", [{}, GREY, {"flow_pairs": 1}, {"residual_posterior": False}])
def test_the_latents_of_an_image_give_back_its_reconstruction(model):
    network: NVAE = tiny_model(**model)
    images = tiny_images(3, network.config)
    expected = reconstruct(network, images, temperature=0)[1::2]
    assert nearly_equal(walks.decoded(network, walks.encoded(network, images)), expected)


def test_an_interpolation_ends_at_its_ends():
    start, end = latents(1), latents(2)
    way = walks.between(start, end, 5)
    assert all(torch.equal(group[:1], one) for group, one in zip(way, start, strict=True))
    assert all(torch.equal(group[-1:], other) for group, other in zip(way, end, strict=True))


@settings(max_examples=30, deadline=None)
@given(seed=integers(0, 1000), steps=integers(3, 9), factor=floats(0.1, 10))
def test_an_interpolation_turns_at_one_pace_and_its_length_changes_at_one(seed, steps, factor):
    one, other = latents(seed), tuple(factor * eps for eps in latents(seed + 1))
    for group in walks.between(one, other, steps):
        vectors = group.flatten(1).double()
        pairs = itertools.pairwise(vectors)
        angles = [torch.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos() for a, b in pairs]
        assert max(angles) - min(angles) < 1e-3
        lengths = vectors.norm(dim=1)
        assert torch.allclose(lengths, torch.linspace(lengths[0], lengths[-1], steps).double(), rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0])
def test_an_interpolation_to_nothing_itself_or_the_opposite_stays_finite(factor):
    start = latents(3)
    way = walks.between(start, tuple(factor * eps for eps in start), 5)
    assert all(group.isfinite().all() for group in way)


def test_an_image_interpolated_with_itself_stands_still():
    pictures = walks.decoded(MODEL, walks.between(latents(4), latents(4), 4))
    assert all(nearly_equal(pictures[:1], each[None]) for each in pictures)


def test_resampling_changes_the_latents_of_its_groups_and_no_others():
    kept = latents(0)
    varied = walks.resampled(MODEL, kept, [1], 4, seed=0, temperature=0.7)
    assert torch.equal(varied[0], kept[0].expand_as(varied[0]))
    assert torch.equal(varied[2], kept[2].expand_as(varied[2]))
    # The same seed as of the image that is varied: its own latents must not come again.
    assert all(not torch.equal(each, kept[1][0]) for each in varied[1])
    assert len({each.numpy().tobytes() for each in varied[1]}) == 4


def test_rows_are_scales_or_groups_alone_or_with_all_that_follow():
    rows = [
        [list(row) for row in walks.rows_of_groups(MODEL.config, each_group, finer)]
        for each_group, finer in itertools.product([False, True], repeat=2)
    ]
    assert rows == [[[0], [1, 2]], [[0, 1, 2], [1, 2]], [[0], [1], [2]], [[0, 1, 2], [1, 2], [2]]]
