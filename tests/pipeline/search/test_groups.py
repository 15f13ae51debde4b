"""Latent groups as a structure: totals are exact, and each number does what it says."""

import itertools

import pytest
from hypothesis import given
from hypothesis.strategies import composite, floats, integers

from pipeline.search.groups import spread


@composite
def structures(draw):
    scales, minimum = draw(integers(1, 6)), draw(integers(1, 3))
    total = scales * minimum + draw(integers(0, 40))
    return total, draw(floats(-3, 3)), minimum, scales


@given(structures())
def test_the_groups_add_up_and_no_scale_has_fewer_than_the_minimum(structure):
    total, skew, minimum, scales = structure
    groups = spread(total, skew, minimum, scales)
    assert sum(groups) == total
    assert len(groups) == scales
    assert min(groups) >= minimum


@given(structures())
def test_one_group_more_takes_none_from_any_scale(structure):
    total, skew, minimum, scales = structure
    fewer, more = spread(total, skew, minimum, scales), spread(total + 1, skew, minimum, scales)
    assert all(b >= a for a, b in zip(fewer, more, strict=True))


@given(structures(), floats(0, 2))
def test_more_skew_takes_none_from_the_finest_scale(structure, further):
    total, skew, minimum, scales = structure
    assert spread(total, skew + further, minimum, scales)[-1] >= spread(total, skew, minimum, scales)[-1]


@given(structures())
def test_with_skew_upwards_finer_scales_have_no_fewer_groups(structure):
    total, skew, minimum, scales = structure
    groups = spread(total, abs(skew), minimum, scales)
    assert groups == sorted(groups)


@given(structures())
def test_without_skew_scales_differ_by_one_group_at_most(structure):
    total, _, minimum, scales = structure
    groups = spread(total, 0.0, minimum, scales)
    assert max(groups) - min(groups) <= 1


def test_the_groups_are_given_as_by_counting_every_way_to_give_them():
    """Sainte-Laguë's oracle: of all ways, the one nearest to the shares, each deviation by its share."""

    def deviation(groups, shares):
        return sum((have - share) ** 2 / share for have, share in zip(groups, shares, strict=True))

    for total, skew in itertools.product(range(0, 12), (0.1, 0.7, 1.3)):
        weights = [2 ** (skew * scale) for scale in range(3)]
        shares = [max(total, 1) * weight / sum(weights) for weight in weights]
        ways = [w for w in itertools.product(range(total + 1), repeat=3) if sum(w) == total]
        best = min(ways, key=lambda way: deviation(way, shares))
        given = [groups - 1 for groups in spread(total + 3, skew, 1, 3)]
        assert deviation(given, shares) == pytest.approx(deviation(best, shares))


def test_more_scales_than_groups_are_refused():
    with pytest.raises(ValueError, match="3 scales of at least 2 groups need 6, not 5"):
        spread(5, 0.0, 2, 3)
