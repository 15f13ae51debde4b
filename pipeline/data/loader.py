"""From verified samples to batches of uint8, on one rank.

The order is the plan's whatever the threads do (data/production.py makes the batches ahead),
and closing the iterator ends them. Which images are mirrored is a pure function of (seed,
position), and so is everything else that is random (data/recipe.py).

A sample that cannot be had (data/corruption.py) and is to be skipped keeps its slot, so that
the order never shifts, at weight 0 in the loss. Its pixels are a copy of another image of the
same share: batch statistics, which know no weights, then see that image twice instead of a black
one. Which image that is depends on the batch and the share alone, so a resumed run repeats it.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import DataConfig, RunConfig
from pipeline.data import plan
from pipeline.data.cache import PieceCache
from pipeline.data.corruption import Losses
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError
from pipeline.data.plan import default_lanes as default_lanes
from pipeline.data.production import MadeBatch, Production, Task
from pipeline.data.randomness import words_at
from pipeline.data.reader import Reader
from pipeline.data.recipe import Recipe, recipe_for

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
    """(b,) float32, weight of each image in the loss: 0 where an image only fills an empty share,
    or the place of a corrupt one."""
    keys: list[str]
    """Of the samples that the plan wants, corrupt ones too."""
    global_size: int
    """Images of the batch over all ranks; when evaluating, of this rank alone."""
    wait_seconds: float
    """How long the caller waited for this batch."""
    corrupt_samples: int = 0
    """Images of this share that could not be had."""
    transferred_bytes: int = 0
    """Fetched from the store since the batch before, for this and later ones."""
    cached_bytes: int = 0
    """Likewise, out of the local cache."""


def check_fits(config: RunConfig, index: Index) -> None:
    """Raises ShardError if the data set's images cannot become images of the configured model."""
    recipe_for(config.model, index, ())


def training_batches(
    config: RunConfig, index: Index, *, rank: int, world_size: int, start: int, stop: int
) -> Generator[Batch, None, None]:
    """This rank's shares of the training batches from position `start` up to `stop`.

    All ranks get equally many batches. The last one is smaller if need be, so that the
    positions end exactly at `stop`; a rank without a share in it gets one image of weight 0.
    Close the iterator, or read it to its end, to stop its threads.

    Raises ShardError if the data set does not fit the configuration, or is damaged beyond what
    `data.on_corrupt` lets pass.
    """
    recipe = recipe_for(config.model, index, (config.train.seed, "binarize"))
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

    def tasks() -> Iterator[Task]:
        for first, size in plan.batches(start, stop, batch_size):
            share = plan.training_share(first, size, lanes=lanes, rank=rank, world_size=world_size)
            positions = share if len(share) else np.array([first], np.int64)
            yield Task(positions, stream.locate(positions), float(len(share) > 0), size)

    flip_key = (config.train.seed, "flip") if config.data.horizontal_flip else None
    return _batches(config, index, TRAIN, tasks(), recipe, flip_key)


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

    Shares differ by one image at most and may be empty; nothing is padded. Raises ShardError as
    `training_batches` does.
    """
    recipe = recipe_for(config.model, index, ("evaluation", split))
    counts = index.samples_per_shard(split)
    total = int(counts.sum())
    share = plan.contiguous_share(
        total if limit is None else min(limit, total), rank=rank, world_size=world_size
    )

    def tasks() -> Iterator[Task]:
        for first, size in plan.batches(share.start, share.stop, batch_size):
            numbers = np.arange(first, first + size, dtype=np.int64)
            yield Task(numbers, plan.locate_in_order(counts, numbers), 1.0, size)

    return _batches(config, index, split, tasks(), recipe, None)


def _batches(
    config: RunConfig,
    index: Index,
    split: str,
    tasks: Iterable[Task],
    recipe: Recipe,
    flip_key: tuple[int | str, ...] | None,
) -> Generator[Batch, None, None]:
    """The batches of `tasks`, `prefetch_batches` of them in the making at any time."""
    reader, losses = Reader(index, split, _cache(config.data, index)), Losses(config.data)
    production = Production(config.data, index, split, reader, tasks, recipe)
    begun: deque[Future[MadeBatch | None]] = deque()
    transferred = cached = 0
    try:
        asked = time.perf_counter()
        while True:
            while len(begun) <= config.data.prefetch_batches:
                begun.append(production.begin())
            made = begun.popleft().result()
            if made is None:
                return
            made.wait()
            losses.count(len(made.keys), list(made.lost.values()))
            batch = _finished(made, recipe, flip_key)
            traffic = reader.transferred_bytes - transferred, reader.cached_bytes - cached
            transferred, cached = transferred + traffic[0], cached + traffic[1]
            yield replace(
                batch,
                wait_seconds=time.perf_counter() - asked,
                transferred_bytes=traffic[0],
                cached_bytes=traffic[1],
            )
            asked = time.perf_counter()
    finally:
        production.close()
        reader.close()


def _cache(config: DataConfig, index: Index) -> PieceCache | None:
    """None also for a data set on a local disk, where it would only be a second copy."""
    if config.cache_folder is None or storage.is_local(index.root):
        return None
    return PieceCache(Path(config.cache_folder).expanduser(), int(config.cache_gib * 2**30))


def _finished(made: MadeBatch, recipe: Recipe, flip_key: tuple[int | str, ...] | None) -> Batch:
    positions = made.task.positions
    if flip_key is None:
        flip = np.zeros(len(positions), bool)
    else:
        flip = words_at(positions, *flip_key) >> np.uint64(63) == 1
    weights = torch.full((len(positions),), made.task.weight)
    kept = [row for row in range(len(positions)) if row not in made.lost]
    for turn, row in enumerate(sorted(made.lost)):
        weights[row] = 0
        if kept:
            made.images[row] = made.images[kept[turn % len(kept)]]
        else:
            made.images[row].fill_(recipe.blank)
    return Batch(
        images=made.images,
        positions=torch.from_numpy(positions),
        flip=torch.from_numpy(flip),
        weights=weights,
        keys=made.keys,
        global_size=made.task.global_size,
        wait_seconds=0.0,
        corrupt_samples=len(made.lost),
    )
