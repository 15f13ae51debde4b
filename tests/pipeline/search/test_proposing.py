"""What to try next: the same after a crash, and TPE finds what is good."""

import math
import random

import pytest

from pipeline.search.ledger import Evaluation, Trial
from pipeline.search.proposing import propose
from pipeline.search.reading import load

YAML = """
run: quickstart
search: {{searcher: {searcher}, scheduler: none, random_trials: 6}}
space:
{space}
"""
SPECTRAL = "objective.spectral_coefficient"


def definition(tmp_path, searcher, *lines):
    file = tmp_path / "search.yaml"
    file.write_text(YAML.format(searcher=searcher, space="\n".join(f"  {line}" for line in lines)))
    return load(str(file))


def evaluated(number, drawn, bits, state="finished"):
    evaluation = (Evaluation(100, bits, 1.0, number),) if bits is not None else ()
    return Trial(number, drawn, drawn, state=state, evaluations=evaluation)


def test_random_draws_depend_on_their_number_alone(tmp_path):
    search = definition(tmp_path, "random", f"{SPECTRAL}: {{log_uniform: [1.0e-4, 1]}}")
    alone = propose(search, [], 5)
    others = [evaluated(n, {SPECTRAL: 0.5}, 1.0) for n in range(1, 5)]
    assert propose(search, others, 5) == alone != propose(search, [], 6)


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_no_settings_are_tried_twice_while_there_are_others(tmp_path, searcher):
    lines = (f"{SPECTRAL}: {{choice: [0.1, 1]}}", "train.batch_size: {integer: [4, 6]}")
    search = definition(tmp_path, searcher, *lines)
    found = searched(search, 6, lambda drawn: drawn[SPECTRAL])
    assert len({str(trial.settings) for trial in found}) == 6
    assert propose(search, found, 7) is None


def test_a_grid_is_gone_through_and_then_exhausted(tmp_path):
    search = definition(
        tmp_path, "grid", f"{SPECTRAL}: {{choice: [0.1, 1]}}", "train.batch_size: {integer: [4, 6]}"
    )
    drawn = [propose(search, [], number) for number in range(1, 8)]
    assert None not in drawn[:6] and drawn[6] is None
    assert {(each[SPECTRAL], each["train.batch_size"]) for each in drawn[:6]} == {
        (coefficient, size) for coefficient in (0.1, 1) for size in (4, 5, 6)
    }


def searched(search, trials, score):
    """As many trials one after the other, each with its score."""
    found = []
    for number in range(1, trials + 1):
        drawn = propose(search, found, number)
        found.append(evaluated(number, drawn, score(drawn)))
    return found


def test_tpe_comes_nearer_to_the_best_than_chance_does(tmp_path):
    """The mean of draws 7 to 30, in decades from the best coefficient, 1e-2."""

    def far(drawn):
        return abs(math.log10(drawn[SPECTRAL]) + 2)

    line = f"{SPECTRAL}: {{log_uniform: [1.0e-6, 1]}}"
    distances = {}
    for searcher in ("tpe", "random"):
        found = searched(definition(tmp_path, searcher, line), 30, far)
        distances[searcher] = sum(far(each.drawn) for each in found[6:]) / 24
    assert distances["tpe"] < 0.7 * distances["random"]


def test_tpe_draws_the_same_from_the_same_ledger(tmp_path):
    search = definition(
        tmp_path,
        "tpe",
        "objective.kl_balancing: {choice: [true, false]}",
        "objective.kl_warmup_fraction: {uniform: [0.1, 0.5], when: {objective.kl_balancing: [true]}}",
        f"{SPECTRAL}: {{log_uniform: [1.0e-4, 1]}}",
        "model.groups_per_scale: {choice: [[1, 1, 1], [1, 2, 3]]}",
    )
    found = searched(search, 8, lambda drawn: drawn[SPECTRAL])
    assert propose(search, found, 9) == propose(search, found, 9)
    conditional = [propose(search, found, number) for number in range(9, 20)]
    assert all(
        ("objective.kl_warmup_fraction" in each) == each["objective.kl_balancing"] for each in conditional
    )


@pytest.mark.parametrize("state", ["diverged", "failed", "out_of_memory", "hung", "infeasible"])
def test_tpe_keeps_away_from_where_trials_failed(tmp_path, state):
    """Half of the space fails, and most draws fall into the other half."""
    search = definition(tmp_path, "tpe", f"{SPECTRAL}: {{uniform: [0, 1]}}")
    chance, found = random.Random(0), []
    for number in range(1, 21):
        drawn = {SPECTRAL: chance.random()}
        failed = drawn[SPECTRAL] > 0.5
        found.append(evaluated(number, drawn, None if failed else 3.0, state if failed else "finished"))
    drawn = [propose(search, found, number)[SPECTRAL] for number in range(21, 61)]
    assert sum(value <= 0.5 for value in drawn) > 30


def test_tpe_counts_a_trial_that_is_running_as_bad_for_now(tmp_path):
    search = definition(tmp_path, "tpe", f"{SPECTRAL}: {{uniform: [0, 1]}}")
    found = [evaluated(n, {SPECTRAL: n / 10}, abs(n / 10 - 0.5)) for n in range(1, 10)]
    running = [evaluated(9 + n, {SPECTRAL: 0.5}, None, "running") for n in range(1, 9)]

    def near(trials):
        return sum(abs(propose(search, trials, number)[SPECTRAL] - 0.5) < 0.1 for number in range(30, 70))

    assert near([*found, *running]) < near(found)
