"""From a search's YAML and KEY=VALUE to a checked definition: a run, what is searched, and how.

    run: quickstart              # preset, file or URL: the run whose settings are searched
    settings: {train: {...}}     # over it, in all trials
    search: {searcher: tpe, ...} # SearchConfig in pipeline/config.py
    space:
      objective.spectral_coefficient: {log_uniform: [1.0e-3, 1.0]}
      objective.kl_balancing: {choice: [true, false]}
      objective.kl_warmup_fraction: {uniform: [0.1, 0.5], when: {objective.kl_balancing: [true]}}
      model.groups_per_scale: {total: {integer: [3, 12]}, skew: {uniform: [0, 2]}, minimum: 1}

Everything is checked before anything starts, and every mistake is reported at once with its place:
each key must be a setting, each choice, both ends of each range and a value between them must be
values that a run takes beside all its other settings. What a score depends on cannot be searched:
trials would be compared by different yardsticks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import RunConfig, SearchConfig
from pipeline.config_draft import ConfigError, Draft, File, Given, Problem, beside, read, unknown
from pipeline.search.definition import Definition
from pipeline.search.mistakes import problem_of_values, unknown_of_search, unknown_of_space
from pipeline.search.space import GROUPS, KINDS, STRUCTURE, TOTAL, Parameter, Space
from pipeline.settings import search_settings, settings

_AMOUNTS = ("train.total_images", "cadence.", "evaluation.")
"""Beginnings of the paths in which a search asks for less than its run does."""
PARTS = ("run", "settings", "search", "space")
_RANGE = re.compile(rf"(?P<name>.+)\.(?P<kind>{'|'.join(KINDS)})")
_CONDITION = re.compile(r"(?P<name>.+?)\.when\.(?P<other>.+)")
_YARDSTICKS = (
    "data.",
    "cadence.",
    "evaluation.",
    "sampling.",
    "registry.",
    "checkpoint.",
    "storage.",
    "model.image_size",
    "model.image_channels",
    "model.pixel_bits",
    "model.border_pixels",
    "model.likelihood",
    "train.total_images",
    "train.seed",
)
"""Beginnings of paths that cannot be searched: data, images and noise of the evaluation, its cadence,
what bits per dimension are, where things are kept."""


def load(source: str, overrides: Sequence[str] = ()) -> Definition:
    """Read a search preset, a YAML file or a URL, put KEY=VALUE over it, and check the whole.

    Raises ConfigError with every problem at once.
    """
    file = read(source, "tune")
    reading = _Reading(file)
    for text in overrides:
        reading.add(reading.draft.parse_override(text), of_file=False)
    return reading.finish()


class _Reading:
    """What has been read so far, and what was wrong with it."""

    def __init__(self, file: File) -> None:
        self.draft = Draft(file.name)
        self.problems: list[Problem] = []
        """Of the search and its space; the draft has those of the run."""
        self._file = file
        self._own: dict[str, Given] = {}
        """Settings that the search itself gives, over its run's."""
        self._search: dict[str, Given] = {}
        self._space: dict[str, Given] = {}
        entries = self.draft.parse(file.text, file.name)
        if self.draft.problems:  # of a file that is no YAML nothing else is known
            raise ConfigError(self.draft.problems)
        self._add_run([entry for entry in entries if entry.path == "run"])
        self.add([entry for entry in entries if entry.path != "run"], of_file=True)

    def _add_run(self, given: Sequence[Given]) -> None:
        if len(given) != 1 or not isinstance(given[0].value, str):
            message = "give one preset, file or URL whose settings are searched"
            self.draft.problems.append(Problem(self._file.name, "run", message))
            self.draft.partly_read = True
            return
        try:
            self.draft.add_file(read(beside(self._file.location, given[0].value)))
        except ConfigError as error:
            self.draft.problems += [replace(each, origin=given[0].origin) for each in error.problems]
            self.draft.partly_read = True

    def add(self, entries: Iterable[Given], *, of_file: bool) -> None:
        """Put entries over what is there; outside the file a plain path is a setting of the run."""
        for entry in entries:
            part, _, rest = entry.path.partition(".")
            here = {"search": self._search, "space": self._space}.get(part)
            if here is not None and rest:
                if of_file and rest in here:
                    self._report(entry.origin, entry.path, f"is given already at {here[rest].origin}")
                here[rest] = replace(entry, path=rest)
            elif part == "settings" and of_file and rest:
                self._own[rest] = replace(entry, path=rest)
            elif part not in PARTS and not of_file:
                self._own[entry.path] = entry
            elif part in PARTS and entry.value in (None, {}):
                continue
            elif entry.path == "run":
                self._report(entry.origin, entry.path, f"is given in {self._file.name}; change it there")
            else:
                self._report(entry.origin, entry.path, f"is none of {', '.join(PARTS)}")

    def finish(self) -> Definition:
        """The definition, or ConfigError with all problems."""
        of_the_run = dict(self.draft.given)
        self.draft.add(self._own.values())
        search, parameters = self._read_search(), self._read_space()
        base = self._base()
        if base is None:
            raise ConfigError([*self.draft.problems, *self.problems])
        full = {
            path: of_the_run[path].value if path in of_the_run else setting.default
            for path, setting in settings().items()
            if path.startswith(_AMOUNTS) and path in self._own
        }
        space = Space(tuple(parameters), base.model.num_scales)
        definition = Definition(base, search or SearchConfig(), space, full)
        self._check_space(definition)
        if search is not None:
            self._check_search(definition)
        if self.problems:
            raise ConfigError(self.problems)
        return definition

    def _base(self) -> RunConfig | None:
        try:
            return self.draft.finish()
        except ConfigError:
            return None  # the draft has the problems

    # -- search ---------------------------------------------------------------------------

    def _read_search(self) -> SearchConfig | None:
        values = {}
        for name, entry in self._search.items():
            known = search_settings().get(f"search.{name}")
            if known is None:
                self._report(entry.origin, f"search.{name}", unknown_of_search(name))
                continue
            try:
                values[name] = SearchConfig.parse(name, entry.value)
            except ValueError:
                self._report(entry.origin, f"search.{name}", f"must be {known.allowed}, not {entry.value!r}")
        return None if len(values) < len(self._search) else SearchConfig.model_validate(values)

    def _check_search(self, definition: Definition) -> None:
        search, base = definition.search, definition.base
        if search.searcher == "grid":
            for parameter in definition.space.parameters:
                if parameter.kind in ("uniform", "log_uniform"):
                    self._blame_search(
                        "searcher",
                        f"grid needs lists; {parameter.name} is {parameter.kind}: give it a choice",
                    )
        if (search.max_cost is None) != (search.price_per_device_hour is None):
            self._blame_search("max_cost", "needs price_per_device_hour, and that needs max_cost")
        if search.scheduler == "none":
            return
        if search.compare == "device_seconds":
            if search.first_rung_device_seconds is None:
                self._blame_search("first_rung_device_seconds", "is needed to compare by device_seconds")
        elif definition.first_rung % base.cadence.evaluate_images:
            self._blame_search(
                "first_rung_images",
                f"{definition.first_rung:,.0f} is no multiple of cadence.evaluate_images, "
                f"{base.cadence.evaluate_images:,}: no trial would be evaluated there",
            )
        elif definition.first_rung >= base.train.total_images:
            self._blame_search(
                "first_rung_images",
                f"at {definition.first_rung:,.0f} of {base.train.total_images:,} images nothing is left to "
                "stop early; lower it (by default it is cadence.evaluate_images), or search.scheduler=none",
            )

    def _blame_search(self, name: str, message: str) -> None:
        origin = self._search[name].origin if name in self._search else self._file.name
        self._report(origin, f"search.{name}", message)

    # -- space ----------------------------------------------------------------------------

    def _read_space(self) -> list[Parameter]:
        kinds: dict[str, tuple[str, Given]] = {}
        conditions: dict[str, dict[str, Given]] = {}
        for path, entry in self._space.items():
            if found := _CONDITION.fullmatch(path):
                conditions.setdefault(found["name"], {})[found["other"]] = entry
            elif found := _RANGE.fullmatch(path):
                kinds[found["name"]] = (found["kind"], entry)
            elif path in STRUCTURE:
                kinds[path] = ("choice", replace(entry, value=[entry.value]))
            else:
                self._report(entry.origin, f"space.{path}", unknown_of_space(path))
        if not self._space:
            self._report(self._file.name, "space", "is empty; say which settings to search")
        parts = [entry for name, (_, entry) in kinds.items() if name in STRUCTURE]
        if parts and TOTAL not in kinds:
            message = "needs a total, as in {total: {integer: [3, 12]}}"
            self._report(parts[0].origin, f"space.{GROUPS}", message)
        parameters = [
            parameter
            for name, (kind, entry) in kinds.items()
            if (parameter := self._parameter(name, kind, entry)) is not None
        ]
        for name, others in conditions.items():
            if name not in kinds:
                origin = next(iter(others.values())).origin
                self._report(origin, f"space.{name}", "has a condition, but no values to choose from")
        return self._with_conditions(_completed_structure(parameters), conditions)

    def _parameter(self, name: str, kind: str, entry: Given) -> Parameter | None:
        where = f"space.{name}"
        if name not in settings() and name not in STRUCTURE:
            self._report(entry.origin, where, unknown(name))
        elif name.startswith(_YARDSTICKS):
            self._report(
                entry.origin, where, "cannot be searched: scores of trials could not be compared any more"
            )
        elif name in self._own:
            self._report(
                entry.origin, where, f"is searched here and given a value at {self._own[name].origin}"
            )
        elif problem := problem_of_values(name, kind, entry.value):
            self._report(entry.origin, f"{where}.{kind}", problem)
        else:
            values = entry.value
            if kind in ("uniform", "log_uniform"):
                values = [float(value) for value in values]
            return Parameter(name, kind, tuple(values))  # type: ignore[arg-type] # of KINDS, by _RANGE
        return None

    def _with_conditions(
        self, parameters: Sequence[Parameter], conditions: Mapping[str, Mapping[str, Given]]
    ) -> list[Parameter]:
        """The parameters with their conditions, if these name parameters above with values of theirs."""
        found: list[Parameter] = []
        for parameter in parameters:
            when = {}
            for other, entry in conditions.get(parameter.name, {}).items():
                above = next((each for each in found if each.name == other), None)
                where, values = f"space.{parameter.name}.when.{other}", entry.value
                if parameter.name in STRUCTURE:
                    self._report(entry.origin, where, f"{GROUPS} cannot have a condition")
                elif above is None or above.kind not in ("choice", "integer"):
                    self._report(
                        entry.origin,
                        where,
                        "must be a choice or an integer that is searched and stands above",
                    )
                elif not isinstance(values, list) or not values:
                    self._report(entry.origin, where, f"must be a list of its values, not {values!r}")
                elif strange := [value for value in values if value not in above.listed()]:
                    self._report(entry.origin, where, f"{strange[0]!r} is none of its values")
                else:
                    when[other] = tuple(values)
            found.append(replace(parameter, when=when))
        return found

    def _check_space(self, definition: Definition) -> None:
        """Each value by which a mistake would show, alone over the run's own settings."""
        names = [parameter.name for parameter in definition.space.parameters]
        if GROUPS in names and any(name in STRUCTURE for name in names):
            self._report(self._file.name, f"space.{GROUPS}", "is either a list or a structure, not both")
            return
        for parameter in definition.space.parameters:
            if parameter.name not in STRUCTURE:
                for value in parameter.probes():
                    self._try(definition, {**self._beside(definition, parameter), parameter.name: value})
        if TOTAL in names:
            for drawn in definition.space.extremes():
                self._try(definition, drawn)

    def _beside(self, definition: Definition, parameter: Parameter) -> dict[str, Any]:
        """A draw in which the parameter's condition holds, and the conditions of those it names."""
        drawn: dict[str, Any] = {}
        for name, values in parameter.when.items():
            other = next(each for each in definition.space.parameters if each.name == name)
            drawn |= self._beside(definition, other) | {name: values[0]}
        return drawn

    def _try(self, definition: Definition, drawn: Mapping[str, Any]) -> None:
        try:
            definition.config(drawn)
        except ConfigError as error:
            found = [(each.path, each.message) for each in error.problems]
        except ValueError as error:
            found = [(GROUPS, str(error))]
        else:
            return
        places = [
            entry.origin
            for name in reversed(list(drawn))
            for path, entry in self._space.items()
            if path == name or path.startswith(f"{name}.")
        ]
        shown = ", ".join(f"{name}={value}" for name, value in drawn.items())
        for path, message in found:
            # Of the same mistake with several values, the first will do.
            known = [each.message for each in self.problems if each.path == f"space.{path}"]
            if not any(f": {message.partition(', not ')[0]}" in each for each in known):
                self._report(places[0], f"space.{path}", f"with {shown}: {message}")

    def _report(self, origin: str, path: str, message: str) -> None:
        self.problems.append(Problem(origin, path, message))


def _completed_structure(parameters: Sequence[Parameter]) -> list[Parameter]:
    """With the parts of a structure that were not given: no skew, at least one group on a scale."""
    names = {parameter.name for parameter in parameters}
    if names.isdisjoint(STRUCTURE):
        return list(parameters)
    defaults = {f"{GROUPS}.skew": 0.0, f"{GROUPS}.minimum": 1}
    missing = [Parameter(name, "choice", (value,)) for name, value in defaults.items() if name not in names]
    return [*parameters, *missing]
