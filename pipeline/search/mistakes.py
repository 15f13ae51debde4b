"""What is wrong with one part of a search's file, in words."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pipeline.search.groups import LARGEST_SKEW
from pipeline.search.space import GROUPS, KINDS, STRUCTURE
from pipeline.settings import nearest, search_settings, settings


def problem_of_values(name: str, kind: str, values: Any) -> str:
    """What is wrong with the values of a parameter; "" if nothing is."""
    wrong = _problem_of_kind(kind, values)
    return _problem_of_structure(STRUCTURE[name], kind, values) if name in STRUCTURE and not wrong else wrong


def _problem_of_kind(kind: str, values: Any) -> str:
    if kind == "choice":
        if isinstance(values, list) and values:
            return "" if len({repr(value) for value in values}) == len(values) else "names a value twice"
        return f"must be a list of values, not {values!r}"
    number = int if kind == "integer" else (int, float)
    is_pair = isinstance(values, list) and len(values) == 2
    if not is_pair or not all(isinstance(v, number) and not isinstance(v, bool) for v in values):
        noun = "whole numbers" if kind == "integer" else "numbers"
        return f"must be two {noun}, [LOWEST, HIGHEST], not {values!r}"
    if not values[0] < values[1]:
        return f"must begin with the lower end, not {values!r}"
    if kind == "log_uniform" and values[0] <= 0:
        return f"must lie above 0, where a logarithm is, not {values!r}"
    return ""


def _problem_of_structure(part: str, kind: str, values: Sequence[Any]) -> str:
    if part == "skew":
        fine = all(isinstance(value, int | float) and abs(value) <= LARGEST_SKEW for value in values)
        return "" if fine else f"must be numbers from {-LARGEST_SKEW:g} to {LARGEST_SKEW:g}, not {values!r}"
    whole = kind in ("choice", "integer") and all(type(value) is int and value >= 1 for value in values)
    return "" if whole else f"must be whole numbers >= 1, not {values!r}"


def unknown_of_search(name: str) -> str:
    known = [path.partition(".")[2] for path in search_settings()]
    guess = get_close_matches(name, known, 1)
    return "there is no such setting of a search" + (f"; did you mean search.{guess[0]}?" if guess else "")


def unknown_of_space(path: str) -> str:
    name, _, last = (path, "", "") if path in settings() else path.rpartition(".")
    if name in settings():
        parts = [part for part in STRUCTURE.values() if name == GROUPS]
        close = get_close_matches(last, [*KINDS, *parts], 1)
        known = ", ".join([*(f"{kind}: [...]" for kind in KINDS), *parts])
        return f"say what to choose from: one of {known}" + (f"; did you mean {close[0]}?" if close else "")
    guess = nearest(name)
    return "there is no such setting" + (f"; did you mean {guess}?" if guess else "")
