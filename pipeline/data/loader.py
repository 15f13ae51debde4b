"""From verified samples to batches of uint8, on one rank.

Batches are made ahead: the samples of the next few are fetched and decoded by threads while
the caller computes. One pool of threads per rank is enough, because Pillow decodes outside the
interpreter lock; loader processes would have to carry a store's client through a fork.
The order is the plan's whatever the threads do, and closing the iterator ends them.

Everything random here is a pure function of (seed, position): which images are mirrored, and
which pixels of a grey image are set when the likelihood is over binary images. Validation
images are binarized the same way in every run, so that runs can be compared.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvae.config import NVAEConfig
from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data import plan
from pipeline.data.images import Pixels, RejectedImageError, decode
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError
from pipeline.data.plan import Places
from pipeline.data.plan import default_lanes as default_lanes
from pipeline.data.randomness import Integers, words, words_at
from pipeline.data.reader import PendingSample, Reader

# b images of this rank in one batch; C colours; H = W the model's image size.


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch."""

    images: Tensor
    """(b, C, H, W) uint8, in pinned memory if there is a GPU; {0, 1} for a bernoulli likelihood."""
    positions: Tensor
    """(b,) int64, place of each image in the endless training stream, or its number in the split."""
    flip: Tensor
    """(b,) bool, images to be mirrored."""
    weights: Tensor
    """(b,) float32, weight of each image in the loss: 0 where an image only fills an empty share."""
    keys: list[str]
    global_size: int
    """Images of the batch over all ranks; when evaluating, of this rank alone."""
    wait_seconds: float
    """How long the caller waited for this batch."""


@dataclass(frozen=True)
class _Task:
    """What is to become a batch."""

    positions: Integers
    places: Places
    weight: float
    global_size: int


@dataclass(frozen=True)
class _Pending:
    """A batch in the making; the threads write their images into it."""

    task: _Task
    images: Tensor
    keys: list[Future[str]]


@dataclass(frozen=True)
class _Recipe:
    """How a stored image becomes the model's."""

    stored_size: int
    factor: int
    border: int
    channels: int
    binarize_key: tuple[int | str, ...] | None
    """Key of the random numbers, if images are to be binarized."""

    @property
    def size(self) -> int:
        return self.stored_size // self.factor + 2 * self.border

    def write(self, data: bytes, position: int, out: Pixels) -> None:
        """Decode `data` into `out` (C, H, W), which holds zeros."""
        pixels = decode(data, self.stored_size, self.channels, self.factor).transpose(2, 0, 1)
        if self.binarize_key is not None:
            pixels = _binarized(pixels, self.binarize_key, position)
        inner = slice(self.border, self.size - self.border)
        out[:, inner, inner] = pixels


def check_fits(config: RunConfig, index: Index) -> None:
    """Raises ShardError if the data set's images cannot become images of the configured model."""
    _recipe(config.model, index, ())


def training_batches(
    config: RunConfig, index: Index, *, rank: int, world_size: int, start: int, stop: int
) -> Generator[Batch, None, None]:
    """This rank's shares of the training batches from position `start` up to `stop`.

    All ranks get equally many batches. The last one is smaller if need be, so that the
    positions end exactly at `stop`; a rank without a share in it gets one image of weight 0.
    Close the iterator, or read it to its end, to stop its threads.

    Raises ShardError if the data set does not fit the configuration, or is damaged.
    """
    recipe = _recipe(config.model, index, (config.train.seed, "binarize"))
    counts = index.samples_per_shard(TRAIN)
    batch_size = config.train.batch_size
    if not counts.sum():
        raise ShardError(f"{storage.shown(index.root)}: has no training images.")
    if batch_size < world_size:
        raise ShardError(
            f"train.batch_size is {batch_size}, but there are {world_size} workers: each needs an image."
        )
    lanes = config.data.lanes or default_lanes(batch_size)
    stream = plan.Stream(counts, lanes=lanes, window=config.data.shuffle_window, seed=config.train.seed)

    def tasks() -> Iterator[_Task]:
        for first, size in plan.batches(start, stop, batch_size):
            share = plan.training_share(first, size, lanes=lanes, rank=rank, world_size=world_size)
            positions = share if len(share) else np.array([first], np.int64)
            yield _Task(positions, stream.locate(positions), float(len(share) > 0), size)

    flip_key = (config.train.seed, "flip") if config.data.horizontal_flip else None
    return _batches(config, Reader(index, TRAIN), tasks(), recipe, flip_key)


def evaluation_batches(
    config: RunConfig,
    index: Index,
    *,
    rank: int,
    world_size: int,
    split: str = VALIDATION,
    limit: int | None = None,
    batch_size: int,
) -> Generator[Batch, None, None]:
    """This rank's share of the first `limit` images of `split`, in order, each exactly once.

    Shares differ by one image at most and may be empty; nothing is padded.
    Raises ShardError if the data set does not fit the configuration, or is damaged.
    """
    recipe = _recipe(config.model, index, ("evaluation", split))
    counts = index.samples_per_shard(split)
    total = int(counts.sum())
    share = plan.contiguous_share(
        total if limit is None else min(limit, total), rank=rank, world_size=world_size
    )

    def tasks() -> Iterator[_Task]:
        for first, size in plan.batches(share.start, share.stop, batch_size):
            numbers = np.arange(first, first + size, dtype=np.int64)
            yield _Task(numbers, plan.locate_in_order(counts, numbers), 1.0, size)

    return _batches(config, Reader(index, split), tasks(), recipe, None)


def _recipe(model: NVAEConfig, index: Index, binarize_key: tuple[int | str, ...]) -> _Recipe:
    """Raises ShardError if images of the data set cannot become images of the model."""
    where = f"{storage.shown(index.root)} holds images of {index.image_size}x{index.image_size} pixels"
    inner = model.image_size - 2 * model.border_pixels
    if index.channels != model.image_channels:
        raise ShardError(
            f"{where} with {index.channels} channels; model.image_channels is {model.image_channels}. "
            f"Set it to {index.channels}, or build the data set with --channels {model.image_channels}."
        )
    if inner < 1 or index.image_size % inner:
        raise ShardError(
            f"{where}; the model sees {inner}x{inner} (model.image_size {model.image_size} less the border). "
            f"Images are averaged over whole squares of pixels: choose a model.image_size that divides "
            f"{index.image_size}, or build the data set with --image-size {inner}."
        )
    return _Recipe(
        stored_size=index.image_size,
        factor=index.image_size // inner,
        border=model.border_pixels,
        channels=index.channels,
        binarize_key=binarize_key if model.likelihood == "bernoulli" else None,
    )


def _batches(
    config: RunConfig,
    reader: Reader,
    tasks: Iterable[_Task],
    recipe: _Recipe,
    flip_key: tuple[int | str, ...] | None,
) -> Generator[Batch, None, None]:
    """The batches of `tasks`, `prefetch_batches` of them in the making at any time."""
    pool = ThreadPoolExecutor(config.data.decode_threads, "decode")
    pending: deque[_Pending] = deque()
    upcoming = iter(tasks)
    try:
        asked = time.perf_counter()
        while True:
            for task in upcoming:
                pending.append(_begin(task, reader, pool, recipe))
                if len(pending) > config.data.prefetch_batches:
                    break
            if not pending:
                return
            done = pending.popleft()
            keys = [key.result() for key in done.keys]
            yield _batch(done, keys, flip_key, time.perf_counter() - asked)
            asked = time.perf_counter()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        reader.close()


def _begin(task: _Task, reader: Reader, pool: ThreadPoolExecutor, recipe: _Recipe) -> _Pending:
    shape = (len(task.positions), recipe.channels, recipe.size, recipe.size)
    images = torch.zeros(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    pixels: Pixels = images.numpy()
    samples = reader.request(task.places)
    keys = [
        pool.submit(_decode, sample, recipe, int(position), out)
        for sample, position, out in zip(samples, task.positions, pixels, strict=True)
    ]
    return _Pending(task, images, keys)


def _decode(sample: PendingSample, recipe: _Recipe, position: int, out: Pixels) -> str:
    """Write the sample's image to `out`; returns its key."""
    found = sample.wait()
    try:
        recipe.write(found.image, position, out)
    except RejectedImageError as error:
        raise ShardError(
            f"{sample.name} ({found.key!r}): {error}, though its checksum is right: it was stored like "
            f"this. Build the data set again."
        ) from error
    return found.key


def _batch(done: _Pending, keys: list[str], flip_key: tuple[int | str, ...] | None, waited: float) -> Batch:
    positions = done.task.positions
    if flip_key is None:
        flip = np.zeros(len(positions), bool)
    else:
        flip = words_at(positions, *flip_key) >> np.uint64(63) == 1
    return Batch(
        images=done.images,
        positions=torch.from_numpy(positions),
        flip=torch.from_numpy(flip),
        weights=torch.full((len(positions),), done.task.weight),
        keys=keys,
        global_size=done.task.global_size,
        wait_seconds=waited,
    )


def _binarized(pixels: Pixels, key: tuple[int | str, ...], position: int) -> Pixels:
    """Each pixel of value v becomes 1 with probability v / 255, else 0."""
    random: NDArray[np.uint32] = words((pixels.size + 1) // 2, *key, position).view(np.uint32)
    # 255 levels, uniform up to 2^-24; the topmost of 2^32 numbers would be a 256th.
    levels = np.minimum(random[: pixels.size] // np.uint32(2**32 // 255), 254).reshape(pixels.shape)
    binary: Pixels = (levels < pixels).astype(np.uint8)
    return binary
