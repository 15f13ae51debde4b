"""What this machine remembers of a registry's versions: a SQLite file in the user's cache folder.

~/.cache/nvae/registry/HASH.db     (or below XDG_CACHE_HOME); HASH is of MLflow's address

It holds tags as MLflow gave them, so a later release that reads more from them needs no new copy. The
folder is the user's alone (0700): tags name buckets and runs. A file that is damaged, or of
another layout, is thrown away; where nothing can be written, nothing is remembered. Several processes may
use it at once: each writes what it learned in one transaction, and an older answer never replaces
a newer one.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    model TEXT, version INTEGER, updated INTEGER, created INTEGER, run_id TEXT, tags TEXT,
    confirmed TEXT, PRIMARY KEY (model, version));
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT);
"""
_WAIT_SECONDS = 5.0
_BETWEEN = "\0"
"""Between names and values of the tags of a row. JSON would take half of the time of a listing."""


@dataclass(frozen=True)
class Row:
    """One version as MLflow has it."""

    model: str
    version: int
    updated: int
    """When, in milliseconds of MLflow's clock."""
    created: int
    run_id: str
    tags: Mapping[str, str]


class VersionCache:
    """The remembered versions of one MLflow."""

    def __init__(self, path: Path | None) -> None:
        """`path` None remembers nothing beyond this object."""
        self._connection = _opened(path)

    def rows(self) -> Iterator[Row]:
        """All remembered versions."""
        found = self._connection.execute(
            "SELECT model, version, updated, created, run_id, tags FROM versions"
        )
        for model, version, updated, created, run_id, tags in found:
            parts = tags.split(_BETWEEN) if tags else []
            if len(parts) % 2:
                raise sqlite3.DatabaseError("a row is damaged")
            pairs = zip(parts[::2], parts[1::2], strict=True)
            yield Row(model, version, updated, created, run_id, dict(pairs))

    def newest(self) -> int:
        """The latest moment at which a remembered version changed; 0 without one."""
        (newest,) = self._connection.execute("SELECT max(updated) FROM versions").fetchone()
        return newest or 0

    def state(self, key: str) -> str:
        """A remembered text; empty if there is none."""
        found = self._connection.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return found[0] if found else ""

    def remember(
        self,
        rows: Iterable[Row],
        state: Mapping[str, str],
        *,
        all_there_is: bool = False,
        confirmed: str = "",
    ) -> None:
        """Adds or replaces versions and texts; `all_there_is` forgets every other version.

        `confirmed` is MLflow's mark from before they were read.
        """
        with self._connection as connection:
            if all_there_is:
                connection.execute("DELETE FROM versions")
            connection.executemany(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "updated = excluded.updated, created = excluded.created, run_id = excluded.run_id, "
                "tags = excluded.tags, confirmed = excluded.confirmed "
                "WHERE excluded.updated >= versions.updated",
                (
                    (
                        row.model,
                        row.version,
                        row.updated,
                        row.created,
                        row.run_id,
                        _joined(row.tags),
                        confirmed,
                    )
                    for row in rows
                ),
            )
            connection.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", state.items())

    def forget(self, keys: Iterable[tuple[str, int]]) -> None:
        """Forgets versions that are no longer there."""
        with self._connection as connection:
            connection.executemany("DELETE FROM versions WHERE model = ? AND version = ?", keys)

    def confirmed(self, mark: str) -> set[tuple[str, int]]:
        """The versions that were found to be as remembered when MLflow had this mark."""
        found = self._connection.execute("SELECT model, version FROM versions WHERE confirmed = ?", (mark,))
        return set(found)


def _joined(tags: Mapping[str, str]) -> str:
    return _BETWEEN.join(part.replace(_BETWEEN, "\ufffd") for pair in tags.items() for part in pair)


def cache_path(tracking_uri: str) -> Path:
    """Where the versions of this MLflow are remembered."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nvae" / "registry" / f"{hashlib.sha256(tracking_uri.encode()).hexdigest()[:24]}.db"


def _opened(path: Path | None) -> sqlite3.Connection:
    """The file, or a new one in its place if it is damaged; one in memory if there can be none."""
    for place in [path, path, None]:
        try:
            return _with_tables(place)
        except (sqlite3.OperationalError, OSError):
            # Locked for long, or not to be written: it is not ours to remove.
            path = None
        except sqlite3.DatabaseError:
            remove(place)
    return _with_tables(None)


def remove(path: Path | None) -> None:
    """Throws a damaged file away; whoever has it open keeps what he has."""
    for suffix in ("", "-journal", "-wal"):
        if path is not None:
            with suppress(OSError):
                path.with_name(path.name + suffix).unlink(missing_ok=True)


def _with_tables(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
    connection = sqlite3.connect(":memory:" if path is None else path, timeout=_WAIT_SECONDS)
    try:
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        if layout not in (0, _LAYOUT):
            raise sqlite3.DatabaseError("another layout")
        if layout == 0:
            connection.executescript(f"{_TABLES} PRAGMA user_version = {_LAYOUT};")
    except BaseException:
        connection.close()
        raise
    return connection
