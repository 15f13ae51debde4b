"""Which settings mattered: fANOVA, the share of the scores' variance that each explains alone.

Trials are to be compared at one number of images only, or the number would be what matters. Settings
that were drawn from a logarithmic range enter by their logarithm, since fANOVA weighs each setting's
range as if values were drawn evenly from it. A setting with a condition is judged among the trials
that drew it.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.search.definition import Definition
from pipeline.search.ledger import Trial
from pipeline.search.space import Parameter

FEWEST_SCORES = 4
"""Below this nothing is said of importance."""


def importance(
    definition: Definition, trials: Sequence[Trial], scores: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """Share of the scores' variance that a setting explains alone, and the number of trials that say so.

    Settings of which nothing can be said are not in it: those that have one value in all trials, or
    that fewer than FEWEST_SCORES trials have drawn, or whose trials all have one score.
    """
    drew: dict[frozenset[int], list[Parameter]] = {}
    for parameter in definition.space.parameters:
        places = frozenset(n for n, trial in enumerate(trials) if parameter.name in trial.drawn)
        drew.setdefault(places, []).append(parameter)
    found: dict[str, tuple[float, int]] = {}
    for places, parameters in drew.items():
        known = [(trials[place], scores[place]) for place in sorted(places)]
        if len(known) < FEWEST_SCORES or len({score for _, score in known}) == 1:
            continue
        beside = [
            each
            for others, more in drew.items()
            if others >= places
            for each in more
            if len({repr(trial.drawn[each.name]) for trial, _ in known}) > 1
        ]
        shares = _explained(beside, known) if beside else {}
        found |= {each.name: (shares[each.name], len(known)) for each in parameters if each.name in shares}
    return found


def _explained(parameters: Sequence[Parameter], known: Sequence[tuple[Trial, float]]) -> dict[str, float]:
    """fANOVA of parameters that all these trials have drawn, and not all alike."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for trial, score in known:
        study.add_trial(
            optuna.trial.create_trial(
                value=score,
                params={each.name: _even(each, trial.drawn[each.name]) for each in parameters},
                distributions={each.name: _evenly(each) for each in parameters},
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    # Not scaled to add up to 1: what is missing is interplay, and that is worth knowing.
    return evaluator.evaluate(study, params=[each.name for each in parameters])


def _even(parameter: Parameter, value: Any) -> Any:
    """A value where a draw lies anywhere with the same chance; of a choice its place in the list."""
    if parameter.kind == "choice":
        return parameter.values.index(value)
    return math.log(value) if parameter.kind == "log_uniform" else value


def _evenly(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(range(len(parameter.values)))
    low, high = (_even(parameter, value) for value in parameter.values)
    if parameter.kind == "integer":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high)
