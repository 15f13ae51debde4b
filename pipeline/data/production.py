"""The threads behind the batches: planning, fetching and decoding ahead of the caller.

One thread asks the plan where samples are and requests them, far enough ahead that a store
with a tenth of a second of latency is not waited for. As samples arrive, the decoding threads
take them, parse their tar headers and decode them right into the batch; none of them waits for
a transfer. The caller only takes finished batches: between two updates of a model on a GPU,
each millisecond that he spends is lost. One set of threads per rank is enough, because
checksums, decoders and copies of pixels run outside the interpreter lock; loader processes would
have to carry a store's client through a fork.

Memory besides the reader's: `prefetch_batches` + 1 batches of pixels.
"""

import math
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data import pieces
from pipeline.data.corruption import CorruptSampleError
from pipeline.data.images import Pixels, RejectedImageError
from pipeline.data.index import Index
from pipeline.data.plan import Places
from pipeline.data.randomness import Integers
from pipeline.data.reader import PendingSample, Reader
from pipeline.data.recipe import Recipe

# b images of this rank in one batch; C colours; H = W the model's image size.

AHEAD_BYTES = 64 * 2**20
"""Samples that are requested before it is their batch's turn to be decoded, ..."""
MOST_AHEAD = 1024
"""... and how many they are at most: with tiny images planning is what costs."""


@dataclass(frozen=True)
class Task:
    """What is to become a batch."""

    positions: Integers
    places: Places
    weight: float
    global_size: int


class MadeBatch:
    """A batch in the making; the decoding threads write their images into it."""

    def __init__(self, task: Task, images: Tensor) -> None:
        self.task = task
        self.images = images
        """(b, C, H, W) uint8; anything where a sample was lost."""
        self.keys = [""] * len(images)
        self.lost: dict[int, CorruptSampleError] = {}
        """What could not be had, by row."""
        self._error: Exception | None = None
        self._undecided = len(images)
        self._lock, self._is_over = Lock(), Event()

    def decide(self, row: int, result: str | Exception) -> None:
        """The image of this row is written and has this key, or cannot be had."""
        with self._lock:
            if isinstance(result, str):
                self.keys[row] = result
            elif isinstance(result, CorruptSampleError):
                self.keys[row], self.lost[row] = result.key, result
            else:
                self._error = self._error or result
            self._undecided -= 1
            # The caller is woken once; what ends the run does not wait for what still comes.
            if self._error is not None or not self._undecided:
                self._is_over.set()

    def wait(self) -> None:
        """Until every image is there, or lost. Raises what concerns more than single samples."""
        self._is_over.wait()
        if self._error is not None:
            raise self._error


@dataclass(frozen=True, slots=True)
class _Job:
    """An image to be decoded, whose bytes are there."""

    batch: MadeBatch
    row: int
    sample: PendingSample
    out: Pixels


class _BatchMemory:
    """Memory of batches that nobody has any more, for new ones: fresh pages cost more than filling them.

    Pinned memory is torch's to keep, which does the same.
    """

    def __init__(self) -> None:
        self._free: list[Pixels] = []

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """An uint8 tensor of anything."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        memory: Pixels = self._free.pop() if self._free else np.empty(size, np.uint8)
        if len(memory) < size:
            memory = np.empty(size, np.uint8)
        view = memory[:size].reshape(shape)
        # A tensor's storage and whatever shares it keep the view alive, and nothing else does.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)


class Production:
    """Makes the batches of `tasks`, in order; `begin` is for one thread, close it at the end."""

    def __init__(
        self,
        config: DataConfig,
        index: Index,
        split: str,
        reader: Reader,
        tasks: Iterable[Task],
        recipe: Recipe,
    ) -> None:
        self._index, self._reader, self._recipe = index, reader, recipe
        self._tasks = iter(tasks)
        self._requested: deque[tuple[Task, list[PendingSample]]] = deque()
        self._ahead = _samples_ahead(index, split)
        self._memory = _BatchMemory()
        self._planner = ThreadPoolExecutor(1, "plan")
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._is_closed = Event()
        decoders = [
            Thread(target=self._decode_jobs, name=f"decode_{number}", daemon=True)
            for number in range(config.decode_threads)
        ]
        for decoder in decoders:
            decoder.start()
        # At the latest when the interpreter ends: it must not take itself away from under a decoder.
        self._end_decoders = weakref.finalize(self, _end, self._is_closed, self._jobs, decoders)

    def begin(self) -> Future[MadeBatch | None]:
        """Begin to decode the next batch; None after the last one."""
        return self._planner.submit(self._begin)

    def close(self) -> None:
        """End the threads, and wait until they have: for one image each, never for a transfer."""
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._end_decoders()

    def _begin(self) -> MadeBatch | None:
        if not self._requested:
            self._request()
        begun = self._decode(*self._requested.popleft()) if self._requested else None
        # Two at most, so that the very first batches do not wait until all of this is planned.
        for _ in range(2):
            if sum(len(samples) for _, samples in self._requested) < self._ahead:
                self._request()
        return begun

    def _request(self) -> None:
        for task in self._tasks:
            self._requested.append((task, self._reader.request(task.places)))
            return

    def _decode(self, task: Task, samples: list[PendingSample]) -> MadeBatch:
        size = self._recipe.size
        images = self._memory.tensor((len(samples), self._recipe.channels, size, size))
        if self._recipe.border:
            images.zero_()
        made = MadeBatch(task, images)
        pixels: Pixels = images.numpy()
        for row, sample in enumerate(samples):
            sample.when_decided(partial(self._jobs.put, _Job(made, row, sample, pixels[row])))
        return made

    def _decode_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._is_closed.is_set():
                try:
                    job.batch.decide(job.row, self._decoded(job))
                except Exception as error:
                    job.batch.decide(job.row, error)

    def _decoded(self, job: _Job) -> str:
        """Write the image of `job`; returns its key. Raises CorruptSampleError and what is worse."""
        span = job.sample.take()
        try:
            image = pieces.image_in(span.data, span.key, span.shard)
        except Exception as error:
            # webdataset and tarfile report a broken tar by many unrelated exceptions.
            what = f"it cannot be read as a tar ({type(error).__name__}: {error})"
            raise span.corrupt(self._index, f"{what}, though its checksum is right") from error
        try:
            self._recipe.write(image, int(job.batch.task.positions[job.row]), job.out)
        except RejectedImageError as error:
            what = f"it {error}, though its checksum is right: it was stored like this"
            raise span.corrupt(self._index, what) from error
        return span.key


def _end(is_closed: Event, jobs: SimpleQueue[_Job | None], decoders: list[Thread]) -> None:
    is_closed.set()
    for _ in decoders:
        jobs.put(None)
    for decoder in decoders:
        decoder.join()


def _samples_ahead(index: Index, split: str) -> int:
    shards = index.shards(split)
    mean_bytes = sum(shard.bytes for shard in shards) / max(index.num_samples(split), 1)
    return min(int(AHEAD_BYTES / max(mean_bytes, 1)), MOST_AHEAD)
