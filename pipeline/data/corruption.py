"""What becomes of a sample that cannot be had: the policy `data.on_corrupt`, and its books.

Corrupt is a sample whose bytes differ from the sidecar's checksum in two transfers, or lie
beyond the end of a shard that was cut, or are what was stored and yet no image of the data set.
A missing shard, a sidecar that the index does not know and a store that does not answer are no
matter of single samples: they always end the run.
"""

import logging

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.data.index import Index, Shard, ShardError

logger = logging.getLogger(__name__)

LEAST_ASKED_FOR = 1000
"""Samples from which the share of the lost ones is taken at least."""
_MOST_LINES = 20


class CorruptSampleError(ShardError):
    """One sample cannot be had; those around it can."""

    def __init__(self, index: Index, shard: Shard, key: str, offset: int, what: str) -> None:
        root = storage.shown(index.root)
        place = storage.shown(storage.join(index.root, shard.name))
        self.key, self.root = key, root
        self.what = f"{place}: sample {key!r} at byte {offset:,}: {what}"
        super().__init__(
            f"{self.what}. The shard was damaged or replaced; `nvae shards verify {root}` finds "
            f"all that are. Restore the shard, or build the data set again, and start the run "
            f"again: it continues. data.on_corrupt=skip trains without such samples."
        )


class Losses:
    """The samples that one reading of a split, by one worker, asked for and could not have."""

    def __init__(self, config: DataConfig) -> None:
        self._skips, self._most = config.on_corrupt == "skip", config.max_corrupt_fraction
        self._asked = self._lost = 0
        self._told: set[str] = set()

    def count(self, asked: int, lost: list[CorruptSampleError]) -> None:
        """Takes note of `asked` samples, among them the lost ones.

        Raises the first of them if the policy is to fail, and ShardError if more than
        `max_corrupt_fraction` of max(samples asked for so far, 1000) were lost so far.
        """
        if lost and not self._skips:
            raise lost[0]
        self._asked += asked
        self._lost += len(lost)
        for error in lost:
            self._tell(error)
        if self._lost > self._most * max(self._asked, LEAST_ASKED_FOR):
            raise ShardError(
                f"{self._lost:,} of the {self._asked:,} samples that this worker has read are corrupt: more "
                f"than data.max_corrupt_fraction = {self._most:g} allows (of {LEAST_ASKED_FOR:,} samples at "
                f"least). The last one: {lost[-1].what}. `nvae shards verify {lost[-1].root}` finds "
                f"every damaged shard; restore the data set and start the run again: it continues."
            )

    def _tell(self, error: CorruptSampleError) -> None:
        """Each sample once, and no more than a screenful."""
        if error.what in self._told or len(self._told) > _MOST_LINES:
            return
        self._told.add(error.what)
        if len(self._told) <= _MOST_LINES:
            logger.warning("Skipped, with no weight in the loss: %s", error.what)
        else:
            logger.warning("Further corrupt samples are counted (data/corrupt_samples) and no longer named.")
