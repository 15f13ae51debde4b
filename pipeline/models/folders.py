"""A folder for what is exported: new, and there as a whole or not at all.

On a disk it is made beside its place and renamed. A bucket renames nothing: there the manifest, which is
written last, makes a folder count, and a folder with anything in it is refused.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import storage
from pipeline.errors import InputError


class TakenError(InputError):
    """A folder that cannot be written to."""


@contextmanager
def new_folder(url: str) -> Iterator[str]:
    """Where to write what shall be in `url` at the end. Raises TakenError if that is not new or empty.

    What was written on a disk is gone again if an exception is raised.
    """
    check_free(url)
    place = storage.normalize(url)
    if not storage.is_local(place):
        yield place
        return
    folder = Path(place)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            written = Path(scratch) / folder.name
            yield str(written)
            written.replace(folder)
    except OSError as error:
        raise TakenError(
            f"{folder}: cannot be written ({error.strerror or error}). Name another place."
        ) from error


def check_free(url: str) -> None:
    """Raises TakenError if `url` is no folder that is new or empty."""
    place = storage.normalize(url)
    if _is_taken(Path(place)) if storage.is_local(place) else storage.exists(place):
        raise TakenError(f"{storage.shown(url)}: is there already. Name a folder that is new or empty.")


def _is_taken(folder: Path) -> bool:
    try:
        return folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise TakenError(f"{folder}: cannot be used ({error.strerror}). Name another place.") from error
