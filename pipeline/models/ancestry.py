"""Where a version comes from and what was made of it, as far as the registry knows.

A version names the model whose weights its training began with; those whose parent it is in turn
began with its own. What is not registered (a folder, a deleted version) is an end of the line. Tags can
be edited by anybody, so a version that is its own ancestor ends it as well.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.models.versions import Version

DEEPEST = 100
"""Generations that are followed, up or down."""


@dataclass(frozen=True)
class Descent:
    """One version with all that began with its weights."""

    version: Version
    children: tuple["Descent", ...]


@dataclass(frozen=True)
class Ancestry:
    """A version between its ancestors and its descendants."""

    origin: str
    """What the oldest known ancestor began with, if that is no registered version; else empty."""
    ancestors: tuple[Version, ...]
    """The oldest first."""
    descent: Descent


def ancestry(version: Version, versions: Iterable[Version]) -> Ancestry:
    """The line of `version` among all versions of a registry."""
    by_ref = {each.ref: each for each in versions} | {version.ref: version}
    ancestors: list[Version] = []
    seen, parent = {version.ref}, version.parent
    while parent in by_ref and parent not in seen and len(ancestors) < DEEPEST:
        seen.add(parent)
        ancestors.insert(0, by_ref[parent])
        parent = by_ref[parent].parent
    children: dict[str, list[Version]] = {}
    for each in sorted(by_ref.values(), key=lambda one: (one.created, one.name, int(one.version))):
        children.setdefault(each.parent, []).append(each)
    return Ancestry(parent, tuple(ancestors), _descent(version, children, seen, DEEPEST))


def _descent(version: Version, children: dict[str, list[Version]], seen: set[str], depth: int) -> Descent:
    new = [child for child in children.get(version.ref, []) if child.ref not in seen] if depth else []
    seen.update(child.ref for child in new)
    return Descent(version, tuple(_descent(child, children, seen, depth - 1) for child in new))


def drawn(line: Ancestry) -> Iterator[str]:
    """The lines of a tree: the data set, the ancestors, the version (marked), what was made of it."""
    version = line.descent.version
    licence = f", licence: {version.data_licence}" if version.data_licence else ""
    yield f"{version.data_root or 'data set'} (content {version.data_hash[:12]}{licence})"
    indent = ""
    if line.origin:
        yield f"└─ {line.origin} (not registered here)"
        indent = "   "
    for ancestor in line.ancestors:
        yield f"{indent}└─ {described(ancestor)}"
        indent += "   "
    yield from _branch(line.descent, indent, "└─", marked=True)


def _branch(descent: Descent, indent: str, joint: str, *, marked: bool = False) -> Iterator[str]:
    yield f"{indent}{joint} {described(descent.version)}{'  <- this one' if marked else ''}"
    deeper = indent + ("   " if joint == "└─" else "│  ")
    for number, child in enumerate(descent.children, start=1):
        yield from _branch(child, deeper, "└─" if number == len(descent.children) else "├─")


def described(version: Version) -> str:
    """A version and its training in one line."""
    facts = [f"run {version.run_name}" if version.run_name else "no run"]
    if version.trial:
        facts.append(f"trial {version.trial}")
    facts.append(f"{version.images_seen:,} images")
    if version.world_size:
        facts.append(f"{version.world_size} worker{'s' if version.world_size > 1 else ''}")
    if version.score == version.score:
        facts.append(f"{version.score:.4f} bits/dim")
    facts += [f"code {version.code_version}"] if version.code_version else []
    aliases = f" [{', '.join(version.aliases)}]" if version.aliases else ""
    return f"{version.ref}{aliases}: {', '.join(facts)}"


def plain(line: Ancestry) -> dict[str, Any]:
    """The same for programs."""
    return {
        "data_root": line.descent.version.data_root,
        "data_hash": line.descent.version.data_hash,
        "data_licence": line.descent.version.data_licence,
        "origin": line.origin or None,
        "ancestors": [_facts(version) for version in line.ancestors],
        **_nested(line.descent),
    }


def _nested(descent: Descent) -> dict[str, Any]:
    return {**_facts(descent.version), "children": [_nested(child) for child in descent.children]}


def _facts(version: Version) -> dict[str, Any]:
    return {
        "model": version.ref,
        "aliases": list(version.aliases),
        "run": version.run_name,
        "run_id": version.run_id,
        "trial": version.trial or None,
        "parent": version.parent or None,
        "images_seen": version.images_seen,
        "world_size": version.world_size,
        "bits_per_dim": version.score,
        "code_version": version.code_version,
        "created": version.created,
    }
