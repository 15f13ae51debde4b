"""How long a fresh process takes to its first training batch, on an index of 70,000 images.

    .venv/bin/python tests/benchmarks/first_batch.py [--starts 5] [--places local,s3] [--pixels 256]

The data set is 280 shards of 250 drawn portraits as PNG. All shards have the same content under
other names: hard links on the local disk, so that the page cache holds them; copies on a real S3
server on this machine, of those shards only that the first batches need (the rest would be 7 GB
that nobody reads). Each start is a process of its own, places in turn, with the preset ffhq256 and
batches of 64. Printed are the median and the worst of the times since the process began, imports
included; the project's limit, 5 s, is for the median of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.data.index import Index, Shard

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

SHARDS, SAMPLES = 280, 250
BATCH = 64
BATCHES_AHEAD = 24
"""Whose shards are uploaded: more than are fetched ahead."""
STAGES = ("python", "imports", "index", "batch")
LIMIT_SECONDS = 5.0


# -- the process that is timed ----------------------------------------------------------


def start(root: str) -> None:
    """Print the time at each stage, up to the first batch."""
    times = [time.time()]
    from pipeline import config_file
    from pipeline.data.index import load_index
    from pipeline.data.loader import training_batches

    config = config_file.load("ffhq256", settings(root))
    times.append(time.time())
    index = load_index(root)
    times.append(time.time())
    batches = training_batches(config, index, rank=0, world_size=1, start=0, stop=100 * BATCH)
    batch = next(batches)
    times.append(time.time())
    assert len(batch.keys) == BATCH
    batches.close()
    print(json.dumps(times))


def settings(root: str) -> list[str]:
    """What differs from the preset; the size of the images comes by the environment."""
    pixels = os.environ["FIRST_BATCH_PIXELS"]
    return [f"data.root={root}", f"model.image_size={pixels}", f"train.batch_size={BATCH}"]


def timed_start(root: str) -> list[float]:
    """Seconds from before the process began to the end of each stage."""
    began = time.time()
    command = [sys.executable, __file__, "--start", root]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [at - began for at in json.loads(done.stdout.splitlines()[-1])]


# -- the data set -----------------------------------------------------------------------


@contextmanager
def data_set(places: list[str], pixels: int) -> Iterator[dict[str, str]]:
    """Where the data set lies, by place; all of it is removed at the end."""
    from pipeline.data import shards
    from pipeline.data.index import INDEX_NAME, TRAIN

    with tempfile.TemporaryDirectory(prefix="nvae-first-batch-") as name:
        folder = Path(name)
        built = shards.build(
            f"portraits:{SAMPLES}",
            str(folder / "built"),
            image_size=pixels,
            validation_fraction=0,
            shard_bytes=2**30,
        ).index
        (shard,) = built.shards(TRAIN)
        rows = [replace(shard, name=f"train-{number:06d}.tar") for number in range(SHARDS)]
        index = replace(built, splits={TRAIN: tuple(rows)})
        local = folder / "local"
        local.mkdir()
        (local / INDEX_NAME).write_bytes(index.to_json())
        for row in rows:
            (local / row.name).hardlink_to(folder / "built" / shard.name)
            (local / row.sidecar_name).hardlink_to(folder / "built" / shard.sidecar_name)
        print(f"{index.num_samples(TRAIN):,} images of {pixels}x{pixels}, {shard.bytes / 1e6:.1f} MB a shard")
        found = {"local": str(local)} if "local" in places else {}
        if "s3" not in places:
            yield found
            return
        from tests import s3_server

        with s3_server.serving(folder / "s3") as server:
            os.environ.update(server.client)
            s3_server.make_bucket("first-batch")
            root = "s3://first-batch/images"
            upload(local, root, [rows[number] for number in needed_shards(index)])
            yield found | {"s3": root}


def needed_shards(index: "Index") -> list[int]:
    """The shards of which the first batches hold samples."""
    import numpy as np

    from pipeline import config_file
    from pipeline.data import plan
    from pipeline.data.index import TRAIN

    config = config_file.load("ffhq256", settings("unused"))
    lanes = config.data.lanes or plan.default_lanes(BATCH)
    stream = plan.Stream(
        index.samples_per_shard(TRAIN), lanes=lanes, window=config.data.shuffle_window, seed=config.train.seed
    )
    places = stream.locate(np.arange(BATCHES_AHEAD * BATCH))
    return sorted(set(places.shards.tolist()))


def upload(local: Path, root: str, rows: "list[Shard]") -> None:
    from pipeline import storage
    from pipeline.data.index import INDEX_NAME

    names = [INDEX_NAME, *(name for row in rows for name in (row.name, row.sidecar_name))]
    for name in names:
        storage.write_bytes(storage.join(root, name), (local / name).read_bytes())
    print(f"{len(rows)} shards uploaded")


# -- what is printed --------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--places", default="local,s3")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start)
        return
    os.environ["FIRST_BATCH_PIXELS"] = str(arguments.pixels)
    with data_set(arguments.places.split(","), arguments.pixels) as places:
        times: dict[str, list[list[float]]] = {place: [] for place in places}
        for _ in range(arguments.starts):
            for place, root in places.items():
                times[place].append(timed_start(root))
    sys.exit(0 if shown(times) else 1)


def shown(times: dict[str, list[list[float]]]) -> bool:
    """Print the table; whether the limit was kept."""
    print("seconds since the process began: median (worst)")
    print("place   " + "".join(f"{stage:>16}" for stage in STAGES))
    for place, rows in times.items():
        cells = [f"{statistics.median(column):.2f} ({max(column):.2f})" for column in zip(*rows, strict=True)]
        print(f"{place:<8}" + "".join(f"{cell:>16}" for cell in cells))
    good = all(statistics.median(row[-1] for row in rows) < LIMIT_SECONDS for rows in times.values())
    print(f"limit: {LIMIT_SECONDS:g} s to the batch: {'kept' if good else 'EXCEEDED'}")
    return good


if __name__ == "__main__":
    main()
