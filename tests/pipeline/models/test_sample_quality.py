"""FID, precision and recall beside slow and obvious versions of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.inception import InceptionError
from pipeline.models.sample_quality import (
    EXACT,
    LARGEST,
    STEPS,
    Features,
    frechet_distance,
    precision_and_recall,
    whole,
)

CPU = torch.device("cpu")


class Alone:
    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


class Beside:
    """One of two ranks, whose colleague has these features."""

    def __init__(self, other: Features) -> None:
        self._parts = [other.sums, other.products, other.rows, other.count, other.seen]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor + self._parts.pop(0)


def drawn(count: int, features: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, features, generator=generator)).abs()


def collected(values: Tensor, places: Tensor | None = None, kept: int = 1000, batch: int = 7) -> Features:
    features = Features(values.shape[1], kept, CPU)
    places = torch.arange(len(values)) if places is None else places
    for start in range(0, len(values), batch):
        features.add(values[start : start + batch], places[start : start + batch])
    return features


def test_moments_are_those_of_the_rounded_features():
    values = drawn(50, 6, 0)
    mean, covariance = collected(values).moments()
    rounded = ((values.double() * STEPS).round() / STEPS).numpy()
    assert np.allclose(mean.numpy(), rounded.mean(0), rtol=0, atol=1e-14)
    assert np.allclose(covariance.numpy(), np.cov(rounded.T), rtol=0, atol=1e-13)


@settings(deadline=None)
@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_whoever_adds_what_in_which_order_the_totals_are_the_same_to_the_last_bit(cut, chance):
    values, order = drawn(31, 5, 1, spread=3.0), list(range(31))
    chance.shuffle(order)
    whole_set, shuffled = collected(values), torch.tensor(order)
    first, second = shuffled[:cut], shuffled[cut:]
    other = collected(values[second], second, batch=3)
    merged = collected(values[first], first, batch=4).merged(Beside(other))
    for name, part in whole_set.tensors().items():
        assert torch.equal(merged.tensors()[name], part), name
    assert torch.equal(merged.kept, whole_set.kept)


def test_the_distance_of_normals_that_do_not_mix_dimensions_is_known():
    means = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 2.0]).double()
    spreads = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 1.0]).double()
    expected = 3**2 + 4**2 + (2 - 5) ** 2 + (3 - 1) ** 2
    found = frechet_distance((means[0], torch.diag(spreads[0] ** 2)), (means[1], torch.diag(spreads[1] ** 2)))
    assert found == pytest.approx(expected, rel=1e-12)


def slow_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """By the eigenvalues of the product itself, which is not symmetric."""
    product = first[1].numpy() @ second[1].numpy()
    overlap = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    apart = ((first[0] - second[0]) ** 2).sum().item()
    return float(apart + first[1].trace() + second[1].trace() - 2 * overlap)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8), st.integers(20, 60))
def test_the_distance_is_that_of_the_textbook_symmetric_and_zero_to_oneself(seed, size, count):
    first = collected(drawn(count, size, seed)).moments()
    second = collected(drawn(count + 3, size, seed + 1, spread=1.5)).moments()
    found = frechet_distance(first, second)
    assert found == pytest.approx(slow_distance(first, second), rel=1e-6, abs=1e-9)
    assert found == pytest.approx(frechet_distance(second, first), rel=1e-8, abs=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features_have_a_distance_too():
    first, second = (collected(drawn(5, 20, seed)).moments() for seed in (0, 1))
    assert np.isfinite(frechet_distance(first, second))


def slow_share(points: list[list[int]], centres: list[list[int]]) -> float:
    def squared(a: list[int], b: list[int]) -> int:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    radii = [
        sorted(squared(centre, other) for j, other in enumerate(centres) if j != i)[2]
        for i, centre in enumerate(centres)
    ]
    within = [
        any(squared(point, centre) <= radius for centre, radius in zip(centres, radii, strict=True))
        for point in points
    ]
    return sum(within) / len(points)


clouds = st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=4, max_size=14)


@settings(deadline=None)
@given(clouds, clouds)
def test_precision_and_recall_are_those_of_the_loops(images, samples):
    found = precision_and_recall(torch.tensor(images).double(), torch.tensor(samples).double())
    assert found == (slow_share(samples, images), slow_share(images, samples))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 257.0, -257.0])
def test_features_that_could_not_be_summed_exactly_are_refused(bad):
    with pytest.raises(InceptionError, match="not its weights"):
        whole(torch.tensor([[0.5, bad]]))


def test_the_largest_distances_are_exact():
    """Of two images all of whose features are at the limit, on opposite sides."""
    assert 2048 * (2 * LARGEST * STEPS) ** 2 <= EXACT


def test_sums_that_would_not_be_exact_are_refused():
    batch = torch.full((1024, 2), float(LARGEST))
    batches = int(EXACT) // (LARGEST * STEPS) ** 2 // len(batch)
    few, half = (Features(2, 0, CPU) for _ in range(2))
    for _ in range(batches - 1):
        few.add(batch, torch.arange(1024))
    with pytest.raises(InceptionError, match="too many"):
        few.add(batch, torch.arange(1024))
    # Each of two ranks has few enough, both together have not.
    for _ in range(batches // 2):
        half.add(batch, torch.arange(1024))
    with pytest.raises(InceptionError, match="too many"):
        half.merged(Beside(half))
