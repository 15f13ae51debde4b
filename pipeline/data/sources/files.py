"""A folder, a zip or a tar of image files.

All files are listed. A file is meant to be an image if its name ends like an image's or its
content begins like one; hidden files (.DS_Store, ._photo.jpg, __MACOSX/) never are. Others are
passed over: captions and notes are no damage.
"""

import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.data.images import MAX_FILE_BYTES, RejectedImageError
from pipeline.data.index import ShardError
from pipeline.data.sources.source import Source, SourceImage

# Formats that images.py does not read are among them: such a file was meant to be an image.
_NAME = re.compile(
    r".*\.(png|jpe?g|jpe|jfif|webp|bmp|dib|tiff?|gif|p[bgnp]m|heic|heif|avif|jp2|jxl|tga|exr|raw|dng)", re.I
)
_CONTENT = re.compile(
    rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|GIF8|P[1-6]\s|....ftyp(hei|avi|mif)",
    re.DOTALL,
)


def is_hidden(name: str) -> bool:
    """Whether a part of `name` begins with a dot, or is where macOS keeps its notes."""
    parts = name.replace("\\", "/").split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part != ".." for part in parts)


def is_named_like_an_image(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not is_hidden(name)


def begins_like_an_image(content: bytes) -> bool:
    return _CONTENT.match(content) is not None


def folder(root: Path, files: list[Path]) -> Source:
    """`files`, which are below `root`, by their paths relative to it."""

    def image(path: Path) -> SourceImage:
        return SourceImage(path.relative_to(root).as_posix(), lambda: _read_file(path))

    return Source([image(path) for path in sorted(files)], holds_any_files=True)


def files_below(root: Path) -> Iterator[Path]:
    """Every file below `root`, through links to folders too, but through each folder once."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        yield from (Path(folder, name) for name in files)


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise RejectedImageError("is not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise RejectedImageError(f"cannot be read ({error.strerror})") from error


@contextmanager
def zip_file(path: Path) -> Iterator[Source]:
    """The files of a zip. Raises ShardError if it is none."""

    def read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        try:
            return archive.read(entry)
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RejectedImageError(f"cannot be read ({error})") from error

    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ShardError(f"{path}: is not a whole zip file ({error}). Fetch it again.") from error
    with archive:
        entries = sorted((entry for entry in archive.infolist() if not entry.is_dir()), key=_name)
        images = [SourceImage(entry.filename, partial(read, archive, entry)) for entry in entries]
        yield Source(images, holds_any_files=True)


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename


@contextmanager
def tar_file(path: Path) -> Iterator[Source]:
    """The regular files of a plain tar; links and devices are no files. Raises ShardError if it is cut."""

    def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        try:
            with lock:
                file = archive.extractfile(member)
                assert file is not None, "only regular members are listed"
                return file.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise RejectedImageError(f"cannot be read ({error})") from error

    # tarfile moves one file position for all its members.
    lock = threading.Lock()
    _refuse_cut_tar(path)
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, once it is known to be one
        members = sorted((m for m in archive.getmembers() if m.isreg()), key=lambda m: m.name)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise ShardError(f"{path}: is not a whole plain tar file ({error}). Fetch it again.") from error
    with archive:
        # `tar -C images -c .` writes ./ before each name.
        images = [
            SourceImage(member.name.removeprefix("./"), partial(read, archive, member)) for member in members
        ]
        yield Source(images, holds_any_files=True)


def _refuse_cut_tar(path: Path) -> None:
    """tarfile takes a tar that was cut between two members for a complete one."""
    mark = 2 * tarfile.BLOCKSIZE
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - mark, 0))
        if file.read() != bytes(mark):
            raise ShardError(f"{path}: does not end like a tar file: it was cut short. Fetch it again.")
