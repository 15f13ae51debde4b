"""The samples of one tar that somebody else wrote, found in one pass.

Which members belong together is WebDataset's rule: consecutive files whose names are equal up to
the first dot. Of each sample only its image becomes part of the data set: its span is that one
member, headers and padding included, and labels or captions beside it are gaps that nobody
fetches. So it does not matter either whether they lie next to the image.

Every image is decoded once: what is indexed can be read by a training. What cannot be used is
left out, with a reason. Memory: for each sample of the tar about 300 bytes, besides one image.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.data.images import NO_IMAGE, RejectedImageError, decode
from pipeline.data.index import printable
from pipeline.data.members import FILE, FOLDER, Member, Tape, members
from pipeline.data.rejections import Rejection
from pipeline.data.sidecar import MAX_KEY_BYTES, MAX_SAMPLE_BYTES
from pipeline.data.tars import image_rank, key_and_extension

DIGEST_BYTES = 16
MOST_LISTED = 1000
"""Samples of one tar that are left out and listed; further ones are only counted."""
MOST_SAMPLES = 2**22
_LONGEST_SHOWN = 300
_FORMATS = ("PNG", "JPEG", "WEBP", "PPM")


@dataclass(frozen=True)
class ImageFormat:
    """What an image's header says."""

    width: int
    height: int
    mode: str

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.mode}"


@dataclass
class Scan:
    """What was found in a tar."""

    rows: list[tuple[int, int, int, str]] = field(default_factory=list)
    """(offset, size, checksum, key) of each sample."""
    digests: bytearray = field(default_factory=bytearray)
    """`DIGEST_BYTES` of the SHA-256 of each sample's image file, one after the other."""
    rejected: list[Rejection] = field(default_factory=list)
    """The first `MOST_LISTED` of what was left out."""
    left_out: int = 0
    unusable: int = 0
    """Samples that were left out and not by a rule."""
    formats: Counter[str] = field(default_factory=Counter)
    """How many images have which format, those that do not fit among them."""

    def reject(self, name: str, reason: str, by_rule: bool = False) -> None:
        self.left_out += 1
        self.unusable += not by_rule
        if len(self.rejected) < MOST_LISTED:
            self.rejected.append(Rejection(_shortly(name), _shortly(reason), by_rule))


@dataclass
class _Found:
    """The image of a sample."""

    rank: int
    offset: int
    size: int
    checksum: int
    data: bytes | None
    """None if it is too large to be held."""


@dataclass
class _Group:
    """Consecutive files with one key; at most one of its images is held."""

    key: str
    images: list[int] = field(default_factory=lambda: [0, 0])
    """How many there are of each rank."""
    found: _Found | None = None

    def add(self, member: Member, rank: int, tape: Tape) -> None:
        self.images[rank] += 1
        if self.found is not None and self.found.rank <= rank:
            return
        fits = member.end - member.start <= MAX_SAMPLE_BYTES
        data = tape.take(member.end - tape.position)[: member.data_bytes] if fits else None
        self.found = _Found(rank, member.start, member.end - member.start, tape.checksum, data)


class Scanner:
    """Reads a tar's samples into a Scan."""

    def __init__(self, image_size: int, channels: int, held_out: Container[bytes]) -> None:
        """`held_out` are the digests of images that another split has."""
        self._size, self._channels, self._held_out = image_size, channels, held_out
        self._keys: set[str] = set()
        self._without_image: set[str] = set()
        self.result = Scan()

    def run(self, tape: Tape) -> Scan:
        """Raises TarError if it is not a whole plain tar, ValueError if there are too many samples."""
        for group in _groups(tape, self.result):
            self._finish(group)
            if len(self._keys) + len(self._without_image) > MOST_SAMPLES:
                raise ValueError(f"has more than {MOST_SAMPLES:,} samples; make smaller tars of it")
        for key in sorted(self._without_image - self._keys):
            self.result.reject(key, "has no image")
        return self.result

    def _finish(self, group: _Group) -> None:
        found, result = group.found, self.result
        if found is None:
            # Its image may lie elsewhere in the tar.
            self._without_image.add(group.key)
        elif group.images[found.rank] > 1:
            result.reject(group.key, f"has {group.images[found.rank]} images, not one")
        elif found.data is None:
            result.reject(group.key, f"is an image file of more than {MAX_SAMPLE_BYTES >> 20} MiB")
        elif not _is_plain(group.key):
            result.reject(
                group.key, "has a name that is too long, no UTF-8, leads out of a folder or cannot be shown"
            )
        elif group.key in self._keys:
            result.reject(group.key, "has the name of another sample of this tar")
        else:
            self._add(group.key, found, found.data)

    def _add(self, key: str, found: _Found, data: bytes) -> None:
        digest = hashlib.sha256(data).digest()[:DIGEST_BYTES]
        try:
            found_format, upright = look(data)
            self.result.formats[str(found_format)] += 1
            if not upright:
                raise RejectedImageError("would have to be turned, as its camera noted")
            decode(data, self._size, self._channels)
        except RejectedImageError as error:
            self.result.reject(key, str(error))
            return
        except Exception as error:
            # What damage makes Pillow's decoders raise is not limited to its own exceptions.
            self.result.reject(key, f"cannot be decoded ({type(error).__name__}: {error})")
            return
        self._keys.add(key)
        if digest in self._held_out:
            self.result.reject(key, "is in the validation split, too", by_rule=True)
            return
        self.result.rows.append((found.offset, found.size, found.checksum, key))
        self.result.digests += digest


def first_formats(tape: Tape, most: int) -> Counter[ImageFormat]:
    """How many of the first `most` images of a tar have which format."""
    counts: Counter[ImageFormat] = Counter()
    for group in _groups(tape, Scan()):
        if group.found is not None and group.found.data is not None:
            try:
                counts[look(group.found.data)[0]] += 1
            except Exception:
                # No format is what is to be found out here; `Scanner` says what is wrong with it.
                continue
        if counts.total() >= most:
            break
    return counts


def look(data: bytes) -> tuple[ImageFormat, bool]:
    """The format of an image file, and whether it is to be shown as it is stored.

    Raises RejectedImageError if it is none, and what Pillow raises if its header is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        # Its message names an address in memory, another one each time.
        raise RejectedImageError(NO_IMAGE) from error
    with image:
        # A PNG's orientation would be known only after its pixels, and cameras write none.
        turned = image.format in ("JPEG", "WEBP") and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageFormat(image.width, image.height, image.mode), not turned


def _groups(tape: Tape, result: Scan) -> Iterator[_Group]:
    """The samples of a tar; what is named like an image and is no file is rejected in `result`."""
    group: _Group | None = None
    for member in members(tape, whole=True):
        parts = key_and_extension(member.name)
        if parts is None or member.kind == FOLDER:
            continue
        key, rank = parts[0], image_rank(parts[1])
        if member.kind != FILE:
            if rank < 2:
                result.reject(member.name, f"is {member.kind}, not a file")
            continue
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key)
        if rank < 2:
            group.add(member, rank, tape)
    if group is not None:
        yield group


def _shortly(text: str) -> str:
    return printable(text[:_LONGEST_SHOWN])


def _is_plain(key: str) -> bool:
    """Whether the key can be stored and shown, and would do no harm if somebody made a path of it."""
    leads_out = key.startswith("/") or ".." in key.split("/")
    return key.isprintable() and not leads_out and len(key.encode("utf-8", "replace")) <= MAX_KEY_BYTES
