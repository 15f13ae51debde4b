"""Drawing from a space: within its ends, by its conditions, the same by the same chance."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from

from pipeline.search.space import GROUPS, Parameter, Space

SPACE = Space(
    (
        Parameter("objective.kl_balancing", "choice", (True, False)),
        Parameter("objective.kl_warmup_fraction", "uniform", (0.1, 0.5), {"objective.kl_balancing": (True,)}),
        Parameter("objective.spectral_coefficient", "log_uniform", (1e-4, 1.0)),
        Parameter("train.batch_size", "integer", (4, 9)),
        Parameter(f"{GROUPS}.total", "integer", (3, 9)),
        Parameter(f"{GROUPS}.skew", "uniform", (0.0, 2.0)),
        Parameter(f"{GROUPS}.minimum", "choice", (1,)),
    ),
    scales=3,
)


@given(integers(0, 10_000))
def test_a_draw_lies_within_the_ends_and_has_what_its_conditions_say(seed):
    drawn = SPACE.draw(random.Random(seed))
    assert ("objective.kl_warmup_fraction" in drawn) == drawn["objective.kl_balancing"]
    for parameter in SPACE.parameters:
        if parameter.name in drawn and parameter.kind != "choice":
            assert parameter.values[0] <= drawn[parameter.name] <= parameter.values[1]
    groups = SPACE.settings(drawn)[GROUPS]
    assert sum(groups) == drawn[f"{GROUPS}.total"] and len(groups) == 3


def test_the_same_chance_draws_the_same_and_another_another():
    assert SPACE.draw(random.Random(3)) == SPACE.draw(random.Random(3))
    assert SPACE.draw(random.Random(3)) != SPACE.draw(random.Random(4))


def test_log_uniform_has_as_many_draws_in_each_decade():
    chance, parameter = random.Random(0), SPACE.parameters[2]
    drawn = [parameter.draw(chance) for _ in range(4_000)]
    decades = [sum(10**-k > value >= 10 ** -(k + 1) for value in drawn) for k in range(4)]
    assert all(abs(count - 1_000) < 120 for count in decades)


@given(
    sampled_from([("uniform", 0.0, 2.0), ("uniform", 0.9990, 0.9999), ("uniform", -7e4, 3e5)])
    | sampled_from([("log_uniform", 1e-4, 1.0), ("log_uniform", 0.9990, 0.9999), ("log_uniform", 3.0, 9e6)]),
    floats(0, 1),
)
def test_a_draw_has_few_digits_and_is_hardly_another_value(bounds, share):
    kind, low, high = bounds
    parameter = Parameter("a", kind, (low, high))
    value = min(low + share * (high - low), high)
    rounded = parameter.rounded(value)
    assert low <= rounded <= high
    scale = high - low if kind == "uniform" else min(value, high - low)
    assert abs(rounded - value) <= scale / 2_000
    # What is shown with as many digits as the step has is the value itself.
    digits = 4 + math.ceil(max(math.log10(max(abs(low), abs(high)) / (high - low)), 0))
    assert float(f"{rounded:.{digits + 1}g}") == rounded


@pytest.mark.parametrize(
    ("kind", "low", "high", "near", "inside"),
    [
        ("uniform", 0.0, 2.0, (0.0, 0.09, 1.91, 2.0), (0.11, 1.0, 1.89)),
        ("log_uniform", 1e-4, 1.0, (1e-4, 1.5e-4, 0.7, 1.0), (2e-4, 0.5)),
        ("integer", 3, 9, (3, 9), (4, 8)),
        ("choice", 1, 2, (), (1, 2)),
    ],
)
def test_a_value_near_an_end_of_its_range_is_known(kind, low, high, near, inside):
    parameter = Parameter("a", kind, (low, high))
    assert all(parameter.near_an_end(value) for value in near)
    assert not any(parameter.near_an_end(value) for value in inside)


def test_an_integer_reaches_both_ends():
    chance, parameter = random.Random(0), SPACE.parameters[3]
    assert {parameter.draw(chance) for _ in range(500)} == set(range(4, 10))


def test_combinations_are_those_of_nested_loops():
    space = Space(
        (
            Parameter("a", "choice", ("x", "y")),
            Parameter("b", "integer", (1, 3), {"a": ("y",)}),
            Parameter("c", "choice", (False, True)),
        ),
        scales=1,
    )
    expected = [{"a": "x", "c": c} for c in (False, True)]
    expected += [{"a": "y", "b": b, "c": c} for b, c in itertools.product((1, 2, 3), (False, True))]
    assert list(space.combinations()) == expected


def test_a_range_has_no_combinations():
    with pytest.raises(ValueError, match="uniform has no list"):
        list(SPACE.combinations())


def test_a_structure_gives_one_setting_and_no_other():
    drawn = {f"{GROUPS}.total": 6, f"{GROUPS}.skew": 1.0, f"{GROUPS}.minimum": 1, "train.batch_size": 4}
    assert SPACE.settings(drawn) == {"train.batch_size": 4, GROUPS: [1, 2, 3]}


def test_a_space_comes_back_from_json_as_it_was():
    assert Space.from_plain(SPACE.as_plain(), SPACE.scales) == SPACE
