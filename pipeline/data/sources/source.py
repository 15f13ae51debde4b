"""What every kind of source comes down to."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from pipeline.data.images import Pixels


@dataclass(frozen=True, slots=True)
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


def digest(content: bytes | Pixels) -> bytes:
    """SHA-256 of what an image consists of."""
    return sha256(content if isinstance(content, bytes) else content.tobytes()).digest()


@dataclass(frozen=True)
class Source:
    """All images of a source, in a fixed order."""

    images: list[SourceImage]
    image_size: int | None = None
    """Its natural size, if it has one."""
    channels: int = 3
    holds_any_files: bool = False
    """Its images are whatever files somebody put there: some may be none, and their folders may
    name splits (splits.py)."""
    remarks: tuple[str, ...] = ()
    """What of the source is not read, for people."""
