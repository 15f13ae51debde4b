"""All registered versions, fast: from a local cache that is brought up to date by what has changed.

MLflow hands out ten thousand versions in six seconds at best, for it makes an object of each of
their tags. So this machine remembers them (version_cache.py) and asks for the changes alone. What
MLflow 3 tells of changes decides how:

- A version that is created, described or moved to another stage gets a new `last_updated_timestamp`, by which
  a search is ordered: its first page has all that changed since the newest remembered moment. Clocks
  of several servers differ, and so do the moments of writing and of committing: what changed up to
  ten minutes before is read again. If more changed than one page holds, all is read anew; nothing is
  ever read in pages that are counted from the beginning, for a deletion meanwhile would hide a version.
- Aliases belong to the model, and all models are one answer, asked for each time.
- A tag that is set, and a version that is deleted, leave no trace in any search. Our own writers touch the
  version after its tags (`Registry.note`). For what others do, `confirmed` asks for single versions
  anew, and whoever shows versions shows confirmed ones. What can be missed is a version that fulfils
  a condition only since somebody else edited a tag of it by hand: `refresh` reads all anew.

Where MLflow is a SQLite file that has not changed since, nothing is asked, and mlflow is not imported.
"""

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.models.names import NAME
from pipeline.models.version_cache import Row, VersionCache, cache_path, remove
from pipeline.models.versions import Version, is_ours, parse_version, when

if TYPE_CHECKING:
    from pipeline.models.connection import Connection

MARGIN_MILLISECONDS = 600_000
"""Changes this long before the newest known one are read again."""
_FIRST_PAGE, _LARGEST_PAGE = 100, 1000
_READING = 4
"""Pages that are asked for at a time: `mlflow server` has four workers."""
_ASKING = 8
"""Requests at a time that confirm versions."""
_RUNS = 50
"""Whose versions are confirmed by one request."""
_RUN = re.compile(r"[0-9A-Za-z]{1,64}")
"""An MLflow run's id, fit for a search."""
_MANY = 500
"""Of more versions than this, all are read anew instead."""

Answer = TypeVar("Answer")
Aliases = dict[str, dict[str, str]]
"""Of each model: alias -> version."""


class Catalogue:
    """The versions of one MLflow that were registered by this project.

    Every method raises UnreachableError if MLflow cannot be reached or refuses.
    """

    def __init__(self, tracking_uri: str, *, remember: bool = True) -> None:
        """`remember` False leaves the cache folder alone."""
        self._uri = tracking_uri
        self._path = cache_path(tracking_uri) if remember else None
        self._cache = VersionCache(self._path)

    def versions(self, *, refresh: bool = False) -> list[Version]:
        """All versions with their aliases. `refresh` believes nothing that is remembered."""
        return self._despite_damage(lambda: self._versions(refresh))

    def confirmed(self, versions: Sequence[Version]) -> list[Version | None]:
        """These versions as MLflow has them now; None in the place of one that is not there any more."""
        return self._despite_damage(lambda: self._confirmed(versions))

    @cached_property
    def _mlflow(self) -> "Connection":
        from pipeline.models.connection import Connection

        return Connection(self._uri)

    def _despite_damage(self, work: Callable[[], Answer]) -> Answer:
        """The answer, with another cache if the remembered one turns out to be of no use."""
        try:
            return work()
        except sqlite3.OperationalError:
            # Locked for long, a full disk: it is not ours to remove, and not needed.
            self._cache = VersionCache(None)
        except sqlite3.DatabaseError:
            remove(self._path)
            self._cache = VersionCache(self._path)
        return work()

    # -- all of them ----------------------------------------------------------------------

    def _versions(self, refresh: bool) -> list[Version]:
        mark = _mark(self._uri)
        if refresh or not mark or self._cache.state("mark") != mark:
            self._update(mark, refresh)
        aliases: Aliases = json.loads(self._cache.state("aliases"))
        known = (row for row in self._cache.rows() if row.model in aliases and is_ours(row.tags))
        return [_version(row, aliases[row.model]) for row in known]

    def _update(self, mark: str, refresh: bool) -> None:
        """Brings the cache up to date.

        `mark` was taken before, so that what changes meanwhile is seen the next time.
        """
        aliases = self._aliases()
        newest = 0 if refresh else self._cache.newest()
        changed = self._changed_since(newest - MARGIN_MILLISECONDS) if newest else None
        rows = self._all(aliases) if changed is None else changed
        state = {"mark": mark, "aliases": json.dumps(aliases)}
        self._cache.remember(rows, state, all_there_is=changed is None, confirmed=mark)

    def _aliases(self) -> Aliases:
        found = self._mlflow.pages(
            lambda mlflow, token: mlflow.search_registered_models(max_results=1000, page_token=token)
        )
        return {
            model.name: {alias: str(version) for alias, version in model.aliases.items()}
            for model in found
            if NAME.fullmatch(model.name)
        }

    def _changed_since(self, moment: int) -> list[Row] | None:
        """What changed at this moment or later; None if that is more than one page holds."""
        for size in (_FIRST_PAGE, _LARGEST_PAGE):
            page: Any = self._mlflow.ask(
                lambda mlflow, size=size: mlflow.search_model_versions(  # type: ignore[misc]
                    max_results=size, order_by=["last_updated_timestamp DESC"]
                )
            )
            rows = [_row(each) for each in page]
            changed = [row for row in rows if row.updated >= moment]
            if len(changed) < len(rows) or not page.token:
                return changed
        return None

    def _all(self, models: Iterable[str]) -> Iterator[Row]:
        """Everything, in stretches of numbers that are read beside each other: a server has workers."""

        def newest(model: str) -> int:
            found = self._search(f"name = '{model}'", 1, "version_number DESC")
            return found[0].version if found else 0

        def stretch(place: tuple[str, int]) -> list[Row]:
            model, after = place
            between = f"version_number > {after} and version_number <= {after + _LARGEST_PAGE}"
            return self._search(f"name = '{model}' and {between}", _LARGEST_PAGE, "version_number ASC")

        _ = self._mlflow
        # SQLite is read within this process, where threads only get into each other's way.
        with ThreadPoolExecutor(1 if self._uri.startswith("sqlite:") else _READING) as pool:
            tops = dict(zip(models, pool.map(newest, models), strict=True))
            places = [(model, after) for model, top in tops.items() for after in range(0, top, _LARGEST_PAGE)]
            for rows in pool.map(stretch, places):
                yield from rows

    def _search(self, filter_string: str, most: int, order: str) -> list[Row]:
        page: Any = self._mlflow.ask(
            lambda mlflow: mlflow.search_model_versions(filter_string, max_results=most, order_by=[order])
        )
        return [_row(each) for each in page]

    # -- single ones ----------------------------------------------------------------------

    def _confirmed(self, versions: Sequence[Version]) -> list[Version | None]:
        mark = _mark(self._uri)
        known = self._cache.confirmed(mark) if mark else set()
        doubtful = [version for version in versions if _key(version) not in known]
        if not doubtful:
            return list(versions)
        if len(doubtful) > _MANY:
            now = {_key(version): version for version in self._versions(refresh=True)}
        else:
            now = self._asked(doubtful, mark)
        return [version if _key(version) in known else now.get(_key(version)) for version in versions]

    def _asked(self, versions: Sequence[Version], mark: str) -> dict[tuple[str, int], Version]:
        """Those of the versions that are still there, as they are; the others are forgotten."""
        aliases = self._aliases()
        rows = {(row.model, row.version): row for row in self._rows_now(versions)}
        self._cache.forget([key for key in map(_key, versions) if key not in rows])
        there = [rows[key] for key in map(_key, versions) if key in rows and is_ours(rows[key].tags)]
        self._cache.remember(there, {}, confirmed=mark)
        return {(row.model, row.version): _version(row, aliases.get(row.model, {})) for row in there}

    def _rows_now(self, versions: Sequence[Version]) -> list[Row]:
        """These versions, and maybe others, as MLflow has them; without those that are gone.

        Fifty runs' versions are one request, where each of them would be one. A run that has very many, and
        a version without a run, are asked for in the other way.
        """
        with_run = [version for version in versions if _RUN.fullmatch(version.run_id)]
        chunks = [with_run[start : start + _RUNS] for start in range(0, len(with_run), _RUNS)]

        def of_runs(chunk: Sequence[Version]) -> list[Row]:
            runs = ", ".join(f"'{run}'" for run in sorted({version.run_id for version in chunk}))
            page: Any = self._mlflow.ask(
                lambda mlflow: mlflow.search_model_versions(f"run_id IN ({runs})", max_results=_FIRST_PAGE)
            )
            return list(map(_row, page)) if not page.token else one_by_one(chunk)

        def one_by_one(some: Sequence[Version]) -> list[Row]:
            return [_row(answer) for answer in map(ask, some) if answer is not None]

        def ask(version: Version) -> Any:
            return self._mlflow.unless_missing(
                lambda mlflow: mlflow.get_model_version(version.name, version.version)
            )

        _ = self._mlflow
        with ThreadPoolExecutor(_ASKING) as pool:
            alone = [version for version in versions if not _RUN.fullmatch(version.run_id)]
            found = [*pool.map(of_runs, chunks), *pool.map(one_by_one, [[each] for each in alone])]
        return [row for rows in found for row in rows]


def _key(version: Version) -> tuple[str, int]:
    return version.name, int(version.version)


def _row(found: Any) -> Row:
    """Our view of MLflow's ModelVersion."""
    return Row(
        model=found.name,
        version=int(found.version),
        updated=found.last_updated_timestamp or found.creation_timestamp,
        created=found.creation_timestamp,
        run_id=found.run_id or "",
        tags=dict(found.tags),
    )


def _version(row: Row, aliases: dict[str, str]) -> Version:
    return parse_version(
        name=row.model,
        version=str(row.version),
        created=when(row.created),
        run_id=row.run_id,
        tags=row.tags,
        aliases=aliases,
    )


def _mark(tracking_uri: str) -> str:
    """What changes whenever a SQLite file is written; empty for anything but such a file."""
    scheme, _, path = tracking_uri.partition(":///")
    if scheme != "sqlite":
        return ""
    marks = []
    for suffix in ("", "-wal"):
        try:
            with Path(path.partition("?")[0] + suffix).open("rb") as file:
                # The counter of transactions: a clock may stand still between two of them.
                counter = file.read(28)[24:].hex()
                found = os.fstat(file.fileno())
        except OSError:
            continue
        marks.append(f"{suffix}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{counter}")
    return " ".join(marks)
