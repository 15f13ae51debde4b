"""Between Ray Tune and the ledger of a search: what Tune is given, and what it says.

Tune starts trials, moves them between nodes and brings their results; what it is to start comes
from the ledger, and what it hears goes there first. Every launch of a search is a new experiment
of Tune's. Its scheduler is made as it was by telling it all evaluations of the ledger in their
order: ASHA's rungs then hold what they held, and a trial that is continued is the same contender,
which is not entered into a rung twice. A searcher, a scheduler, a callback and a stopper are the
four doors by which Tune asks and tells; all of them lead to the one Conductor. They are called by
Tune's one thread.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher

from cluster.trial import BITS, IMAGES, SECONDS, WORST
from pipeline import run_folder, storage
from pipeline.config import SearchConfig
from pipeline.config_draft import ConfigError
from pipeline.search.definition import Definition
from pipeline.search.ledger import UNFINISHED, Evaluation, Ledger, Trial, run_name
from pipeline.search.proposing import propose

_MEDIAN_TRIALS = 3
"""Others that must have been evaluated before one can be worse than their median."""
_SECONDS_RUNGS = 20
"""Rungs of asha in device time, of which nobody knows before how long a trial takes."""

logger = logging.getLogger(__name__)

Fits = Callable[[Definition, dict[str, Any]], str]
"""Why settings do not fit the device, or ""."""


class Conductor:
    """Knows which trial comes next, which are running, and when all is over."""

    def __init__(
        self,
        definition: Definition,
        ledger: Ledger,
        *,
        store: str,
        name: str,
        wanted: int,
        workers: int,
        fits: Fits,
        changed: Callable[[Trial], None],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`wanted` trials in all; `changed` is told of each that has started, come further or ended."""
        self.definition, self.ledger = definition, ledger
        self.inner = scheduler_of(definition)
        self.exhausted = False
        """Whether there is nothing more to draw."""
        self._store, self._name = store, name
        self._wanted, self._workers = wanted, workers
        self._fits, self._changed, self._asked_to_stop = fits, changed, asked_to_stop
        self._numbers: dict[str, int] = {}
        """Of Tune's trials, by their ids, which are new at every launch."""
        self._noted: dict[int, float] = {}
        """Of running trials: when their costs were noted last."""
        self._entered: set[int] = set()
        """Trials that the scheduler knows."""
        self._replay()
        self._waiting = deque(trial.number for trial in ledger.trials if trial.state in UNFINISHED)

    @property
    def left(self) -> int:
        """How many trials may be started at most."""
        return len(self._waiting) + max(self._wanted - len(self.ledger.trials), 0)

    @property
    def spent_device_seconds(self) -> float:
        """By all trials, up to this moment."""
        now = time.monotonic()
        running = sum(self._workers * (now - noted) for noted in self._noted.values())
        return self.ledger.spent_device_seconds + running

    def reason_to_end(self) -> str:
        """Why the search is to end before its trials do; "" if it is not."""
        if self._asked_to_stop():
            return "asked to stop"
        return over_budget(self.definition.search, self.spent_device_seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes snapshots of everything that it is given; no search is restored from them."""
        return object, ()

    # -- what is to be started --------------------------------------------------------------

    def next(self, tune_id: str) -> int | None:
        """The number of the next trial, in the ledger by now; None if there is none."""
        number = self._waiting.popleft() if self._waiting else self._draw()
        if number is not None:
            self._numbers[tune_id] = number
        return number

    def _draw(self) -> int | None:
        while (number := len(self.ledger.trials) + 1) <= self._wanted:
            drawn = propose(self.definition, self.ledger.trials, number)
            if drawn is None:
                break
            settings = self.definition.space.settings(drawn)
            misfit = self._misfit(settings)
            trial = Trial(number, drawn, settings, state="infeasible" if misfit else "pending", reason=misfit)
            self._changed(self.ledger.add(trial))
            if not misfit:
                return number
        self.exhausted = True
        return None

    def _misfit(self, settings: dict[str, Any]) -> str:
        try:
            return self._fits(self.definition, settings)
        except ConfigError as error:
            return "; ".join(str(problem) for problem in error.problems)

    # -- what has happened --------------------------------------------------------------------

    def started(self, tune_id: str) -> None:
        number = self._numbers[tune_id]
        self._noted[number] = time.monotonic()
        starts = self.ledger[number].starts + 1
        self._changed(self.ledger.update(number, state="running", starts=starts))

    def interrupted(self, tune_id: str) -> None:
        """Its process was lost; Tune may start it again."""
        self._note_costs(self._numbers[tune_id], goes_on=False)

    def evaluated(self, tune_id: str, result: dict[str, Any]) -> str:
        """What the scheduler decides about a trial that has come so far."""
        number = self._numbers[tune_id]
        self._note_costs(number)
        bits = result[BITS] if result[BITS] < WORST else math.inf
        evaluation = self.ledger.evaluated(number, result[IMAGES], bits, result[SECONDS])
        if evaluation is None:
            return str(TrialScheduler.CONTINUE)
        decision = self._decide(number, evaluation)
        if decision == TrialScheduler.STOP:
            self._prune(number)
        self._changed(self.ledger[number])
        return decision

    def ended(self, tune_id: str, result: dict[str, Any]) -> None:
        """A trial's training is over, by itself."""
        number = self._numbers[tune_id]
        self._note_costs(number, goes_on=False)
        known = self.ledger[number]
        if known.state in UNFINISHED and "state" in result:
            state, reason = result["state"], result["reason"]
            if state == "finished" and known.last is not None and known.last.bits_per_dim is None:
                state, reason = "diverged", "its last score is no finite number"
            self._changed(self.ledger.update(number, state=state, reason=reason, model=result["model"]))

    def lost(self, tune_id: str) -> None:
        """Its process was lost too often, and it is given up.

        One that stood still has left the stacks of its threads.
        """
        number = self._numbers[tune_id]
        trial, url = self.ledger[number], run_folder.folder(self._store, run_name(self._name, number))
        if trial.state not in UNFINISHED:
            return
        files = storage.list_dir(storage.join(url, "files"))
        stacks = sorted(name for name in files if name.startswith("stacks-"))
        if stacks:
            reason = f"stood still; the stacks of its threads are in {storage.join(url, 'files', stacks[-1])}"
        else:
            reason = f"its process was lost {trial.starts} times"
        self._changed(self.ledger.update(number, state="hung" if stacks else "failed", reason=reason))

    def _note_costs(self, number: int, goes_on: bool = True) -> None:
        began = self._noted.pop(number, None)
        if began is None:
            return
        now = time.monotonic()
        spent = self.ledger[number].spent_device_seconds + self._workers * (now - began)
        self.ledger.update(number, spent_device_seconds=spent)
        if goes_on:
            self._noted[number] = now

    def _prune(self, number: int) -> None:
        self.ledger.update(number, state="pruned", reason="among the worse")

    # -- the scheduler ------------------------------------------------------------------------

    def _decide(self, number: int, evaluation: Evaluation) -> str:
        contender = Contender(f"{number:04d}")
        if number not in self._entered:
            self._entered.add(number)
            self.inner.on_trial_add(None, contender)
        told = {
            IMAGES: evaluation.images_seen,
            BITS: min(evaluation.score, WORST),
            SECONDS: evaluation.device_seconds,
        }
        decision = str(self.inner.on_trial_result(None, contender, told))
        # At its end a trial has nothing more to lose.
        at_the_end = evaluation.images_seen >= self.definition.base.train.total_images
        return str(TrialScheduler.CONTINUE) if at_the_end else decision

    def _replay(self) -> None:
        """Tell the scheduler what it knew. A decision that was taken and not noted is noted now."""
        for trial, evaluation in self.ledger.history():
            decision = self._decide(trial.number, evaluation)
            is_last = evaluation == trial.last
            if decision == TrialScheduler.STOP and is_last and trial.state in UNFINISHED:
                self._prune(trial.number)


@dataclass(frozen=True)
class Contender:
    """A trial as a scheduler knows it: the same at every launch, unlike Tune's own."""

    trial_id: str


def scheduler_of(definition: Definition) -> Any:
    """Tune's scheduler that decides."""
    search = definition.search
    by_time = search.compare == "device_seconds"
    common = {"time_attr": SECONDS if by_time else IMAGES, "metric": BITS, "mode": "min"}
    first = definition.first_rung
    if search.scheduler == "median":
        # Never paused: that would stop a training in order to start another.
        return MedianStoppingRule(
            **common, grace_period=first, min_samples_required=_MEDIAN_TRIALS, min_time_slice=math.inf
        )
    if search.scheduler == "asha":
        last = (
            first * search.reduction_factor**_SECONDS_RUNGS
            if by_time
            else definition.base.train.total_images - 1
        )
        return AsyncHyperBandScheduler(
            **common,
            grace_period=first,
            max_t=last,
            reduction_factor=search.reduction_factor,
            brackets=1,
            stop_last_trials=False,
        )
    return FIFOScheduler()


def over_budget(search: SearchConfig, spent_device_seconds: float) -> str:
    """Which budget is spent; "" if none is."""
    hours = spent_device_seconds / 3600
    if search.max_device_hours is not None and hours >= search.max_device_hours:
        return f"{hours:.2f} device-hours are spent, of search.max_device_hours={search.max_device_hours:g}"
    if search.max_cost is not None and search.price_per_device_hour is not None:
        cost = hours * search.price_per_device_hour
        if cost >= search.max_cost:
            return f"{cost:.2f} is spent, of search.max_cost={search.max_cost:g}"
    return ""


# -- the four doors -------------------------------------------------------------------------


class LedgerSearcher(Searcher):  # type: ignore[misc]
    """Gives Tune the number of each trial to start."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()  # without a metric: Tune judges nothing
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        number = self._conductor.next(trial_id)
        return Searcher.FINISHED if number is None else {"number": number}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Told by the scheduler already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: no experiment of Tune's is continued."""


class LedgerScheduler(FIFOScheduler):  # type: ignore[misc]
    """Notes what Tune hears of trials, and asks the conductor for the decision."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._conductor.evaluated(trial.trial_id, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._conductor.ended(trial.trial_id, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Told each time that a trial's process is lost, whether it is started again or not."""
        self._conductor.interrupted(trial.trial_id)


class LedgerCallback(Callback):  # type: ignore[misc]
    """Hears of starts, and of trials that are given up."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._conductor.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._conductor.lost(trial.trial_id)


class Ending(Stopper):  # type: ignore[misc]
    """Ends the whole search when somebody wants it, or when its budget is spent."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._conductor.reason_to_end())
