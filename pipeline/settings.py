"""Every setting of a run by its dotted path: what it means, what it may be, whether it may change.

All of it is read off the JSON schema that pydantic derives from `pipeline/config.py`, so there is
no second list of settings. Messages about mistakes, `nvae config explain`, MLflow's parameters
and the check of a resumed run use this one view.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from nvae.config import RANGES, allowed
from pipeline.config import RunConfig, SearchConfig

_LONGEST_PATH = 200
"""Letters of a misspelt path for which the nearest setting is sought: the search is quadratic."""


@dataclass(frozen=True)
class Setting:
    """One leaf of RunConfig."""

    path: str
    description: str
    allowed: str
    """Its values in words, to follow "must be": "a whole number >= 1"."""
    default: Any
    required: bool
    resumable: bool


@cache
def settings() -> dict[str, Setting]:
    """All leaves of RunConfig in the order of the file."""
    return {leaf.path: leaf for section, schema in _sections() for leaf in _leaves(section, schema)}


@cache
def search_settings() -> dict[str, Setting]:
    """All leaves of SearchConfig; their paths begin with `search`."""
    return {leaf.path: leaf for leaf in _leaves("search", SearchConfig.model_json_schema())}


def _leaves(section: str, schema: Mapping[str, Any]) -> Iterator[Setting]:
    for name, leaf in schema["properties"].items():
        yield Setting(
            path=f"{section}.{name}",
            description=" ".join(leaf["description"].split()),
            allowed=allowed(name) if section == "model" else _in_words(leaf),
            default=leaf.get("default"),
            required=name in schema.get("required", ()),
            resumable=leaf.get("resumable", False),
        )


def section_names() -> tuple[str, ...]:
    """The first components of all paths."""
    return tuple(section for section, _ in _sections())


def resumable(path: str) -> bool:
    """Whether the setting may differ when a run continues; the others are its identity."""
    return settings()[path].resumable


def nearest(path: str) -> str | None:
    """The setting whose path is likely meant: similar as a whole, or in its last component."""

    def similarity(known: str) -> float:
        last, last_known = path.rpartition(".")[2], known.rpartition(".")[2]
        whole = SequenceMatcher(None, path, known).ratio()
        # A right name in the wrong section ranks by the whole path among its namesakes.
        return max(whole, 0.9 * SequenceMatcher(None, last, last_known).ratio() + 0.1 * whole)

    if len(path) > _LONGEST_PATH:
        return None
    best = max(settings(), key=similarity)
    return best if similarity(best) >= 0.68 else None


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors. Nothing is required: a base may give it."""
    document = RunConfig.model_json_schema()
    document["properties"] = {
        "base": {
            "type": "string",
            "description": "Preset or file whose settings hold where this one is silent.",
        }
    } | document["properties"]
    for name, (low, high) in RANGES.items():
        document["$defs"]["NVAEConfig"]["properties"][name] |= {"minimum": low, "maximum": high}
    for part in (document, *document["$defs"].values()):
        part.pop("required", None)
    return document


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested mappings; lists and empty mappings are values."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sections() -> Iterator[tuple[str, dict[str, Any]]]:
    document = RunConfig.model_json_schema()
    for name, reference in document["properties"].items():
        yield name, document["$defs"][reference["$ref"].rpartition("/")[2]]


def _in_words(leaf: Mapping[str, Any]) -> str:
    """A leaf's JSON schema as a phrase."""
    if "anyOf" in leaf:
        return " or ".join(_in_words(choice) for choice in leaf["anyOf"])
    if "enum" in leaf:
        return f"one of {', '.join(leaf['enum'])}"
    if "const" in leaf:
        return str(leaf["const"])
    if "items" in leaf:
        return f"a list, each {_in_words(leaf['items'])}"
    noun = {
        "boolean": "true or false",
        "integer": "a whole number",
        "null": "null",
        "number": "a number",
        "string": "text",
    }[leaf["type"]]
    bounds = [
        f"{sign} {leaf[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in leaf
    ]
    if "pattern" in leaf:
        bounds.append(f"that matches {leaf['pattern']}")
    return " ".join([noun, " and ".join(bounds)]).strip()
