"""Where images come from: a folder, a zip, a tar, MNIST's files, or drawn portraits.

A source lists its images without reading them; each is then read on its own, in any order
and any number of times, so that `shards build` can look at all of them before it decides on
splits. A further kind of source is one function here that returns a Source.

A published split comes with MNIST's files, or with a folder, zip or tar whose top level is the
two folders `train/` and `validation/` and nothing else.

Names become keys and never paths: nothing is extracted to disk. Files that turn out to be no
images are reported by the build, not skipped here, so that nobody wonders where they are.
"""

import gzip
import os
import re
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.data.images import MAX_FILE_BYTES, Pixels, RejectedImageError
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.portraits import portrait

PORTRAIT_SIZE = 256
_LONGEST_KEY = 90
_PORTRAITS_PREFIX = "portraits:"
_PORTRAITS = re.compile(r"portraits:(\d+)(?:@(\d+))?")
_IDX_NAME = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
_IDX_SPLITS = {"train": TRAIN, "t10k": VALIDATION}
_IDX_MAGIC = 0x00000803


@dataclass(frozen=True)
class SourceImage:
    """One image that a source offers."""

    name: str
    """Its name in the source, for messages and for the key."""
    read: Callable[[], bytes | Pixels]
    """The content of its file, or its pixels. Raises RejectedImageError if it cannot be had."""
    split: str | None = None
    """The split that the source itself puts it into, if it has any."""
    identity: bytes | None = None
    """Equal for equal images, known without reading; None: to be computed from the content."""

    def digest(self) -> bytes:
        """SHA-256 of the content. Raises RejectedImageError if it cannot be read."""
        if self.identity is not None:
            return sha256(self.identity).digest()
        content = self.read()
        return sha256(content if isinstance(content, bytes) else content.tobytes()).digest()


@dataclass(frozen=True)
class Source:
    """All images of a source, in a fixed order."""

    images: list[SourceImage]
    image_size: int | None = None
    """Its natural size, if it has one."""
    channels: int = 3


def normalize_source(spec: str) -> str:
    """The one spelling of a source: an absolute path, or `portraits:...` as it is.

    Raises StoreError if `spec` can be neither.
    """
    return spec if spec.startswith(_PORTRAITS_PREFIX) else storage.normalize(spec)


@contextmanager
def open_source(spec: str, image_size: int | None) -> Iterator[Source]:
    """The source that `spec` names; it can be read inside the `with` block.

    `spec` is `portraits:COUNT` or `portraits:COUNT@SEED` (drawn at `image_size`), a folder of
    images, a folder of MNIST's idx files, one such file, a .zip or a plain .tar. `train/` and
    `validation/` alone at the top of a folder, zip or tar are the splits of what is below them.
    Raises ShardError if there is no such source or it holds nothing.
    """
    with _opened(spec, image_size) as source:
        if not source.images:
            raise ShardError(f"{storage.shown(spec)}: there is nothing in it.")
        yield _with_split_folders(source)


def _opened(spec: str, image_size: int | None) -> AbstractContextManager[Source]:
    if spec.startswith(_PORTRAITS_PREFIX):
        return nullcontext(_portraits(spec, image_size or PORTRAIT_SIZE))
    if not storage.is_local(storage.normalize(spec)):
        raise ShardError(f"{storage.shown(spec)}: images are read from this machine; copy them here first.")
    path = Path(storage.normalize(spec))
    if not path.exists():
        raise ShardError(f"{path}: there is no such file or folder of images.")
    if path.is_dir():
        idx_files = sorted(file for file in path.iterdir() if _IDX_NAME.fullmatch(file.name))
        return nullcontext(_idx(idx_files) if idx_files else _folder(path))
    if _IDX_NAME.fullmatch(path.name):
        return nullcontext(_idx([path]))
    if path.suffix.lower() == ".zip":
        return _zip(path)
    if path.suffix.lower() == ".tar":
        return _tar(path)
    raise ShardError(
        f"{path}: is no folder, .zip, .tar or MNIST idx file. Compressed tars have to be unpacked first."
    )


def _with_split_folders(source: Source) -> Source:
    """The same images, each in the split that its top folder names, if all are in one of the two."""
    tops = [_top_folder(image.name) for image in source.images]
    if set(tops) != {TRAIN, VALIDATION}:
        return source
    images = [replace(image, split=top) for image, top in zip(source.images, tops, strict=True)]
    return replace(source, images=images)


def _top_folder(name: str) -> str | None:
    # `tar -C images -c .` writes ./ before each name.
    top, slash, _ = name.removeprefix("./").partition("/")
    return top if slash else None


# --- one function for each kind ---------------------------------------------------------------


def _portraits(spec: str, size: int) -> Source:
    match = _PORTRAITS.fullmatch(spec)
    if not match:
        raise ShardError(f"{spec!r}: write portraits:COUNT or portraits:COUNT@SEED.")
    count, first = int(match[1]), int(match[2] or 0) << 32

    def draw(number: int) -> SourceImage:
        return SourceImage(
            name=f"portrait-{number:06d}",
            read=lambda: portrait(first + number, size),
            identity=f"portrait/{size}/{first + number}".encode(),
        )

    return Source([draw(number) for number in range(count)], image_size=size)


def _folder(root: Path) -> Source:
    def image(path: Path) -> SourceImage:
        return SourceImage(path.relative_to(root).as_posix(), lambda: _read_file(path))

    return Source([image(path) for path in sorted(_files_below(root))])


def _files_below(root: Path) -> Iterator[Path]:
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
def _zip(path: Path) -> Iterator[Source]:
    def read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        try:
            return archive.read(entry)
        except (OSError, RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
            raise RejectedImageError(f"cannot be read ({error})") from error

    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ShardError(f"{path}: is not a whole zip file ({error}). Fetch it again.") from error
    with archive:
        entries = sorted((entry for entry in archive.infolist() if not entry.is_dir()), key=_name)
        yield Source([SourceImage(entry.filename, partial(read, archive, entry)) for entry in entries])


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename


@contextmanager
def _tar(path: Path) -> Iterator[Source]:
    def read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        try:
            with lock:
                file = archive.extractfile(member)
                assert file is not None, "only regular members are listed"
                return file.read()
        except (OSError, tarfile.TarError) as error:
            raise RejectedImageError(f"cannot be read ({error})") from error

    # tarfile moves one file position for all its members.
    lock = threading.Lock()
    _refuse_cut_tar(path)
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below, once it is known to be one
        members = sorted((m for m in archive.getmembers() if m.isreg()), key=lambda m: m.name)
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{path}: is not a whole plain tar file ({error}). Fetch it again.") from error
    with archive:
        yield Source([SourceImage(member.name, partial(read, archive, member)) for member in members])


def _refuse_cut_tar(path: Path) -> None:
    """tarfile takes a tar that was cut between two members for a complete one."""
    mark = 2 * tarfile.BLOCKSIZE
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - mark, 0))
        if file.read() != bytes(mark):
            raise ShardError(f"{path}: does not end like a tar file: it was cut short. Fetch it again.")


def _idx(paths: list[Path]) -> Source:
    """MNIST's files: a header of four numbers, then the grey images one after the other."""
    images: list[SourceImage] = []
    size = 0
    for path in paths:
        match = _IDX_NAME.fullmatch(path.name)
        assert match is not None, "the caller chose by this name"
        pixels = _read_idx(path)
        size = pixels.shape[1]
        split = _IDX_SPLITS[match[1]]
        for number, image in enumerate(pixels):
            images.append(SourceImage(f"{match[1]}-{number:05d}", partial(np.copy, image), split))
    return Source(images, image_size=size, channels=1)


def _read_idx(path: Path) -> Pixels:
    """(N, H, W) images of one file."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, height, width = struct.unpack_from(">4I", data)
    except (OSError, EOFError, struct.error) as error:
        raise ShardError(f"{path}: is damaged ({error}). Fetch it again.") from error
    if magic != _IDX_MAGIC or len(data) != 16 + count * height * width or height != width:
        raise ShardError(f"{path}: is not a whole idx file of square grey images. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width)


# --- names to keys ----------------------------------------------------------------------------


def unique_keys(names: list[str]) -> list[str]:
    """A key for each name, all different, which no reader of tars can misunderstand.

    WebDataset takes what precedes the first dot of a file name for the key. Keys keep the
    folders and the name without its extension; where that is not possible or not unique, a
    few digits of the whole name's hash are appended.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        plain = key = _plain_key(name)
        copies = 0
        while key in taken:
            key = _hashed_key(plain, f"{name}#{copies}" if copies else name)
            copies += 1
        taken.add(key)
        keys.append(key)
    return keys


def _plain_key(name: str) -> str:
    folder, _, file = name.replace("\\", "/").rpartition("/")
    stem = file.rpartition(".")[0] or file
    parts = [part for part in [*folder.split("/"), stem] if part not in ("", ".", "..")]
    key = re.sub(r"[^\w/-]", "_", "/".join(parts))
    # WebDataset skips names that begin with two underscores.
    plain = key == "/".join([*filter(None, [folder]), stem]) and not key.startswith("_")
    return key if plain and len(key.encode()) <= _LONGEST_KEY else _hashed_key(key, name)


def _hashed_key(key: str, name: str) -> str:
    short = key.strip("_/").encode()[: _LONGEST_KEY - 20].decode(errors="ignore")
    return f"{short or 'image'}-{sha256(name.encode(errors='replace')).hexdigest()[:12]}"
