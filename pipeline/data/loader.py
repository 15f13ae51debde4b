"""(signatures; filled in next)"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.index import VALIDATION, Index


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch. b images of this rank, C colours."""

    images: Tensor
    """(b, C, H, W) uint8; {0, 1} for a bernoulli likelihood."""
    positions: Tensor
    """(b,) int64, place of each image in the endless training stream, or its number in the split."""
    flip: Tensor
    """(b,) bool, images to be mirrored."""
    weights: Tensor
    """(b,) float32, weight of each image in the loss."""
    keys: list[str]
    global_size: int
    """Images of the batch over all ranks."""
    wait_seconds: float
    """How long the caller waited for this batch."""


def training_batches(
    config: RunConfig, index: Index, *, rank: int, world_size: int, start: int, stop: int
) -> Iterator[Batch]:
    raise NotImplementedError


def evaluation_batches(
    config: RunConfig,
    index: Index,
    *,
    rank: int,
    world_size: int,
    split: str = VALIDATION,
    limit: int | None = None,
    batch_size: int,
) -> Iterator[Batch]:
    raise NotImplementedError
