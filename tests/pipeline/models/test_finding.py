"""Finding versions: the order, and that what is shown is confirmed."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.fields import FieldError
from pipeline.models.finding import find
from pipeline.models.versions import Version
from tests.pipeline.models.versions import version

BITS = "validation/bits_per_dim"


class Known:
    """A catalogue of what it was told, while `now` is what there really is."""

    def __init__(self, versions: Sequence[Version], now: Sequence[Version] | None = None) -> None:
        self.remembered = list(versions)
        self.now = {each.ref: each for each in (versions if now is None else now)}
        self.asked: list[str] = []

    def versions(self, *, refresh: bool = False) -> list[Version]:
        return list(self.now.values()) if refresh else self.remembered

    def confirmed(self, versions: Sequence[Version]) -> list[Version | None]:
        self.asked += [each.ref for each in versions]
        return [self.now.get(each.ref) for each in versions]


def scored(number: int, bits: float | None) -> Version:
    return version(number, metrics={} if bits is None else {BITS: bits})


def numbers(found: Sequence[Version]) -> list[int]:
    return [int(each.version) for each in found]


def test_the_best_come_first_and_what_has_no_figure_last():
    known = Known([scored(1, 3.0), scored(2, math.nan), scored(3, 2.0), scored(4, None), scored(5, 2.0)])
    assert numbers(find(known)) == [3, 5, 1, 2, 4]
    assert numbers(find(known, descending=True)) == [1, 3, 5, 2, 4]
    assert numbers(find(known, "validation.bits_per_dim < 3", limit=1)) == [3]


def test_any_field_can_order():
    known = Known([version(1, run_name="b"), version(2, run_name="a"), version(10, run_name="c")])
    assert numbers(find(known, sort="run")) == [2, 1, 10]
    assert numbers(find(known, sort="version", descending=True)) == [10, 2, 1]


def test_a_version_that_is_gone_or_worse_now_makes_room_for_the_next():
    before = [scored(1, 1.0), scored(2, 2.0), scored(3, 3.0), scored(4, 4.0)]
    known = Known(before, [scored(2, 9.0), scored(3, 3.0), scored(4, 4.0)])
    assert numbers(find(known, limit=2)) == [3, 4]
    assert len(known.asked) == len(set(known.asked))


def test_nothing_is_asked_of_versions_that_are_not_shown():
    known = Known([scored(number, float(number)) for number in range(1, 50)])
    find(known, "validation.bits_per_dim < 9", limit=3)
    assert known.asked == ["models:/nvae-faces/1", "models:/nvae-faces/2", "models:/nvae-faces/3"]


def test_a_misspelt_metric_is_a_mistake_and_one_that_nobody_measured_is_not():
    known = Known([scored(1, 1.0)])
    with pytest.raises(FieldError, match=r"Did you mean validation\.bits_per_dim"):
        find(known, "validation.bits_perdim < 1")
    assert find(known, "evaluation.bits_per_dim < 1") == []
    assert find(Known([]), "validation.bits_perdim < 1") == []
    with pytest.raises(FieldError, match="Did you mean images_seen"):
        find(known, sort="image_seen")


scores = st.lists(st.floats(0, 9) | st.just(math.nan) | st.none(), max_size=8)


@given(scores, scores, st.integers(1, 4))
def test_what_is_found_is_what_a_search_of_the_present_finds(before, now, limit):
    """As long as nothing came that was not remembered."""
    remembered = [scored(number, bits) for number, bits in enumerate(before, start=1)]
    present = [scored(number, bits) for number, bits in enumerate(now, start=1)][: len(before)]
    found = find(Known(remembered, present), limit=limit)
    refs = {each.ref for each in present}
    assert {each.ref for each in found} <= refs
    assert all(each is present[int(each.version) - 1] for each in found)
    if remembered[: len(present)] == present:
        assert found == find(Known(present), limit=limit)
