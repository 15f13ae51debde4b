"""How models are named, what is said of a name that means none, and other reasons for having no model.

models:/NAME@ALIAS or models:/NAME/VERSION; NAME is a plain name, so that no model can lead anywhere else.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches

from pipeline.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""A registered model's name."""
_REFERENCE = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[A-Za-z0-9_.-]+)|/(?P<version>[0-9]{1,9}))")
_SHOWN = 20
_LONGEST_SHOWN = 200


class RegistryError(InputError):
    """A model that cannot be exported, registered, found or trusted."""


class UnreachableError(RegistryError):
    """MLflow cannot be reached, or refuses; it may be otherwise later."""


class MissingDatabaseError(UnreachableError):
    """No training has made an MLflow database there yet."""


@dataclass(frozen=True)
class Reference:
    """A model's name, and either an alias or a version."""

    name: str
    alias: str | None
    version: str | None


def check_name(name: str) -> str:
    """`name`, if it can name a registered model and a folder; raises RegistryError."""
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{quoted(name)} cannot be the name of a model; use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return name


def parse_reference(ref: str) -> Reference:
    """What `ref` says; raises RegistryError if it is no reference to a registered model."""
    match = _REFERENCE.fullmatch(ref)
    if match is None:
        raise RegistryError(
            f"{quoted(ref)} names no model; write models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    version = match["version"]
    return Reference(check_name(match["name"]), match["alias"], version and str(int(version)))


def quoted(name: str) -> str:
    """A name that somebody gave, for a message; only the beginning of one that is endless."""
    return repr(name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…")


def no_model(name: str, place: str, names: Collection[str]) -> RegistryError:
    """There is no model of this name; `place` is MLflow's address, fit for messages."""
    known = ", ".join(sorted(names)[:_SHOWN]) or "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return RegistryError(
        f"There is no registered model {quoted(name)} in {place}. Models there: {known}{more}."
        f"{_suggestion(name, names)}"
    )


def no_alias(name: str, alias: str, aliases: Collection[str]) -> RegistryError:
    known = ", ".join(sorted(aliases)) or "none"
    return RegistryError(
        f"{name} has no alias {quoted(alias)}; its aliases: {known}.{_suggestion(alias, aliases)}"
    )


def no_version(name: str, number: str, newest: Collection[str]) -> RegistryError:
    """`newest` are the numbers of the newest versions, the newest first."""
    return RegistryError(f"{name} has no version {number}; the newest: {', '.join(newest) or 'none'}.")


def _suggestion(given: str, known: Collection[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
