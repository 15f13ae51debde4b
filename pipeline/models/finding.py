"""Finding models: which versions fulfil a query, in which order, as MLflow has them at this moment."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Protocol

from pipeline.models.fields import Field, FieldError, field, known_metrics
from pipeline.models.query import Condition, parse
from pipeline.models.versions import CRITERION, Version

BEST_FIRST = CRITERION.replace("/", ".")


class Versions(Protocol):
    """What is needed of a catalogue (catalogue.py)."""

    def versions(self, *, refresh: bool = False) -> list[Version]:
        """All there are, as far as is known."""

    def confirmed(self, versions: Sequence[Version]) -> list[Version | None]:
        """These as they are now; None for what is gone."""


def find(
    catalogue: Versions,
    query: str = "",
    *,
    sort: str = BEST_FIRST,
    descending: bool = False,
    limit: int | None = None,
    refresh: bool = False,
) -> list[Version]:
    """The versions that fulfil `query` (query.py), sorted by a field (fields.py), at most `limit`.

    Whatever lacks the field, or has no finite value there, comes last, whichever way is sorted; of equals
    the older version comes first. Each that is returned has been confirmed (catalogue.py).

    Raises QueryError or FieldError if the query or the order cannot be understood, UnreachableError if
    MLflow does not answer.
    """
    condition, order = parse(query), field(sort)
    known = {version.ref: version for version in catalogue.versions(refresh=refresh)}
    _refuse_misspelt([order, *condition.fields()], list(known.values()))
    sure: set[str] = set()
    while True:
        chosen = _chosen(list(known.values()), condition, order, descending, limit)
        doubtful = [version for version in chosen if version.ref not in sure]
        if not doubtful:
            return chosen
        # One that is gone, or is another now, makes room for one that was not among the first.
        for before, now in zip(doubtful, catalogue.confirmed(doubtful), strict=True):
            if now is None:
                del known[before.ref]
            else:
                known[now.ref] = now
                sure.add(now.ref)


def _chosen(
    versions: Sequence[Version], condition: Condition, order: Field, descending: bool, limit: int | None
) -> list[Version]:
    found = [version for version in versions if condition.matches(version)]
    found.sort(key=lambda version: (version.created, version.name, int(version.version)))
    placed = [(order.value(version), version) for version in found]
    with_value = [pair for pair in placed if _is_finite(pair[0])]
    without = [version for value, version in placed if not _is_finite(value)]
    # Stable either way, so that of equals the older one stays first.
    with_value.sort(key=lambda pair: _place(pair[0]), reverse=descending)
    return [*(version for _, version in with_value), *without][:limit]


def _is_finite(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and value - value != 0)


def _place(value: object) -> tuple[int, float, str]:
    """Numbers before texts; lists and the like by how they are written."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, str(value)


def _refuse_misspelt(fields: Sequence[Field], versions: Sequence[Version]) -> None:
    """Any name of a metric is possible; one that nothing has, beside one much like it, is a mistake."""
    for each in fields:
        if "." not in each.name or each.kind != "number" or any(map(each.values, versions)):
            continue
        known = set().union(*map(known_metrics, versions))
        near = get_close_matches(each.name, known, n=1, cutoff=0.85)
        if near and near[0].partition(".")[2] != each.name.partition(".")[2]:
            raise FieldError(f"No version has the metric {each.name}. Did you mean {near[0]}?")
