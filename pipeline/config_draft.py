"""A configuration in the making: what was given, where, and everything that is wrong with it.

Whatever the form, what is given becomes one flat list of (dotted path, value, where it stands),
later entries over earlier ones: the base, the file, the overrides in their order. It is checked
as a whole and every mistake is reported at once, each with its place.
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
from pipeline.settings import nearest, section_names, settings

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


def presets(kind: str = "") -> tuple[str, ...]:
    """Names of the configurations that come with the package; of searches if `kind` is "tune"."""
    return tuple(sorted(file.stem for file in (_PRESETS / kind).glob("*.yaml")))


@dataclass(frozen=True)
class File:
    """A configuration's text, its name in messages, and the path or URL that a base is relative to."""

    name: str
    location: str
    text: str


def read(source: str, kind: str = "") -> File:
    """A preset of that kind, a file or a URL. Raises ConfigError if there is no such thing."""
    if "://" in source:
        # Only a URL needs the store's libraries, which take a second to import.
        from pipeline.storage import read_text

        return File(source, source, read_text(source))
    names, folder = presets(kind), _PRESETS / kind
    path = folder / f"{source}.yaml" if source in names else Path(source)
    name = (Path("configs") / kind / path.name).as_posix() if source in names else source
    try:
        return File(name, str(path), path.read_text("utf-8"))
    except FileNotFoundError:
        guess = "".join(f"; did you mean {near}?" for near in get_close_matches(path.stem, names, 1))
        message = f"is neither a file nor one of the presets {', '.join(names)}{guess}"
        raise ConfigError([Problem("", source, message)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", source, f"cannot be read: {error}")]) from error


def beside(location: str, base: str) -> str:
    """Where a base is, as named in the file at `location`."""
    if base in presets() or "://" in base:
        return base
    if "://" in location:
        return f"{location.rpartition('/')[0]}/{base}"
    return str(Path(location).parent / base)


def unknown(path: str) -> str:
    """What to say of a path that is no setting's."""
    guess = nearest(path)
    return "there is no such setting" + (f"; did you mean {guess}?" if guess else "")


@dataclass(frozen=True)
class Given:
    """A value that somebody wrote, and where."""

    path: str
    value: Any
    origin: str


class Draft:
    """What has been given so far, later over earlier, and what was wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: dict[str, Given] = {}
        self.problems: list[Problem] = []
        self.partly_read = False
        """Whether a file could not be read: nobody knows then what else was given."""

    def add_file(self, file: File, is_base: bool = False) -> None:
        """Put a file over what is there, and its base below it."""
        entries: dict[str, Given] = {}
        for entry in self.parse(file.text, file.name):
            if entry.path in entries:
                self._report(entry, f"is given already at {entries[entry.path].origin}")
            entries[entry.path] = entry
        base = entries.pop("base", None)
        if base and is_base:
            self._refuse_base(base, "this file is a base itself and cannot have one")
        elif base and not isinstance(base.value, str):
            self._refuse_base(base, f"must be the name of a preset or file, not {base.value!r}")
        elif base:
            self._add_base(base, beside(file.location, base.value))
        self.add(entries.values())

    def _add_base(self, base: Given, source: str) -> None:
        try:
            file = read(source)
        except InputError as error:
            self._refuse_base(base, str(error))
        else:
            self.add_file(file, is_base=True)

    def _refuse_base(self, base: Given, message: str) -> None:
        self._report(base, message)
        self.partly_read = True

    def add_override(self, text: str) -> None:
        """Put one KEY=VALUE over what is there; the value is YAML."""
        self.add(self.parse_override(text))

    def parse_override(self, text: str) -> list[Given]:
        """What one KEY=VALUE gives; if it is none, a problem is noted."""
        path, _, value = (part.strip() for part in text.partition("="))
        if path and value:
            origin = f"{path}={storage.shown(value)}"  # the place of the data may hold a password
            return self.parse(value, origin, path, is_file=False)
        advice = "write KEY=VALUE, as in train.batch_size=32 (null for none)"
        self.problems.append(Problem("", "", f"{text!r} sets nothing; {advice}"))
        return []

    def add(self, entries: Iterable[Given]) -> None:
        """Put values over what is there; those that name no setting are problems."""
        for entry in entries:
            if entry.path in settings():
                self.given.pop(entry.path, None)  # so that the order is that of the last word
                self.given[entry.path] = entry
            elif entry.path not in section_names():
                self._report(entry, unknown(entry.path))
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

    def parse(self, text: str, origin: str, path: str = "", is_file: bool = True) -> list[Given]:
        """What a text of YAML gives, below `path`; if it is none, a problem is noted."""

        def at(line: int) -> str:
            return f"{origin}:{line}" if is_file and line else origin

        try:
            return [Given(entry.path, entry.value, at(entry.line)) for entry in config_yaml.read(text, path)]
        except config_yaml.PlainYAMLError as error:
            self.problems.append(Problem(at(error.line), path, error.message))
            self.partly_read |= is_file
            return []

    def _report(self, entry: Given, message: str) -> None:
        self.problems.append(Problem(entry.origin, entry.path, message))

    def _blame(self, paths: Sequence[str], message: str) -> None:
        """Report under the first path, at the place where one of the paths was given last."""
        places = [self.name, *(entry.origin for path, entry in self.given.items() if path in paths)]
        self.problems.append(Problem(places[-1], paths[0], message))
