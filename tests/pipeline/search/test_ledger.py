"""The ledger: what is noted is there for the next launch, once and in order."""

import math

import pytest

from pipeline.record_file import RecordError
from pipeline.run_folder import RunError
from pipeline.search import ledger as ledgers
from pipeline.search.ledger import Ledger, Trial


def trial(number, **changes):
    return Trial(number, {"a": number}, {"a": number}, **changes)


def test_what_is_noted_is_there_for_the_next_launch(tmp_path):
    url = str(tmp_path)
    ledger = Ledger(url)
    for number in (1, 2):
        ledger.add(trial(number))
    ledger.evaluated(2, 40, 3.5, 10.0)
    ledger.evaluated(1, 40, math.nan, 11.0)
    ledger.evaluated(2, 80, 3.0, 20.0)
    ledger.update(2, state="finished", model="models:/m/1")
    again = Ledger(url)
    assert again.trials == ledger.trials
    history = [(each.number, evaluation.images_seen) for each, evaluation in again.history()]
    assert history == [(2, 40), (1, 40), (2, 80)]
    assert again[1].last.bits_per_dim is None and again[1].last.score == math.inf


def test_an_evaluation_that_is_repeated_after_a_crash_counts_once(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.add(trial(1))
    assert ledger.evaluated(1, 40, 3.5, 10.0) is not None
    assert Ledger(str(tmp_path)).evaluated(1, 40, 3.4, 9.0) is None
    assert ledger[1].evaluations[-1].bits_per_dim == 3.5


def test_a_number_is_given_once(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.add(trial(1))
    with pytest.raises(ValueError, match="trial 1 is there already"):
        ledger.add(trial(1))


def test_the_order_goes_on_over_launches(tmp_path):
    first = Ledger(str(tmp_path))
    first.add(trial(1))
    first.evaluated(1, 40, 3.5, 10.0)
    assert Ledger(str(tmp_path)).evaluated(1, 80, 3.0, 20.0).order == 1


@pytest.mark.parametrize("text", ['{"format_version": 1, "numb', '{"format_version": 1, "evaluations": []}'])
def test_a_damaged_record_is_named(tmp_path, text):
    Ledger(str(tmp_path)).add(trial(1))
    (tmp_path / "trials" / "0001.json").write_text(text)
    with pytest.raises(RecordError, match=r"0001\.json is damaged"):
        Ledger(str(tmp_path))


def test_a_newer_format_is_refused(tmp_path):
    Ledger(str(tmp_path)).add(trial(1))
    file = tmp_path / "trials" / "0001.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(RecordError, match="format version 2; this release reads 1"):
        Ledger(str(tmp_path))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 97, "-x"])
def test_a_search_has_a_name_that_its_trials_can_carry(tmp_path, name):
    with pytest.raises(RunError, match="is no name for a run"):
        ledgers.folder(str(tmp_path), name)


def test_an_unknown_search_or_trial_is_named_with_those_there_are(tmp_path):
    with pytest.raises(RunError, match=r"no search 'x'.*Searches there: none"):
        ledgers.known_trial(str(tmp_path), "x/1")
    with pytest.raises(RunError, match="name it as SEARCH/NUMBER"):
        ledgers.known_trial(str(tmp_path), "x")
