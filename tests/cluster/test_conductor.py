"""Between Tune and the ledger: whenever the driver dies, the next launch decides as this one would have.

Ray Tune's own schedulers are driven here without Ray: a toy Tune starts trials, evaluates them in an
order drawn by chance, and may be killed between any two calls.
"""

import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from
from ray.tune.search import Searcher

from cluster.conductor import Conductor, LedgerSearcher
from cluster.trial import BITS, IMAGES, SECONDS, WORST
from pipeline.search.ledger import Ledger
from pipeline.search.reading import load

TOTAL, STEP = 800, 100
YAML = f"""
run: quickstart
settings:
  train: {{total_images: {TOTAL}}}
  cadence: {{evaluate_images: {STEP}}}
search: {{searcher: random, scheduler: SCHEDULER, reduction_factor: 2, seed: 3}}
space:
  objective.spectral_coefficient: {{log_uniform: [1.0e-4, 1]}}
"""


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    found = {}
    for scheduler in ("asha", "median", "none"):
        file = tmp_path_factory.mktemp("searches") / f"{scheduler}.yaml"
        file.write_text(YAML.replace("SCHEDULER", scheduler))
        found[scheduler] = load(str(file))
    return found


def fits(definition, drawn):
    return ""


class ToyTune:
    """Starts trials two at a time and evaluates them; `run` ends after so many events, as if killed."""

    def __init__(self, definition, url, wanted=6, concurrent=2):
        self.conductor = Conductor(
            definition,
            Ledger(url),
            store=url,
            name="toy",
            wanted=wanted,
            workers=1,
            fits=fits,
            changed=lambda trial: None,
        )
        self.concurrent, self.running = concurrent, {}
        """Numbers of running trials, and the images that each has seen."""

    def run(self, chance, events=10_000):
        while events:
            while len(self.running) < self.concurrent:
                number = self.conductor.next(str(random.random()))
                if number is None:
                    break
                self._start(number)
            if not self.running:
                return
            self._advance(chance.choice(sorted(self.running)))
            events -= 1

    def _start(self, number):
        last = self.conductor.ledger[number].last
        # A trial goes on from a checkpoint, which may be older than its last evaluation.
        self.running[number] = max((last.images_seen if last else 0) - STEP, 0)
        self.conductor.started(self._id(number))

    def _id(self, number):
        return next(i for i, n in self.conductor._numbers.items() if n == number)

    def _advance(self, number):
        images = self.running[number] = self.running[number] + STEP
        if images > TOTAL:
            self.conductor.ended(self._id(number), {"state": "finished", "reason": "", "model": None})
            del self.running[number]
            return
        result = {IMAGES: images, BITS: score(number, images), SECONDS: float(images)}
        if self.conductor.evaluated(self._id(number), result) == "STOP":
            del self.running[number]


def score(number, images):
    """A curve of its own for each trial, falling."""
    return 2 + random.Random(number).random() + 100 / images


def outcome(url):
    return [
        (
            trial.number,
            trial.drawn,
            trial.state,
            tuple((e.images_seen, e.bits_per_dim) for e in trial.evaluations),
        )
        for trial in Ledger(url).trials
    ]


@settings(max_examples=25, deadline=None)
@given(lists(integers(1, 12), max_size=8), sampled_from(["asha", "median", "none"]), integers(0, 99))
def test_a_search_that_is_killed_again_and_again_loses_nothing_and_does_nothing_twice(
    tmp_path_factory, definitions, kills, scheduler, seed
):
    url = str(tmp_path_factory.mktemp("search"))
    chance = random.Random(seed)
    for events in kills:
        ToyTune(definitions[scheduler], url).run(chance, events)
    ToyTune(definitions[scheduler], url).run(chance)
    found = outcome(url)
    assert [number for number, *_ in found] == [1, 2, 3, 4, 5, 6]
    for number, drawn, state, evaluations in found:
        assert state in ("finished", "pruned")
        # Each evaluation once and none left out, up to the end or to where it was pruned.
        last = TOTAL if state == "finished" else evaluations[-1][0]
        assert [at for at, _ in evaluations] == list(range(STEP, last + 1, STEP))
        assert drawn == outcome_of_one(definitions[scheduler], number)


def outcome_of_one(definition, number):
    from pipeline.search.proposing import propose

    return propose(definition, [], number)


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("seed", range(4))
def test_decisions_after_a_kill_are_those_of_an_unbroken_search(tmp_path, definitions, scheduler, seed):
    """The scheduler is asked the same questions in the same order, by launches or by one."""
    unbroken = ToyTune(definitions[scheduler], str(tmp_path / "unbroken"))
    questions = []
    evaluated = unbroken.conductor.evaluated

    def noting(tune_id, result):
        questions.append((unbroken.conductor._numbers[tune_id], result))
        return evaluated(tune_id, result)

    unbroken.conductor.evaluated = noting
    unbroken.run(random.Random(seed))
    url, decisions = str(tmp_path / "broken"), {}
    for number, result in questions:
        launch = ToyTune(definitions[scheduler], url)  # a launch for every single question
        for _ in range(len(unbroken.conductor.ledger.trials)):
            launch.conductor.next(str(random.random()))
        decisions[number, result[IMAGES]] = launch.conductor.evaluated(launch._id(number), result)
    pruned = {number for (number, _), decision in decisions.items() if decision == "STOP"}
    assert pruned == {n for n, _, state, _ in outcome(str(tmp_path / "unbroken")) if state == "pruned"}
    assert pruned


def test_asha_keeps_the_better_half_at_each_rung(tmp_path, definitions):
    """An oracle by hand: one after the other, each worse than all before it, is pruned at the first rung."""
    tune = ToyTune(definitions["asha"], str(tmp_path), wanted=4, concurrent=1)
    ordered = iter([3.0, 2.0, 4.0, 1.0])
    values = {}

    def value(number, images):
        return values.setdefault(number, next(ordered)) if number not in values else values[number]

    decisions = {}
    while (number := tune.conductor.next(str(random.random()))) is not None:
        tune._start(number)
        for images in (100, 200, 300, 400, 800):
            result = {IMAGES: images, BITS: value(number, images), SECONDS: float(images)}
            if tune.conductor.evaluated(tune._id(number), result) == "STOP":
                decisions[number] = images
                break
    assert decisions == {3: 100}  # 4.0 after 3.0 and 2.0; each of the others was the best so far


def test_a_trial_at_its_last_image_is_never_pruned(tmp_path, definitions):
    for name in ("asha", "median"):
        tune = ToyTune(definitions[name], str(tmp_path / name), wanted=6, concurrent=1)
        while (number := tune.conductor.next(str(random.random()))) is not None:
            tune._start(number)
            result = {IMAGES: TOTAL, BITS: float(number), SECONDS: 1.0}
            assert tune.conductor.evaluated(tune._id(number), result) == "CONTINUE"


def test_a_trial_that_ends_with_a_score_that_is_no_number_has_diverged(tmp_path, definitions):
    tune = ToyTune(definitions["none"], str(tmp_path), wanted=2, concurrent=1)
    for bits in (2.0, WORST):
        number = tune.conductor.next(str(random.random()))
        tune._start(number)
        tune.conductor.evaluated(tune._id(number), {IMAGES: TOTAL, BITS: bits, SECONDS: 1.0})
        tune.conductor.ended(tune._id(number), {"state": "finished", "reason": "", "model": None})
    assert [trial.state for trial in tune.conductor.ledger.trials] == ["finished", "diverged"]
    assert tune.conductor.ledger[2].reason == "its last score is no finite number"


def test_what_is_no_number_reaches_the_scheduler_as_the_worst_and_the_ledger_as_none(tmp_path, definitions):
    tune = ToyTune(definitions["asha"], str(tmp_path), wanted=3, concurrent=1)
    for bits in (2.0, 3.0, WORST):
        number = tune.conductor.next(str(random.random()))
        tune._start(number)
        result = {IMAGES: 100, BITS: bits, SECONDS: 1.0}
        decision = tune.conductor.evaluated(tune._id(number), result)
    assert decision == "STOP"
    assert tune.conductor.ledger[3].last.bits_per_dim is None


def test_what_does_not_fit_is_noted_and_passed_over(tmp_path, definitions):
    def even_ones_fit(definition, chosen):
        return "" if chosen["objective.spectral_coefficient"] < 0.01 else "needs about 3.0 GiB"

    conductor = Conductor(
        definitions["none"],
        Ledger(str(tmp_path)),
        store=str(tmp_path),
        name="toy",
        wanted=12,
        workers=1,
        fits=even_ones_fit,
        changed=lambda trial: None,
    )
    searcher, numbers = LedgerSearcher(conductor), []
    for name in iter(partial(random.choice, "abcdefghijkl"), None):
        suggested = searcher.suggest(name + str(len(numbers)))
        if suggested == Searcher.FINISHED:
            break
        numbers.append(suggested["number"])
    states = {trial.number: trial.state for trial in conductor.ledger.trials}
    assert len(states) == 12
    assert {number for number, state in states.items() if state == "pending"} == set(numbers)
    assert {"pending", "infeasible"} == set(states.values())


def test_more_trials_may_be_wanted_later(tmp_path, definitions):
    url, chance = str(tmp_path), random.Random(0)
    ToyTune(definitions["asha"], url, wanted=3).run(chance)
    before = outcome(url)
    ToyTune(definitions["asha"], url, wanted=5).run(chance)
    assert outcome(url)[:3] == before and len(outcome(url)) == 5
