"""The data set that data.py reads, on the local disk and in a bucket of a real S3 server."""

import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline import storage
from pipeline.data import images, shards
from pipeline.data.images import StoredImage
from pipeline.data.index import INDEX_NAME, TRAIN, Index, Shard
from pipeline.data.tars import TarBuilder
from tests import s3_server
from tests.benchmarks.data_contenders import contents

FORMATS = ("png", "webp", "raw", "jpg")
"""What `nvae shards build` writes, and JPEG of quality 95."""
BUCKET = "benchmark"


@dataclass(frozen=True)
class Place:
    name: str
    """local or s3."""
    root: str
    server: int | None
    """Process of the S3 server."""


@contextmanager
def places(
    sources: list[str], source_of_images: str, *, size: int, format: str, num_shards: int, copies: int
) -> Iterator[list[Place]]:
    """The same data set in each of `sources`; all of it is removed at the end.

    `source_of_images` is what `nvae shards build` takes: portraits:2048, or a folder. Each image is
    in the data set `copies` times.
    """
    with tempfile.TemporaryDirectory(prefix="nvae-bench-data-") as name:
        folder = Path(name)
        index = build(
            source_of_images, folder, size=size, format=format, num_shards=num_shards, copies=copies
        )
        found = [Place("local", index.root, None)] if "local" in sources else []
        if "s3" not in sources:
            yield found
            return
        with s3_server.serving(folder / "s3") as server:
            os.environ.update(server.client)
            s3_server.make_bucket(BUCKET)
            root = f"s3://{BUCKET}/images"
            for file in Path(index.root).iterdir():
                storage.write_bytes(storage.join(root, file.name), file.read_bytes())
            yield [*found, Place("s3", root, server.process)]


def build(source: str, folder: Path, *, size: int, format: str, num_shards: int, copies: int) -> Index:
    """Images of `source` in `num_shards` shards of equally many images, stored in `format`."""
    built = shards.build(source, str(folder / "built"), image_size=size, validation_fraction=0).index
    _, encoded = contents(built.root)
    with ThreadPoolExecutor() as pool:
        stored = copies * list(pool.map(lambda data: converted(data, size, format), encoded))
    root = folder / "images"
    root.mkdir()
    per_shard = -(-len(stored) // num_shards)
    rows = [
        write_shard(root, number, stored[first : first + per_shard])
        for number, first in enumerate(range(0, len(stored), per_shard))
    ]
    index = dataclasses.replace(built, root=str(root), splits={TRAIN: tuple(rows)})
    (root / INDEX_NAME).write_bytes(index.to_json())
    return index


def converted(data: bytes, size: int, format: str) -> StoredImage:
    if format == "jpg":
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.save(buffer, "JPEG", quality=95)
        return StoredImage(buffer.getvalue(), format)
    return images.prepare(data, size, 3, "none", format)  # type: ignore[arg-type]


def write_shard(root: Path, number: int, stored: list[StoredImage]) -> Shard:
    tar = TarBuilder()
    for place, image in enumerate(stored):
        tar.add(f"{number:03d}-{place:06d}", image.extension, image.data)
    finished = tar.finish(f"{TRAIN}-{number:06d}.tar")
    (root / finished.shard.name).write_bytes(finished.data)
    (root / finished.shard.sidecar_name).write_bytes(finished.sidecar)
    return finished.shard
