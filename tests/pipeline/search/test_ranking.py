"""The ranking: who came further first, then by score, failures last."""

from pipeline.search.ledger import Evaluation, Trial
from pipeline.search.ranking import best, rank


def trial(number, state, *scores, seconds_per_image=1.0):
    evaluations = tuple(
        Evaluation(100 * (place + 1), score, 100 * (place + 1) * seconds_per_image, 0)
        for place, score in enumerate(scores)
    )
    return Trial(number, {}, {}, state=state, evaluations=evaluations)


def order(trials, compare="images"):
    return [each.trial.number for each in rank(trials, compare)]


def test_finished_trials_come_first_by_their_last_score():
    trials = [
        trial(1, "finished", 3.0, 2.5),
        trial(2, "finished", 4.0, 2.4),
        trial(3, "pruned", 2.0),
        trial(4, "running", 2.6),
    ]
    assert order(trials) == [2, 1, 3, 4]


def test_a_score_that_is_no_number_ranks_below_every_score():
    nothing = Trial(1, {}, {}, "finished", evaluations=(Evaluation(900, None, 9.0, 0),))
    assert order([nothing, trial(2, "pruned", 3.9), trial(3, "running", 5.0)]) == [2, 3, 1]


def test_of_trials_that_ended_early_the_one_that_came_further_ranks_higher():
    assert order([trial(1, "pruned", 2.0), trial(2, "stopped", 5.0, 4.0)]) == [2, 1]


def test_whatever_failed_ranks_last_whatever_it_scored():
    states = ("diverged", "out_of_memory", "hung", "failed")
    trials = [trial(1, "infeasible"), *(trial(n, s, 0.1) for n, s in enumerate(states, start=2))]
    assert order([*trials, trial(9, "finished", 9.0)]) == [9, 2, 3, 4, 5, 1]
    assert all(each.bits_per_dim is None for each in rank(trials, "images"))


def test_a_score_that_is_no_number_is_worse_than_every_number():
    trials = [trial(1, "finished", None), trial(2, "finished", 99.0)]
    assert order(trials) == [2, 1]
    assert best(trials, "images").trial.number == 2
    assert best(trials[:1], "images") is None


def test_equals_rank_in_the_order_in_which_they_were_drawn():
    assert order([trial(2, "finished", 3.0), trial(1, "finished", 3.0)]) == [1, 2]


def test_by_device_seconds_a_slow_trial_is_compared_where_the_fastest_ended():
    fast = trial(1, "finished", 4.0, 3.0)
    slow = trial(2, "finished", 3.5, 2.0, seconds_per_image=2.0)
    assert order([fast, slow]) == [2, 1]
    ranked = rank([fast, slow], "device_seconds")
    assert [(each.trial.number, each.bits_per_dim) for each in ranked] == [(1, 3.0), (2, 3.5)]
