"""Procedural portraits as a source: `portraits:COUNT` or `portraits:COUNT@SEED`."""

import re

from pipeline.data.index import ShardError
from pipeline.data.portraits import portrait
from pipeline.data.sources.source import Source, SourceImage

PREFIX = "portraits:"
DEFAULT_SIZE = 256
_SPEC = re.compile(r"portraits:(\d+)(?:@(\d+))?")


def portraits(spec: str, size: int) -> Source:
    """As many portraits of `size` x `size` pixels as `spec` says."""
    match = _SPEC.fullmatch(spec)
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
