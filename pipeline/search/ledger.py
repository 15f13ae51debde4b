"""The ledger of a search: what was drawn and what came of it, in the store.

STORE/searches/NAME/
  search.json        the record: definition, data set, MLflow run, every launch
  trials/0007.json   one trial: what was drawn, its state, its evaluations in the order of the search
  leases/            who is running it now (lease.py)
  stop               present when somebody asked the search to stop
  journal/           of its MLflow run
  report.html        what came out of it

The ledger is the truth and Ray Tune is the machinery: a trial is written here before Tune hears
of it and its evaluations before the scheduler does, so that at every launch, on whatever
machine, Tune can be given exactly what there is. Rejected: Tune's own snapshots. They are written
every few seconds, so that a driver that is killed between two of them has lost trials or starts
them twice; they are pickles; and they are restored only by the code that wrote them.

A trial's run is an ordinary run of the store, NAME-0007, with its own checkpoints and curves.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline import record_file, run_folder, storage
from pipeline.run_folder import Launch, RunError, launches_of
from pipeline.search.definition import Definition

State = Literal[
    "pending",
    "running",
    "finished",
    "pruned",
    "stopped",
    "diverged",
    "out_of_memory",
    "hung",
    "failed",
    "infeasible",
]
"""`running` is also a trial whose search ended before it did: the next launch continues it.
`pruned` is one that the scheduler ended early, `stopped` one that a user did; the last five are
failures."""
UNFINISHED: tuple[State, ...] = ("pending", "running")
FAILURES: tuple[State, ...] = ("diverged", "out_of_memory", "hung", "failed", "infeasible")


@dataclass(frozen=True)
class Evaluation:
    """The validation score of a trial at one moment."""

    images_seen: int
    bits_per_dim: float | None
    """None if it was not a finite number."""
    device_seconds: float
    """Of training so far, of all its devices together; what a crash made necessary again not counted."""
    order: int
    """How many evaluations of the whole search came before."""

    @property
    def score(self) -> float:
        """Bits per dimension; infinity if they are no number."""
        return math.inf if self.bits_per_dim is None else self.bits_per_dim


@dataclass(frozen=True)
class Trial:
    """One choice of settings."""

    number: int
    """From 1."""
    drawn: Mapping[str, Any]
    """A value for each parameter of the space whose condition holds."""
    settings: Mapping[str, Any]
    """What follows from it, by dotted paths."""
    state: State = "pending"
    reason: str = ""
    """Why it ended as it did; empty if it finished."""
    evaluations: tuple[Evaluation, ...] = ()
    spent_device_seconds: float = 0.0
    """All that it has cost, starts and lost work included."""
    starts: int = 0
    model: str | None = None
    """The registered version of a finished trial."""

    @property
    def last(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None


@dataclass(frozen=True)
class SearchRecord:
    """What search.json says."""

    name: str
    created: str
    definition: Mapping[str, Any]
    data_hash: str
    tracking_uri: str
    mlflow_run_id: str
    trials: int
    """How many are wanted."""
    workers: int
    """Of each trial."""
    state: Literal["created", "running", "stopped", "finished", "failed"] = "created"
    reason: str = ""
    launches: tuple[Launch, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    """The best trial, its registered version and the report, once there are any."""


def folder(store: str, name: str) -> str:
    """URL of a search's folder. Raises RunError on a name whose trials could not be runs."""
    run_folder.folder(store, run_name(name, 1))
    return storage.join(store, "searches", name)


def run_name(search: str, number: int) -> str:
    """The run of a trial."""
    return f"{search}-{number:04d}"


def read_search(url: str) -> SearchRecord | None:
    """The record in a search's folder; None where there is none. Raises RecordError, StoreError."""
    return record_file.read(
        storage.join(url, "search.json"),
        lambda values: SearchRecord(**{**values, "launches": launches_of(values)}),
    )


def write_search(url: str, record: SearchRecord) -> None:
    record_file.write(storage.join(url, "search.json"), record)


def update_search(url: str, **changes: Any) -> SearchRecord:
    """Replace fields of an existing record."""
    record = read_search(url)
    if record is None:
        raise RunError(f"{url} holds no search; it was deleted while something still wrote to it.")
    record = replace(record, **changes)
    write_search(url, record)
    return record


def known_search(store: str, name: str) -> SearchRecord:
    """The record of a search that has to exist. Raises RunError naming the searches there are."""
    record = read_search(folder(store, name))
    if record is None:
        known = ", ".join(names(store)) or "none"
        raise RunError(f"There is no search {name!r} in {store}. Searches there: {known}.")
    return record


def known_trial(store: str, reference: str) -> tuple[Definition, Trial]:
    """The trial SEARCH/N and the search's definition. Raises RunError if there is no such trial."""
    name, _, number = reference.partition("/")
    if not number.isdecimal() or not number.isascii():
        raise RunError(f"{reference!r} is no trial; name it as SEARCH/NUMBER, such as groups/7.")
    record = known_search(store, name)
    return Definition.from_plain(record.definition), read_trial(folder(store, name), int(number))


def names(store: str) -> list[str]:
    """All searches of a store."""
    return sorted(storage.list_dir(storage.join(store, "searches")))


def read_trials(url: str) -> list[Trial]:
    """All trials of a search, by their numbers. Raises RecordError if one cannot be read."""
    numbers = [
        int(name.removesuffix(".json"))
        for name in storage.list_dir(storage.join(url, "trials"))
        if name.endswith(".json") and name.removesuffix(".json").isdigit()
    ]
    return [read_trial(url, number) for number in sorted(numbers)]


def read_trial(url: str, number: int) -> Trial:
    """One trial. Raises RunError if there is none of that number, RecordError if it cannot be read."""
    trial = record_file.read(_trial_url(url, number), _made)
    if trial is None:
        raise RunError(f"{url} has no trial {number}.")
    return trial


def _made(values: dict[str, Any]) -> Trial:
    evaluations = tuple(Evaluation(**each) for each in values["evaluations"])
    return Trial(**{**values, "evaluations": evaluations})


def _trial_url(url: str, number: int) -> str:
    return storage.join(url, "trials", f"{number:04d}.json")


class Ledger:
    """The trials of a search, in memory and in the store; who holds the search's lease writes it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._trials = {trial.number: trial for trial in read_trials(url)}
        self._evaluations = sum(len(trial.evaluations) for trial in self._trials.values())

    def __getitem__(self, number: int) -> Trial:
        return self._trials[number]

    @property
    def trials(self) -> list[Trial]:
        """By their numbers."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def spent_device_seconds(self) -> float:
        """By all trials together."""
        return sum(trial.spent_device_seconds for trial in self._trials.values())

    def add(self, trial: Trial) -> Trial:
        """A new trial; it is in the store when this returns."""
        if trial.number in self._trials:
            raise ValueError(f"trial {trial.number} is there already")
        self._keep(trial)
        return trial

    def update(self, number: int, **changes: Any) -> Trial:
        """Replace fields of a trial; they are in the store when this returns."""
        trial = replace(self._trials[number], **changes)
        self._keep(trial)
        return trial

    def evaluated(
        self, number: int, images_seen: int, bits_per_dim: float, device_seconds: float
    ) -> Evaluation | None:
        """Note an evaluation of a trial; None if it is known, as what is repeated after a crash is."""
        trial = self._trials[number]
        if trial.last is not None and images_seen <= trial.last.images_seen:
            return None
        value = bits_per_dim if math.isfinite(bits_per_dim) else None
        evaluation = Evaluation(images_seen, value, device_seconds, self._evaluations)
        self.update(number, evaluations=(*trial.evaluations, evaluation))
        self._evaluations += 1
        return evaluation

    def history(self) -> list[tuple[Trial, Evaluation]]:
        """Every evaluation in the order in which the search saw them."""
        pairs = [(trial, each) for trial in self.trials for each in trial.evaluations]
        return sorted(pairs, key=lambda pair: pair[1].order)

    def _keep(self, trial: Trial) -> None:
        record_file.write(_trial_url(self.url, trial.number), trial)
        self._trials[trial.number] = trial


def counts(trials: Iterable[Trial]) -> dict[str, int]:
    """How many trials are in each state, of the states there are."""
    found: dict[str, int] = {}
    for trial in trials:
        found[trial.state] = found.get(trial.state, 0) + 1
    return found
