"""The numbers of the training curves: their names, and how they are added up.

Sums stay on the device, so that an update is never waited for; every log interval is one
all-reduce and one transfer, after which everything is a plain float. Means are taken over
the images of all ranks, or over all updates, never over means. Updates that were skipped
are counted and otherwise left out: one nan would hide a whole interval.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.objective import bits_per_dim
from nvae.step import Coefficients, StepResult
from pipeline import storage
from pipeline.training.worker import Worker

NAMES = MappingProxyType(
    {
        "train/nelbo_nats": "negative ELBO, nats per image: reconstruction + KL, without coefficients",
        "train/bits_per_dim": "the same in bits per colour value",
        "train/reconstruction_nats": "-log p(x given z), nats per image",
        "train/kl_nats": "KL of posteriors from priors, nats per image, all groups",
        "train/kl_nats/group_00": "the same of one group; 00 is the coarsest",
        "train/loss": "what was minimized: with KL coefficients, balancing and penalties; mean over updates",
        "train/spectral_penalty": "largest singular values added up, without coefficient; mean over updates",
        "train/batch_norm_penalty": "largest scales added up, without coefficient; mean over updates",
        "train/gradient_norm": "L2 norm of the gradient before clipping; mean over updates",
        "train/skipped_updates": "updates that were not made: not finite, or a spike",
        "train/skipped_fraction": "their share of all updates of the interval",
        "schedule/learning_rate": "of the last update",
        "schedule/kl_coefficient": "of the last update",
        "schedule/spectral_coefficient": "of the last update",
        "speed/images_per_second": "of all ranks together, without evaluations and checkpoints",
        "speed/seconds_per_step": "mean over the ranks",
        "data/wait_seconds": "that a rank waited for batches in the interval; mean over the ranks",
        "data/wait_fraction": "its share of the interval, which is counted as for images_per_second",
        "data/corrupt_samples": "left out of the loss because they could not be read; all ranks together",
        "data/store_retries": "requests to stores, for whatever purpose, made again; all ranks together",
        "data/cached_fraction": "share of the bytes of shards that came from the local cache; 0 without one",
    }
)
"""What there is to see, with units. MLflow allows letters, digits and `_-./: ` in names."""

# Order of the sums of `Metrics`; the KL of each group follows.
_UPDATES_MADE, _LOSS, _SPECTRAL, _BATCH_NORM, _GRADIENT, _IMAGES, _RECONSTRUCTION, _KL = range(8)


class Metrics:
    """Adds up the updates of one log interval, on one rank."""

    def __init__(
        self, worker: Worker, model: NVAEConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds; the first interval begins now."""
        self._worker, self._model, self._clock = worker, model, clock
        self._retries_before = storage.statistics().retries
        self._begin()

    def _begin(self) -> None:
        self._sums: Tensor | None = None
        # Images of skipped updates, too: they took their time.
        self._images_passed: Tensor | None = None
        self._updates = 0
        self._wait_seconds = 0.0
        self._corrupt_samples = self._transferred_bytes = self._cached_bytes = 0
        self._paused_seconds = 0.0
        self._coefficients: Coefficients | None = None
        self._began = self._clock()

    def add(
        self,
        result: StepResult,
        coefficients: Coefficients,
        wait_seconds: float,
        *,
        corrupt_samples: int = 0,
        transferred_bytes: int = 0,
        cached_bytes: int = 0,
    ) -> None:
        """Counts one update, and what reading its batch cost this rank. Does not wait for the device."""
        values = torch.stack(
            [
                torch.ones_like(result.loss),
                result.loss,
                result.spectral,
                result.batch_norm_scale,
                result.gradient_norm,
                result.images,
                result.reconstruction,
                *result.kl_per_group,
            ]
        ).double()
        if not result.reading.made:
            values = torch.zeros_like(values)
        images = result.images.double()
        self._sums = values if self._sums is None else self._sums + values
        self._images_passed = images if self._images_passed is None else self._images_passed + images
        self._updates += 1
        self._wait_seconds += wait_seconds
        self._corrupt_samples += corrupt_samples
        self._transferred_bytes += transferred_bytes
        self._cached_bytes += cached_bytes
        self._coefficients = coefficients

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (an evaluation, a checkpoint) does not count as training time."""
        began = self._clock()
        yield
        self._paused_seconds += self._clock() - began

    def reduce(self) -> dict[str, float]:
        """The interval's metrics over all ranks, by the names of NAMES; the next interval begins.

        Every rank must call it, after equally many updates, at least one.
        """
        assert self._sums is not None and self._images_passed is not None and self._coefficients is not None
        seconds = self._clock() - self._began - self._paused_seconds
        reading = [self._wait_seconds, self._corrupt_samples, self._transferred_bytes, self._cached_bytes]
        retries = storage.statistics().retries
        reading.append(retries - self._retries_before)
        self._retries_before = retries
        mine = torch.tensor([self._updates, seconds, *reading], dtype=torch.float64)
        sums = torch.cat([mine.to(self._sums.device), self._images_passed[None], self._sums])
        updates, seconds, waited, corrupt, transferred, cached, tried, images_passed, *sums_over_ranks = (
            self._worker.all_reduce(sums).tolist()
        )
        world_size = self._worker.world_size
        metrics = {
            **self._means(sums_over_ranks),
            "train/skipped_updates": (updates - sums_over_ranks[_UPDATES_MADE]) / world_size,
            "train/skipped_fraction": 1 - sums_over_ranks[_UPDATES_MADE] / updates,
            "schedule/learning_rate": self._coefficients.learning_rate,
            "schedule/kl_coefficient": self._coefficients.kl,
            "schedule/spectral_coefficient": self._coefficients.spectral,
            "speed/images_per_second": _ratio(images_passed * world_size, seconds),
            "speed/seconds_per_step": seconds / updates,
            "data/wait_seconds": waited / world_size,
            "data/wait_fraction": _ratio(waited, seconds),
            "data/corrupt_samples": corrupt,
            "data/store_retries": tried,
            "data/cached_fraction": cached / max(transferred + cached, 1.0),
        }
        self._begin()
        return metrics

    def _means(self, sums: list[float]) -> dict[str, float]:
        made, images = sums[_UPDATES_MADE], sums[_IMAGES]
        reconstruction = _ratio(sums[_RECONSTRUCTION], images)
        kl_per_group = [_ratio(kl, images) for kl in sums[_KL:]]
        nelbo = reconstruction + sum(kl_per_group)
        return {
            "train/nelbo_nats": nelbo,
            "train/bits_per_dim": bits_per_dim(nelbo, self._model),
            "train/reconstruction_nats": reconstruction,
            "train/kl_nats": sum(kl_per_group),
            **{f"train/kl_nats/group_{group:02d}": kl for group, kl in enumerate(kl_per_group)},
            "train/loss": _ratio(sums[_LOSS], made),
            "train/spectral_penalty": _ratio(sums[_SPECTRAL], made),
            "train/batch_norm_penalty": _ratio(sums[_BATCH_NORM], made),
            "train/gradient_norm": _ratio(sums[_GRADIENT], made),
        }


def _ratio(total: float, count: float) -> float:
    """nan where nothing was counted, as when every update of an interval was skipped."""
    return total / count if count else math.nan
