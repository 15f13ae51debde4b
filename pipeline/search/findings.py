"""All that the page of a search is made from, and how values are written there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import run_folder, storage
from pipeline.models.figures import Subject
from pipeline.search import ledger, ranking
from pipeline.search.definition import Definition
from pipeline.search.ledger import UNFINISHED, SearchRecord, Trial
from pipeline.search.ranking import Ranked
from pipeline.search.space import GROUPS, Parameter
from pipeline.training.run_description import redact


@dataclass(frozen=True)
class Findings:
    """All that the page is made from."""

    store: str
    record: SearchRecord
    definition: Definition
    trials: Sequence[Trial]
    ranked: Sequence[Ranked]
    best: Ranked | None

    @classmethod
    def read(cls, store: str, name: str) -> "Findings":
        record = ledger.known_search(store, name)
        trials = ledger.read_trials(ledger.folder(store, name))
        definition = Definition.from_plain(record.definition)
        compare = definition.search.compare
        ranked, best = ranking.rank(trials, compare), ranking.best(trials, compare)
        return cls(store, record, definition, trials, ranked, best)

    @property
    def total_images(self) -> int:
        return self.definition.base.train.total_images

    @property
    def by_time(self) -> bool:
        return self.definition.search.compare == "device_seconds"

    def run_url(self, trial: Trial) -> str:
        return run_folder.folder(self.store, ledger.run_name(self.record.name, trial.number))

    def groups(self, trial: Trial) -> tuple[int, ...]:
        """Per scale, the coarsest first."""
        return tuple(trial.settings.get(GROUPS, self.definition.base.model.groups_per_scale))

    def varied(self) -> list[Parameter]:
        """The parameters that have more than one value."""
        return [each for each in self.definition.space.parameters if len(set(map(repr, each.values))) > 1]

    def rungs(self) -> list[float]:
        """Where trials could be pruned: images, or device-seconds as far as any trial came."""
        search, found = self.definition.search, []
        end = float(self.total_images)
        if self.by_time:
            end = max((each.last.device_seconds for each in self.trials if each.last), default=0.0)
        if search.scheduler == "asha":
            rung = float(self.definition.first_rung)
            while 0 < rung < end:
                found.append(rung)
                rung *= search.reduction_factor
        return found

    def subject(self, ranked: Ranked) -> Subject:
        trial = ranked.trial
        is_best = self.best is not None and trial.number == self.best.trial.number
        kind: Literal["whole", "part", "failed"] = "whole" if trial.state == "finished" else "part"
        if ranked.bits_per_dim is None:  # so it is of all failures
            kind = "failed"
        return Subject(f"trial {trial.number}", ranked.bits_per_dim, kind, is_best)

    def subjects(self) -> list[tuple[Subject, Trial]]:
        """The trials that figures show: all but those of which there is nothing to be said yet."""
        return [
            (self.subject(each), each.trial)
            for each in self.ranked
            if each.bits_per_dim is not None or each.trial.state not in UNFINISHED
        ]


def registered_weights(store: str, search: str, number: int) -> str:
    """Which weights of a trial are registered, in words: its run's best, which need not be its last."""
    record = run_folder.read_record(run_folder.folder(store, ledger.run_name(search, number)))
    if record is None or "images_seen" not in record.result:
        return ""
    score = record.result["metrics"].get("validation/bits_per_dim")
    scored = "" if score is None else f", {score:.4f} bits/dim on all validation images"
    return f" (the weights at {record.result['images_seen']:,} images{scored})"


def safe(text: str) -> str:
    """Words from outside without the passwords of URLs in them."""
    return redact(text)


def shown(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return storage.shown(value) if isinstance(value, str) else str(value)


def hours(device_seconds: float) -> str:
    hours = device_seconds / 3600
    return f"{hours:,.{1 if hours >= 100 else 2 if hours >= 10 else 3}f}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted paths that tell them apart."""
    found = {}
    for name in names:
        parts = name.split(".")
        least = 2 if name.startswith(f"{GROUPS}.") else 1
        for count in range(least, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in names) <= 1:
                break
        found[name] = end
    return found
