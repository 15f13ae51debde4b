"""Parquet files of images, as Hugging Face's data sets have them.

The column is a struct with `bytes` (an image file), or the files themselves. A parquet file can
only be read in groups of rows, and a build reads every image twice, the second time in an order of
its own: so the column is unpacked into a scratch file in the folder for temporary files (TMPDIR), as
far as it has been read. It takes as much room as the images' files; memory holds one page of the
column, twice (pyarrow writes pages of 1,024 rows, whatever their size).
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any

from pipeline.data.images import MAX_FILE_BYTES, RejectedImageError
from pipeline.data.index import ShardError
from pipeline.data.sources.published_splits import published_splits
from pipeline.data.sources.source import Source, SourceImage

SUFFIX = ".parquet"
_ROWS_AT_A_TIME = 16
# Without a buffer the column of a whole group of rows is in memory.
_BUFFER_BYTES = 2**20
_USUAL_NAMES = ("image", "img", "jpg", "png", "bytes", "data", "content")


@contextmanager
def parquet(root: Path, paths: list[Path]) -> Iterator[Source]:
    """The images of the files `paths` at or below `root`. Raises ShardError if one is damaged."""
    names = {path.relative_to(root) if path != root else PurePath(path.name): path for path in sorted(paths)}
    splits, remarks = published_splits(str(root), names)
    images: list[SourceImage] = []
    with ExitStack() as files:
        for name, split in splits.items():
            file = files.enter_context(_unpacked(names[name]))
            for row in range(file.rows):
                images.append(
                    SourceImage(f"{name.with_suffix('')}/{row:06d}", partial(file.read, row), split)
                )
        yield Source(images, remarks=tuple(remarks))


class _Unpacked:
    """The images of one file, copied out row by row as they are asked for."""

    def __init__(self, path: Path, rows: int, values: Iterator[bytes | None], scratch: IO[bytes]) -> None:
        self.rows = rows
        self._path = path
        self._values = values
        self._scratch = scratch
        self._places: list[tuple[int, int] | None] = []
        """Offset and length of each row in the scratch file; None for a row without content."""
        self._end = 0
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The content of `row`. Raises RejectedImageError if it has none, ShardError for a damaged file."""
        with self._lock:
            while row >= len(self._places):
                self._unpack()
            place = self._places[row]
        if place is None:
            raise RejectedImageError("has no content")
        if place[1] > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        return os.pread(self._scratch.fileno(), place[1], place[0])

    def _unpack(self) -> None:
        """Copy one more row."""
        try:
            value = next(self._values)
        except StopIteration as error:
            raise ShardError(f"{self._path}: has fewer rows than it says. Fetch it again.") from error
        if value is None or len(value) > MAX_FILE_BYTES:
            self._places.append(None if value is None else (self._end, len(value)))
            return
        try:
            self._scratch.write(value)
            self._scratch.flush()
        except OSError as error:
            raise ShardError(
                f"{tempfile.gettempdir()}: cannot take the images of {self._path} ({error.strerror}). Choose "
                f"a folder with more room: TMPDIR=/folder."
            ) from error
        self._places.append((self._end, len(value)))
        self._end += len(value)


@contextmanager
def _unpacked(path: Path) -> Iterator[_Unpacked]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (OSError, pyarrow.ArrowException) as error:
        raise ShardError(f"{path}: is no whole parquet file ({error}). Fetch it again.") from error
    with file, tempfile.TemporaryFile() as scratch:
        column = _image_column(file.schema_arrow, path)
        yield _Unpacked(path, file.metadata.num_rows, _values(file, column, path), scratch)


def _values(file: Any, column: str, path: Path) -> Iterator[bytes | None]:
    """The content of the column, row after row."""
    import pyarrow

    try:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            values = batch.column(0)
            if pyarrow.types.is_struct(values.type):
                values = values.field("bytes")
            yield from (value.as_py() for value in values)
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        raise ShardError(f"{path}: is damaged ({error}). Fetch it again.") from error


def _image_column(schema: Any, path: Path) -> str:
    """The name of the column with the images, or with a struct that has them in `bytes`."""
    from pyarrow import types

    def holds_files(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: list[tuple[str, str]] = []
    for field in schema:
        if holds_files(field.type):
            found.append((field.name, field.name))
        elif (
            types.is_struct(field.type)
            and field.type.get_field_index("bytes") >= 0
            and holds_files(field.type.field("bytes").type)
        ):
            found.append((field.name, f"{field.name}.bytes"))
    usual = [column for name in _USUAL_NAMES for column in found if column[0] == name]
    if len(found) == 1 or usual:
        return (usual or found)[0][1]
    raise ShardError(
        f"{path}: none of its columns is known to hold images ({', '.join(schema.names[:8])}); "
        f"name one of them `image`."
    )
