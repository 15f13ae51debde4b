"""Records in the store: a dataclass as a JSON file with the version of its format."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from pipeline import storage
from pipeline.errors import InputError

FORMAT_VERSION = 1

Record = TypeVar("Record")


class RecordError(InputError):
    """A record that cannot be read."""


def read(url: str, make: Callable[[dict[str, Any]], Record]) -> Record | None:
    """The record that `make` builds of its fields; None where there is none.

    Raises RecordError if it is damaged or of another release, StoreError.
    """
    try:
        values = json.loads(storage.read_bytes(url))
        if (version := values.pop("format_version")) == FORMAT_VERSION:
            return make(values)
    except storage.MissingError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        folder = url.rpartition("/")[0]
        raise RecordError(f"{url} is damaged ({error}); restore it, or delete {folder}.") from error
    raise RecordError(
        f"{url} has format version {version}; this release reads {FORMAT_VERSION}. "
        "Use the release that wrote it."
    )


def write(url: str, record: Any) -> None:
    """Write a dataclass of plain values. Raises StoreError."""
    values = {"format_version": FORMAT_VERSION, **asdict(record)}
    storage.write_bytes(url, json.dumps(values, indent=2).encode())
