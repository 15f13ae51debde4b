"""What to try next: random, grid and TPE, each a function of the search and what is known by then.

Random and grid depend on the trial's number alone (and on the draws before it, which are not
repeated), so that a search that is killed and continued draws the very trials of one that was not.
TPE learns from what came of earlier trials: Optuna's study is made anew from the ledger for each
draw, and its chance is seeded by the trial's number. There is no state of a searcher to be saved or
lost. Rejected: Tune's wrapper of Optuna, which takes no earlier trials of a space with conditions
and keeps its study in a pickle.
"""

import itertools
import random
import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.search.definition import Definition
from pipeline.search.ledger import FAILURES, UNFINISHED, Trial
from pipeline.search.space import Parameter

ATTEMPTS = 20
"""To draw settings that no trial has had; in a small space they may be hard to meet, or there are none."""


def propose(definition: Definition, trials: Sequence[Trial], number: int) -> dict[str, Any] | None:
    """The draw of trial `number` (from 1), with `trials` known; None where nothing is left to be tried."""
    search, space = definition.search, definition.space
    if search.searcher == "grid":
        return next(itertools.islice(space.combinations(), number - 1, None), None)
    known = [trial.settings for trial in trials if trial.number < number]
    drawn: dict[str, Any] = {}
    for attempt in range(ATTEMPTS):
        chance = random.Random(f"{search.seed}/{number}/{attempt}")
        if search.searcher == "tpe" and number > search.random_trials:
            drawn = _by_tpe(definition, trials, chance.getrandbits(32))
        else:
            drawn = space.draw(chance)
        if space.settings(drawn) not in known:
            return drawn
    if not space.is_listed:
        return None
    left = [each for each in space.combinations() if space.settings(each) not in known]
    return random.Random(f"{search.seed}/{number}").choice(left) if left else None


def _by_tpe(definition: Definition, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=0,
            multivariate=True,  # parameters are drawn together, for groups and coefficient go together
            group=True,  # those that share a condition
            constant_liar=True,  # what is running counts as bad, so that it is not tried twice
        )
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for trial in trials:
        study.add_trial(_as_optuna(definition, trial))
    asked = study.ask()
    drawn: dict[str, Any] = {}
    for parameter in definition.space.parameters:
        if parameter.holds(drawn):
            drawn[parameter.name] = _suggested(asked, parameter)
    return drawn


def _as_optuna(definition: Definition, trial: Trial) -> Any:
    """A trial as Optuna ranks it: one that ended early below all that finished, by how far it came."""
    import optuna

    parameters = {each.name: each for each in definition.space.parameters}
    scores = {each.images_seen: each.bits_per_dim for each in trial.evaluations}
    finite = {at: value for at, value in scores.items() if value is not None}
    state, value = optuna.trial.TrialState.PRUNED, None
    if trial.state in UNFINISHED:
        state = optuna.trial.TrialState.RUNNING
    elif trial.state in FAILURES:
        finite = {}  # worse than all that has a score
    elif trial.state == "finished" and trial.last is not None and trial.last.bits_per_dim is not None:
        state, value = optuna.trial.TrialState.COMPLETE, trial.last.bits_per_dim
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params={name: _inner(parameters[name], drawn) for name, drawn in trial.drawn.items()},
        distributions={name: _distribution(parameters[name]) for name in trial.drawn},
        intermediate_values=finite,
    )


def _distribution(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(range(len(parameter.values)))
    low, high = parameter.values
    if parameter.kind == "integer":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=parameter.kind == "log_uniform")


def _inner(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna has it: of a choice, which may be a list, its place."""
    return parameter.values.index(value) if parameter.kind == "choice" else value


def _suggested(asked: Any, parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return parameter.values[asked.suggest_categorical(parameter.name, range(len(parameter.values)))]
    low, high = parameter.values
    if parameter.kind == "integer":
        return asked.suggest_int(parameter.name, low, high)
    value = asked.suggest_float(parameter.name, low, high, log=parameter.kind == "log_uniform")
    return parameter.rounded(value)
