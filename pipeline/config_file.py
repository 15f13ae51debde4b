"""From a preset, a file or a URL and KEY=VALUE overrides to a checked RunConfig, and back.

Whatever the form, what is given becomes one flat list of (dotted path, value, where it stands),
later entries over earlier ones: the base, the file, the overrides in their order. It is checked
as a whole and every mistake is reported at once, each with its place.

A file may name one base (`base: ffhq256`) whose settings hold where it is silent; a base has
no base of its own, so that at most two files decide a run. There is no interpolation and no
look-up in the environment: what a run was trained with stands in its files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nvae.config import problems as model_problems
from pipeline import config_yaml, storage
from pipeline.config import RULES, RunConfig
from pipeline.errors import InputError
from pipeline.settings import Setting, flatten, nearest, resumable, section_names, settings

# Beside the packages, in the repository and in an installed wheel alike. Not looked up by the
# import system: it would merge any other installed folder named `configs` with ours.
_PRESETS = Path(__file__).parent.parent / "configs"

_LONGEST_PART = 1000
"""Characters of a place, path or message that are shown."""


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands (file:line or KEY=VALUE), which setting, and what is wrong."""

    origin: str
    path: str
    message: str

    def __str__(self) -> str:
        path = "" if self.origin.startswith(f"{self.path}=") else self.path
        return ": ".join(_shortly(part) for part in (self.origin, path, self.message) if part)


def _shortly(text: str) -> str:
    """The text for a message, however long the key or value is that somebody wrote."""
    return text if len(text) <= _LONGEST_PART else text[:_LONGEST_PART] + "..."


class ConfigError(InputError):
    """A configuration that cannot be used; `problems` holds every reason."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        heading = [] if len(problems) == 1 else [f"{len(problems)} problems in the configuration:"]
        super().__init__("\n  ".join([*heading, *map(str, problems)]))


def presets() -> tuple[str, ...]:
    """Names of the configurations that come with the package."""
    return tuple(sorted(file.stem for file in _PRESETS.glob("*.yaml")))


def load(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset, a YAML file or a URL, put KEY=VALUE overrides over it, and check the whole.

    Raises ConfigError with every problem at once.
    """
    file = _read(source)
    draft = _Draft(file.name)
    draft.add_file(file)
    for override in overrides:
        draft.add_override(override)
    return draft.finish()


def from_mapping(mapping: Mapping[str, Any], origin: str = "configuration") -> RunConfig:
    """The configuration that `to_mapping` wrote; `origin` names its place in messages."""
    draft = _Draft(origin)
    draft.add(_Given(path, value, origin) for path, value in flatten(mapping))
    return draft.finish()


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Nested mappings of plain values, as in YAML and JSON."""
    return config.model_dump(mode="json")


def without_secrets(config: RunConfig) -> RunConfig:
    """The configuration as it may be written down: no password or signature in the place of the data."""
    data = config.data.model_copy(update={"root": storage.shown(config.data.root)})
    return config.model_copy(update={"data": data})


def to_yaml(config: RunConfig) -> str:
    """The text of a file that `load` reads back to the same configuration."""
    return config_yaml.write(to_mapping(config))


def leaves(config: RunConfig) -> dict[str, Any]:
    """Each setting's dotted path and its value, a scalar or a list."""
    return dict(flatten(to_mapping(config)))


def changed(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of the settings that differ."""
    before, after = leaves(old), leaves(new)
    return [(path, before[path], after[path]) for path in before if before[path] != after[path]]


def identity_changes(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """The changes that make another run of it: a run cannot be continued with them."""
    return [change for change in changed(old, new) if not resumable(change[0])]


@dataclass(frozen=True)
class Explanation:
    """A setting, and the value that each preset gives it."""

    setting: Setting
    presets: Mapping[str, Any]

    def __str__(self) -> str:
        setting = self.setting
        default = "required" if setting.required else f"default {as_text(setting.default)}"
        change = "may change when a run continues" if setting.resumable else "part of the run's identity"
        values = ", ".join(f"{name} {as_text(value)}" for name, value in self.presets.items())
        return (
            f"{setting.path}: {setting.allowed}; {default}; {change}\n"
            f"    {setting.description}\n"
            f"    Presets: {values}"
        )


def explain(path: str) -> tuple[Explanation, ...]:
    """What a setting means, or all settings of a section. Raises ConfigError for another path."""
    chosen = [setting for setting in settings().values() if f"{setting.path}.".startswith(f"{path}.")]
    if not chosen:
        raise ConfigError([Problem("", path, _unknown(path))])
    values = {name: leaves(load(name)) for name in presets()}
    return tuple(
        Explanation(setting, {name: values[name][setting.path] for name in values}) for setting in chosen
    )


def as_text(value: Any) -> str:
    """One value as it is written behind KEY=."""
    return config_yaml.write(value).strip()


@dataclass(frozen=True)
class _File:
    """A configuration's text, its name in messages, and the path or URL that a base is relative to."""

    name: str
    location: str
    text: str


def _read(source: str) -> _File:
    if "://" in source:
        # Only a URL needs the store's libraries, which take a second to import.
        from pipeline.storage import read_text

        return _File(source, source, read_text(source))
    is_preset = source in presets()
    path = _PRESETS / f"{source}.yaml" if is_preset else Path(source)
    try:
        return _File(f"configs/{source}.yaml" if is_preset else source, str(path), path.read_text("utf-8"))
    except FileNotFoundError:
        guess = "".join(
            f"; did you mean {name}?" for name in get_close_matches(Path(source).stem, presets(), 1)
        )
        message = f"is neither a file nor one of the presets {', '.join(presets())}{guess}"
        raise ConfigError([Problem("", source, message)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", source, f"cannot be read: {error}")]) from error


def _beside(location: str, base: str) -> str:
    """Where a base is, as named in the file at `location`."""
    if base in presets() or "://" in base:
        return base
    if "://" in location:
        return f"{location.rpartition('/')[0]}/{base}"
    return str(Path(location).parent / base)


def _unknown(path: str) -> str:
    guess = nearest(path)
    return "there is no such setting" + (f"; did you mean {guess}?" if guess else "")


@dataclass(frozen=True)
class _Given:
    """A value that somebody wrote, and where."""

    path: str
    value: Any
    origin: str


class _Draft:
    """What has been given so far, later over earlier, and what was wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: dict[str, _Given] = {}
        self.problems: list[Problem] = []
        self.partly_read = False
        """Whether a file could not be read: nobody knows then what else was given."""

    def add_file(self, file: _File, is_base: bool = False) -> None:
        """Put a file over what is there, and its base below it."""
        entries: dict[str, _Given] = {}
        for entry in self._parse(file.text, file.name):
            if entry.path in entries:
                self._report(entry, f"is given already at {entries[entry.path].origin}")
            entries[entry.path] = entry
        base = entries.pop("base", None)
        if base and is_base:
            self._refuse_base(base, "this file is a base itself and cannot have one")
        elif base and not isinstance(base.value, str):
            self._refuse_base(base, f"must be the name of a preset or file, not {base.value!r}")
        elif base:
            self._add_base(base, _beside(file.location, base.value))
        self.add(entries.values())

    def _add_base(self, base: _Given, source: str) -> None:
        try:
            file = _read(source)
        except InputError as error:
            self._refuse_base(base, str(error))
        else:
            self.add_file(file, is_base=True)

    def _refuse_base(self, base: _Given, message: str) -> None:
        self._report(base, message)
        self.partly_read = True

    def add_override(self, text: str) -> None:
        """Put one KEY=VALUE over what is there; the value is YAML."""
        path, _, value = (part.strip() for part in text.partition("="))
        if path and value:
            origin = f"{path}={storage.shown(value)}"  # the place of the data may hold a password
            self.add(self._parse(value, origin, path, is_file=False))
        else:
            advice = "write KEY=VALUE, as in train.batch_size=32 (null for none)"
            self.problems.append(Problem("", "", f"{text!r} sets nothing; {advice}"))

    def add(self, entries: Iterable[_Given]) -> None:
        """Put values over what is there; those that name no setting are problems."""
        for entry in entries:
            if entry.path in settings():
                self.given.pop(entry.path, None)  # so that the order is that of the last word
                self.given[entry.path] = entry
            elif entry.path not in section_names():
                self._report(entry, _unknown(entry.path))
            elif entry.value not in (None, {}):  # a section with nothing in it says nothing
                self._report(entry, f"is a section, not a setting; it cannot be {entry.value!r}")

    def finish(self) -> RunConfig:
        """The configuration, or ConfigError with all problems."""
        values = self._check_each() | self._check_model()
        self._check_complete()
        self._check_rules(values)
        if self.problems:
            raise ConfigError(self.problems)
        nested: dict[str, dict[str, Any]] = {}
        for path, value in values.items():
            section, _, name = path.partition(".")
            nested.setdefault(section, {})[name] = value
        return RunConfig.model_validate(nested)

    def _check_each(self) -> dict[str, Any]:
        """The values that are fine alone, as their own types; the model is checked by itself."""
        values = {}
        for path, entry in self.given.items():
            section, _, name = path.partition(".")
            if section == "model":
                continue
            try:
                values[path] = RunConfig.section(section).parse(name, entry.value)
            except ValueError:
                self._report(entry, f"must be {settings()[path].allowed}, not {entry.value!r}")
        return values

    def _check_model(self) -> dict[str, Any]:
        values = {path: entry.value for path, entry in self.given.items() if path.startswith("model.")}
        for field, message in model_problems(
            {path[len("model.") :]: value for path, value in values.items()}
        ):
            self._blame([f"model.{field}"], message)
        return values

    def _check_complete(self) -> None:
        if self.partly_read:
            return
        # A misspelt setting is reported as that, not as missing too.
        named = {problem.path for problem in self.problems}
        meant = named | {nearest(path) for path in named} | self.given.keys()
        for path, setting in settings().items():
            if setting.required and path not in meant:
                message = f"is missing; it must be {setting.allowed}. {setting.description}"
                self.problems.append(Problem(self.name, path, message))

    def _check_rules(self, values: Mapping[str, Any]) -> None:
        """What must hold between settings, as far as these are known and fine alone."""
        refused = {problem.path for problem in self.problems}
        for rule in RULES:
            required = [path for path in rule.paths if self.partly_read or settings()[path].required]
            if refused.isdisjoint(rule.paths) and values.keys() >= set(required):
                operands = [values.get(path, settings()[path].default) for path in rule.paths]
                if not rule.holds(*operands):
                    self._blame(rule.paths, rule.message.format(*operands))

    def _parse(self, text: str, origin: str, path: str = "", is_file: bool = True) -> list[_Given]:
        def at(line: int) -> str:
            return f"{origin}:{line}" if is_file and line else origin

        try:
            return [_Given(entry.path, entry.value, at(entry.line)) for entry in config_yaml.read(text, path)]
        except config_yaml.PlainYAMLError as error:
            self.problems.append(Problem(at(error.line), path, error.message))
            self.partly_read |= is_file
            return []

    def _report(self, entry: _Given, message: str) -> None:
        self.problems.append(Problem(entry.origin, entry.path, message))

    def _blame(self, paths: Sequence[str], message: str) -> None:
        """Report under the first path, at the place where one of the paths was given last."""
        places = [self.name, *(entry.origin for path, entry in self.given.items() if path in paths)]
        self.problems.append(Problem(places[-1], paths[0], message))
