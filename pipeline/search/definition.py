"""A search as data: the run whose settings are searched, how, and what may be chosen.

A search that continues must be the search it was: `changes` says what differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import config_file
from pipeline.config import RunConfig, SearchConfig
from pipeline.search.space import Space
from pipeline.settings import flatten, resumable, search_settings


@dataclass(frozen=True)
class Definition:
    """A search that makes sense."""

    base: RunConfig
    """The settings of every trial where the space is silent."""
    search: SearchConfig
    space: Space
    full: Mapping[str, Any]
    """How much the run itself trains and evaluates, by dotted paths, where the search asks for less."""

    def config(self, drawn: Mapping[str, Any]) -> RunConfig:
        """The settings of the trial with this draw. Raises ConfigError if a run does not take them."""
        return self.with_settings(self.space.settings(drawn))

    def with_settings(self, chosen: Mapping[str, Any]) -> RunConfig:
        """The run's settings with these in their places. Raises ConfigError as above."""
        return config_file.overridden(self.base, chosen)

    def in_full(self, chosen: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """The run with these settings, trained as long as the run itself would be; KEY=VALUE last."""
        return config_file.overridden(self.base, {**self.full, **chosen}, overrides)

    @property
    def first_rung(self) -> float:
        """Where a trial may be pruned for the first time, in what is compared."""
        if self.search.compare == "device_seconds":
            return self.search.first_rung_device_seconds or 0.0
        return float(self.search.first_rung_images or self.base.cadence.evaluate_images)

    def warnings(self) -> list[str]:
        """What may be meant otherwise."""
        found = []
        warmup = self._latest_warmup_end()
        if self.search.scheduler != "none" and self.search.compare == "images" and self.first_rung < warmup:
            found.append(
                f"The first rung, {self.first_rung:,.0f} images, lies inside the KL warm-up, which lasts "
                f"until {warmup:,.0f}: trials are judged there by a loss that is not yet that of the end. "
                "Shorten objective.kl_warmup_fraction or raise search.first_rung_images."
            )
        return found

    def _latest_warmup_end(self) -> float:
        parameters = {parameter.name: parameter for parameter in self.space.parameters}
        shares: list[float] = []
        for path in ("objective.kl_warmup_fraction", "objective.kl_constant_fraction"):
            values = [config_file.leaves(self.base)[path]]
            shares.append(max(parameters[path].probes() if path in parameters else values))
        return min(sum(shares), 1.0) * self.base.train.total_images

    def as_plain(self) -> dict[str, Any]:
        """For JSON; passwords in URLs are left out."""
        return {
            "run": config_file.to_mapping(config_file.without_secrets(self.base)),
            "search": self.search.model_dump(mode="json"),
            "space": self.space.as_plain(),
            "full": dict(self.full),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Definition":
        """What `as_plain` gave."""
        base = config_file.from_mapping(plain["run"], "the record of the search")
        search = SearchConfig.model_validate(plain["search"])
        space = Space.from_plain(plain["space"], base.model.num_scales)
        return cls(base, search, space, plain["full"])


def changes(old: Definition, new: Definition) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of what makes `new` another search than `old`.

    Where the data are and how they are read may change, as it may for a run.
    """
    found = [
        (f"settings.{path}", was, now)
        for path, was, now in config_file.changed(old.base, new.base)
        if not (resumable(path) and path.startswith(("data.", "storage.")))
    ]
    before, after = (dict(flatten(each.search.model_dump(mode="json"))) for each in (old, new))
    found += [
        (f"search.{name}", was, after[name])
        for name, was in before.items()
        if was != after[name] and not search_settings()[f"search.{name}"].resumable
    ]
    spaces = [{each.name: str(each) for each in side.space.parameters} for side in (old, new)]
    found += [
        (f"space.{name}", spaces[0].get(name), spaces[1].get(name))
        for name in [*spaces[0], *(name for name in spaces[1] if name not in spaces[0])]
        if spaces[0].get(name) != spaces[1].get(name)
    ]
    return found
