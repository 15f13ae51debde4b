"""The history of an alias as a pure function: beside a plain stack, and with entries that were edited."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.names import RegistryError
from pipeline.models.promotion_history import (
    ACCEPTED,
    OVERTAKEN,
    PROMOTION,
    REFUSED,
    ROLLBACK,
    Basis,
    Entry,
    History,
    check_alias,
    read,
    written,
)

MODEL = "nvae-faces"
BASIS = Basis("validation/bits_per_dim", "d1" * 32, 7, 1, 0, "3 x 8 x 8 pixels of 8 bits (mixture)")


def promotion(id_: int, version: object, score: float | None, **rest: Any) -> Entry:
    given_ = {"alias": "champion", "holder": None, "basis": BASIS} | rest
    return Entry(
        str(id_),
        PROMOTION,
        version=str(version),
        who="a@b",
        when="now",
        code_version="1",
        score=score,
        **given_,
    )


def rollback(id_: int, holder: str | None, version: object) -> Entry:
    return Entry(str(id_), ROLLBACK, "champion", str(version), holder, "a@b", "now", "1")


def replayed(*entries: Entry | None) -> History:
    return History(enumerate(entries, start=1))


def outcomes(history: History) -> list[str]:
    return [line.outcome for line in history.lines]


scores = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0]), st.floats(0.1, 9))


@given(st.lists(scores, max_size=12))
def test_the_best_of_all_that_were_tried_holds_the_alias_and_the_earliest_of_equals(given_scores):
    """Nobody saw anybody: all of them were decided upon at the same moment."""
    history = replayed(*(promotion(n, n, score) for n, score in enumerate(given_scores, start=1)))
    finite = [(score, n) for n, score in enumerate(given_scores, start=1) if score is not None]
    steps = history.steps("champion")
    assert (steps[-1].version if steps else None) == (str(min(finite)[1]) if finite else None)
    assert [line.number for line in history.lines] == list(range(1, len(given_scores) + 1))
    went_through = [float(str(step.score)) for step in steps]
    assert went_through == sorted(set(went_through), reverse=True)


@given(st.lists(st.tuples(st.sampled_from(["promote", "force", "back", "blind back"]), scores), max_size=15))
def test_promotions_and_rollbacks_move_a_stack(moves):
    stack: list[tuple[str, float]] = []
    entries: list[Entry] = []
    for number, (move, score) in enumerate(moves, start=1):
        holder, before = (stack[-1][0] if stack else None), stack[-2][0] if len(stack) > 1 else "none"
        if move == "back":
            entries.append(rollback(number, holder, before))
            stack = stack[:-1] if len(stack) > 1 else stack
        elif move == "blind back":
            entries.append(rollback(number, "somebody else", before))
        else:
            forced = move == "force"
            entries.append(promotion(number, number, score, holder=holder, forced=forced, reason="x"))
            if score is not None and (forced or not stack or score < stack[-1][1]):
                stack.append((str(number), score))
    steps = replayed(*entries).steps("champion")
    assert [step.version for step in steps] == [version for version, _ in stack]


@given(st.permutations(range(6)), st.integers(0, 5))
def test_the_order_in_which_a_line_is_read_does_not_matter_and_a_beginning_stays_what_it_was(order, cut):
    entries = [promotion(n, n, abs(3.5 - n)) for n in range(6)]
    numbered = list(enumerate(entries, start=1))
    whole = History(numbered)
    assert History(numbered[n] for n in order).lines == whole.lines
    assert History(numbered[:cut]).lines == whole.lines[:cut]


def test_a_request_that_arrived_twice_counts_once():
    history = replayed(promotion(1, 1, 3.0), promotion(2, 2, 2.0), rollback(3, "2", 1), rollback(3, "2", 1))
    assert outcomes(history) == [ACCEPTED, ACCEPTED, ACCEPTED, REFUSED]
    assert history.steps("champion")[-1].version == "1"


def test_who_had_the_alias_before_there_was_a_history_is_the_first_to_be_beaten():
    worse = promotion(1, 2, 4.0, holder="1", holder_score=3.0)
    better = promotion(2, 3, 2.0, holder="1", holder_score=3.0)
    history = replayed(worse, better, rollback(3, "3", 1))
    assert outcomes(history) == [REFUSED, ACCEPTED, ACCEPTED]
    assert history.steps("champion")[-1].version == "1"


def test_scores_of_other_images_are_never_compared():
    other = replace(BASIS, images=8)
    first = promotion(1, 1, 3.0)
    unseen = promotion(2, 2, 1.0, basis=other)
    assert outcomes(replayed(first, unseen)) == [ACCEPTED, OVERTAKEN]
    unmeasured = replace(unseen, holder="1", incomparable="other pixels")
    assert replayed(first, unmeasured).lines[1].why == "other pixels"
    measured = replace(unseen, holder="1", holder_score=1.5)
    assert outcomes(replayed(first, measured)) == [ACCEPTED, ACCEPTED]


def test_damage_cannot_be_forced_and_force_is_meant_against_the_holder_that_was_seen():
    first, second = promotion(1, 1, 3.0), promotion(2, 2, 2.0)
    broken = promotion(3, 3, 9.0, holder="2", forced=True, problem="gone")
    nan = promotion(4, 4, None, holder="2", forced=True)
    late = promotion(5, 5, 9.0, holder="1", forced=True)
    forced = promotion(6, 6, 9.0, holder="2", forced=True)
    history = replayed(first, second, broken, nan, late, forced)
    assert outcomes(history) == [ACCEPTED, ACCEPTED, REFUSED, REFUSED, REFUSED, ACCEPTED]


texts = st.text(max_size=20)


@given(texts, texts, st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), st.booleans())
def test_an_entry_is_read_as_it_was_written(reason, who, score, forced):
    entry = replace(promotion(1, 1, score), reason=reason, who=who, forced=forced)
    assert read(MODEL, written(MODEL, entry)) == entry
    assert read("nvae-other", written(MODEL, entry)) is None


@given(st.data())
def test_an_edited_entry_counts_for_nothing(data):
    text = written(MODEL, promotion(1, 1, 3.0))
    at = data.draw(st.integers(0, len(text) - 1))
    edited = text[:at] + data.draw(st.characters()) + text[at + 1 :]
    entry = read(MODEL, edited)
    assert entry is None or entry == read(MODEL, text)
    if entry is None:
        history = replayed(promotion(1, 1, 3.0), entry, promotion(3, 3, 2.0))
        assert [step.version for step in history.steps("champion")] == ["1", "3"]
        assert history.lines[1].outcome == REFUSED


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{}", '{"checksum": 1}', "[" * 100_000, "nan"])
def test_what_is_no_entry_is_none(text):
    assert read(MODEL, text) is None


def test_a_number_that_is_missing_is_shown():
    history = History([(1, promotion(1, 1, 3.0)), (3, promotion(3, 3, 2.0))])
    assert [(line.number, line.entry is None) for line in history.lines] == [
        (1, False),
        (2, True),
        (3, False),
    ]


def test_not_a_number_can_neither_be_written_nor_pass():
    with pytest.raises(ValueError, match="JSON"):
        written(MODEL, promotion(1, 1, math.nan))
    assert outcomes(replayed(promotion(1, 1, math.inf))) == [REFUSED]
    assert "NaN" not in json.dumps(written(MODEL, promotion(1, 1, None)))


@pytest.mark.parametrize(
    "alias", ["../../x", "a/b", "", "latest", "Latest", "12", "v3", "best", "a@b", "x" * 101, "-a"]
)
def test_an_alias_that_is_none_is_refused(alias):
    with pytest.raises(RegistryError, match="alias"):
        check_alias(alias)
