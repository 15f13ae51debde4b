"""What is compared by data.py: our loader, stock WebDataset, and what no loader can surpass.

A contender is a generator of the numbers of images that it has just delivered, endless. All read
the same data set; whoever decodes does so with `pipeline.data.images.decode`, with as many threads
as the others have processes, and ends in batches of (C, H, W) uint8.

Stock WebDataset is set up as its documentation advises, and in its own favour where there is a
choice: tensors are stacked in the worker and travel through shared memory, the shuffle buffer is
filled before it yields, workers are forked, and it begins its shards anew without a pause. It
checks no bytes, and its order can be neither repeated nor resumed. For a bucket it gets the opener
that its users write: fsspec.
"""

import functools
import http.client
import io
import multiprocessing
import os
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from pipeline import config_file, storage
from pipeline.data import images
from pipeline.data.index import TRAIN, Index, load_index
from pipeline.data.loader import training_batches

Delivered = Generator[int, None, None]
SHUFFLE = 128
"""Images that are shuffled together: our default window, and stock WebDataset's buffer."""
CHUNK, PARTS = 256, 32
"""Images after which the bare decoding looks at the clock, and the pieces in which they are shared out."""


@dataclass(frozen=True)
class Task:
    """What each contender has to do."""

    root: str
    """The data set; all of its images are for training."""
    batch_size: int
    threads: int
    """Threads, or processes, that decode."""
    connections: int
    """Transfers at a time."""
    server: int | None
    """Process of the S3 server, if one is read."""


@dataclass(frozen=True)
class Measurement:
    """One contender, in steady state, over every image of the data set once."""

    images_per_second: float
    cpu: float
    """Processor seconds per image, of the contender and its processes."""
    server_cpu: float
    """The same of the S3 server; 0 if none is read."""


def measure(name: str, task: Task) -> Measurement:
    """Let a contender start, and then deliver as many images as the data set has, by the clock.

    Whatever a loader fetches ahead, it then fetches each image once by the clock. Half an epoch
    comes before, so that nothing is under way any more that only the start needed.
    """
    total = load_index(task.root).num_samples(TRAIN)
    with closing(CONTENDERS[name](task)) as stream:
        take(stream, total // 2)
        own, server = cpu_seconds(os.getpid()), cpu_seconds(task.server)
        started = time.perf_counter()
        taken = take(stream, total)
        seconds = time.perf_counter() - started
        own, server = cpu_seconds(os.getpid()) - own, cpu_seconds(task.server) - server
    return Measurement(taken / seconds, own / taken, server / taken)


def take(stream: Iterator[int], least: int) -> int:
    """Take at least that many images; returns how many it were."""
    taken = 0
    while taken < least:
        taken += next(stream)
    return taken


def cpu_seconds(root: int | None) -> float:
    """Processor time of a living process and of the processes below it; 0 for none. Linux only."""
    if root is None:
        return 0.0
    ticks, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended.
        process = int(file.parent.name)
        parents[process], ticks[process] = int(fields[1]), int(fields[11]) + int(fields[12])

    def below(process: int) -> bool:
        while process not in (0, root):
            process = parents.get(process, 0)
        return process == root

    return sum(spent for process, spent in ticks.items() if below(process)) / os.sysconf("SC_CLK_TCK")


# --- ours -------------------------------------------------------------------------------------


def ours(task: Task) -> Delivered:
    index = load_index(task.root)
    overrides = [
        f"data.root={task.root}",
        f"data.decode_threads={task.threads}",
        f"train.batch_size={task.batch_size}",
        f"model.image_size={index.image_size}",
    ]
    config = config_file.load("ffhq256", overrides)
    batches = training_batches(config, index, rank=0, world_size=1, start=0, stop=2**40)
    with closing(batches):
        for batch in batches:
            yield len(batch.images)


# --- stock WebDataset -------------------------------------------------------------------------


def open_by_fsspec(url: str, mode: str = "rb", bufsize: int = 0, **options: Any) -> BinaryIO:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    opened: BinaryIO = system.open(path, mode)
    return opened


def stock(task: Task, workers: int) -> Delivered:
    import webdataset
    from webdataset.gopen import gopen_schemes

    index = load_index(task.root)

    def decode(sample: tuple[bytes]) -> images.Pixels:
        return images.decode(sample[0], index.image_size, index.channels).transpose(2, 0, 1)

    def stack(samples: list[images.Pixels]) -> Tensor:
        return torch.from_numpy(np.stack(samples))

    gopen_schemes["s3"] = open_by_fsspec
    urls = [storage.join(index.root, shard.name) for shard in index.shards(TRAIN)]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .repeat()
        .shuffle(SHUFFLE, initial=SHUFFLE)
        .to_tuple("png;webp;jpg;ppm")
        .map(decode)
        .batched(task.batch_size, collation_fn=stack)
    )
    context = "fork" if workers else None
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for batch in loader:
        yield len(batch)


# --- bounds -----------------------------------------------------------------------------------


@functools.cache
def contents(root: str) -> tuple[Index, list[bytes]]:
    """Every image of the data set, in memory."""
    index = load_index(root)
    found = []
    for shard in index.shards(TRAIN):
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(storage.join(root, shard.name)))) as tar:
            files = [tar.extractfile(member) for member in tar]
            found += [file.read() for file in files if file]
    return index, found


def decoded_by_threads(task: Task) -> Delivered:
    """Nothing but decoding into a batch, by threads, from memory."""
    index, encoded = contents(task.root)
    batch = torch.zeros(batch_shape(task, index), dtype=torch.uint8).numpy()

    def decode(part: list[bytes]) -> None:
        for number, data in enumerate(part):
            pixels = images.decode(data, index.image_size, index.channels)
            batch[number % len(batch)] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(task.threads) as pool:
        for chunk in chunks(encoded):
            list(pool.map(decode, [chunk[first::PARTS] for first in range(PARTS)]))
            yield len(chunk)


def decoded_by_processes(task: Task) -> Delivered:
    """The same by processes, which write into a batch in shared memory."""
    index, encoded = contents(task.root)
    batch = torch.zeros(batch_shape(task, index), dtype=torch.uint8).share_memory_()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(task.threads, context, share_batch, (batch,)) as pool:
        for chunk in chunks(encoded):
            yield sum(pool.map(decode_part, [chunk[first::PARTS] for first in range(PARTS)]))


shared_batch: images.Pixels


def share_batch(batch: Tensor) -> None:
    global shared_batch
    shared_batch = batch.numpy()


def decode_part(part: list[bytes]) -> int:
    channels, size = shared_batch.shape[1:3]
    for number, data in enumerate(part):
        shared_batch[number % len(shared_batch)] = images.decode(data, size, channels).transpose(2, 0, 1)
    return len(part)


def batch_shape(task: Task, index: Index) -> tuple[int, int, int, int]:
    return task.batch_size, index.channels, index.image_size, index.image_size


def chunks(encoded: list[bytes]) -> Iterator[list[bytes]]:
    """All images over and over, CHUNK at a time."""
    while True:
        for first in range(0, len(encoded), CHUNK):
            yield encoded[first : first + CHUNK]


def transferred(task: Task) -> Delivered:
    """Nothing but reading whole shards, into memory that is used again and again."""
    index = load_index(task.root)
    shards = index.shards(TRAIN)
    read = read_file if storage.is_local(task.root) else bucket_reader()
    with ThreadPoolExecutor(task.connections) as pool:
        while True:
            places = [storage.join(task.root, shard.name) for shard in shards]
            sizes = list(pool.map(read, places, [shard.bytes for shard in shards]))
            assert sizes == [shard.bytes for shard in shards]
            yield index.num_samples(TRAIN)


class Kept(threading.local):
    """What a thread that transfers uses again and again."""

    buffer = memoryview(b"")
    connection: http.client.HTTPConnection | None = None


kept = Kept()


def kept_buffer(size: int) -> memoryview:
    if len(kept.buffer) < size:
        kept.buffer = memoryview(bytearray(size))
    return kept.buffer[:size]


def read_file(place: str, size: int) -> int:
    with Path(place).open("rb", buffering=0) as file:
        return file.readinto(kept_buffer(size)) or 0


def bucket_reader() -> Callable[[str, int], int]:
    """Reads an object by a plain GET, with a signed URL and a connection that stays open."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(signature_version="s3v4"))

    def read(place: str, size: int) -> int:
        bucket, _, key = place.removeprefix("s3://").partition("/")
        url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}))
        if kept.connection is None:
            kept.connection = http.client.HTTPConnection(url.netloc)
        kept.connection.request("GET", f"{url.path}?{url.query}")
        with kept.connection.getresponse() as response:
            buffer, filled = kept_buffer(size), 0
            while count := response.readinto(buffer[filled:]):
                filled += count
            return filled

    return read


OURS, STOCK = "ours", ("stock WebDataset, worker processes", "stock WebDataset, in process")
DECODE, PROCESSES, TRANSFER = "bare decode, threads", "bare decode, processes", "bare transfer"
CONTENDERS: dict[str, Callable[[Task], Delivered]] = {
    OURS: ours,
    STOCK[0]: lambda task: stock(task, task.threads),
    STOCK[1]: lambda task: stock(task, 0),
    DECODE: decoded_by_threads,
    PROCESSES: decoded_by_processes,
    TRANSFER: transferred,
}
