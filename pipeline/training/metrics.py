# W ranks, G latent groups (coarsest first), Z channels of a group.
"""The numbers of the training curves: their names, and how they are added up.

Sums stay on the device, so that an update is never waited for; every log interval is one
all-reduce and one transfer, after which everything is a plain float. Means are taken over
the images of all ranks, or over all updates, never over means. Updates that were skipped
are counted and otherwise left out: one nan would hide a whole interval.

A mean hides the rank that all others wait for, so that some numbers are told of the worst rank
as well: `/max` ends the name of the highest, `/min` that of the lowest value of any rank. For
these every rank writes a line of its own into a table, and the same all-reduce fills the table.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor

from nvae.collectives import Waiting
from nvae.config import NVAEConfig
from nvae.objective import active_channels, bits_per_dim
from nvae.step import Coefficients, StepResult
from pipeline import storage
from pipeline.training import checkpoint_writer, interventions, machine
from pipeline.training.machine import Machine, fold
from pipeline.training.worker import Worker

NAMES = MappingProxyType(
    {
        "train/nelbo_nats": "negative ELBO, nats per image: reconstruction + KL, without coefficients",
        "train/bits_per_dim": "the same in bits per colour value",
        "train/reconstruction_nats": "-log p(x given z), nats per image",
        "train/kl_nats": "KL of posteriors from priors, nats per image, all groups",
        "train/kl_nats/group_00": "the same of one group; 00 is the coarsest",
        "train/active_channels": "latent channels whose KL, a mean over images, exceeds 0.1 nats; all groups",
        "train/active_channels/group_00": "the same of one group",
        "train/loss": "what was minimized: with KL coefficients, balancing and penalties; mean over updates",
        "train/spectral_penalty": "largest singular values added up, without coefficient; mean over updates",
        "train/largest_singular_value": "of any convolution, after the last update; not without the penalty",
        "train/batch_norm_penalty": "largest scales added up, without coefficient; mean over updates",
        "train/gradient_norm": "L2 norm of the gradient before clipping; mean over updates",
        "train/skipped_updates": "updates that were not made: not finite, or a spike",
        "train/skipped_fraction": "their share of all updates of the interval",
        "schedule/learning_rate": "of the last update",
        "schedule/kl_coefficient": "of the last update",
        "schedule/spectral_coefficient": "of the last update",
        "speed/images_per_second": "of all ranks together, without evaluations and checkpoints",
        "speed/seconds_per_step": "mean over the ranks",
        "speed/work_seconds_per_step": "without waiting for batches and other ranks; mean over the ranks",
        "speed/work_seconds_per_step/max": "the same of the slowest rank: who waits, waits for this one",
        "speed/slowest_rank": "its number",
        "speed/communication_fraction": "share of an update that a rank waits in collectives, for transfers "
        "or for slower ranks; mean over the ranks; 0 on one rank",
        "speed/communication_fraction/min": "of the rank that waits least: about what the transfer takes",
        "data/wait_seconds": "that a rank waited for batches in the interval; mean over the ranks",
        "data/wait_seconds/max": "the same of the rank that waited longest",
        "data/wait_fraction": "its share of the interval, which is counted as for images_per_second",
        "data/corrupt_samples": "left out of the loss because they could not be read; all ranks together",
        "data/store_retries": "requests to stores, for whatever purpose, made again; all ranks together",
        "data/cached_fraction": "share of the bytes of shards that came from the local cache; 0 without one",
        "stability/loss_score": "robust deviations above the median of the updates before; highest",
        "stability/gradient_score": "the same of the logarithm of the gradient's norm",
        **checkpoint_writer.NAMES,
        **interventions.NAMES,
        **machine.NAMES,
    }
)
"""What there is to see, with units. MLflow allows letters, digits and `_-./: ` in names.

What has not been measured is left out: of a GPU on a machine without, of a machine in its first second.
"""

PER_RANK = (
    "speed/work_seconds_per_step",
    "speed/work_seconds_per_step/max",
    "speed/communication_fraction",
    "speed/communication_fraction/min",
    "data/wait_seconds/max",
    *machine.NAMES,
)
"""The columns of the table that has a line for each rank."""

TIMED_EVERY = 32
"""On a CUDA device, one of so many updates is measured for how long it waits: that takes an event before
and after each collective. Elsewhere it takes two looks at the clock, and every update is measured."""

# Order of the sums of `Metrics`; the KL of each channel follows.
_UPDATES_MADE, _LOSS, _SPECTRAL, _BATCH_NORM, _GRADIENT, _IMAGES, _RECONSTRUCTION, _KL = range(8)


class Metrics:
    """Adds up the updates of one log interval, on one rank."""

    def __init__(
        self,
        worker: Worker,
        model: NVAEConfig,
        machine: Machine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds; the first interval begins now."""
        self._worker, self._model, self._machine, self._clock = worker, model, machine, clock
        self._waiting = Waiting(worker.device)
        self._retries_before = storage.statistics().retries
        self._begin()

    def _begin(self) -> None:
        self._sums: Tensor | None = None
        # Images of skipped updates, too: they took their time.
        self._images_passed: Tensor | None = None
        self._updates = self._timed_updates = 0
        self._wait_seconds = 0.0
        self._corrupt_samples = self._transferred_bytes = self._cached_bytes = 0
        self._paused_seconds = 0.0
        self._coefficients: Coefficients | None = None
        self._began = self._clock()

    def timed(self) -> AbstractContextManager[object]:
        """To be entered around an update: measures its time, and how long it waits for other ranks."""
        # On a CUDA device not the first one, for which the others may wait while rank 0 saves.
        if self._worker.device.type == "cuda" and self._updates % TIMED_EVERY != 1:
            return nullcontext()
        self._timed_updates += 1
        return self._waiting

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
        numbers = [
            torch.ones_like(result.loss),
            result.loss,
            result.spectral,
            result.batch_norm_scale,
            result.gradient_norm,
            result.images,
            result.reconstruction,
        ]
        values = torch.cat([torch.stack(numbers), result.kl_per_channel.flatten()]).double()
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
        retries = storage.statistics().retries
        counts = [
            self._updates,
            seconds,
            self._wait_seconds,
            self._corrupt_samples,
            self._transferred_bytes,
            self._cached_bytes,
            retries - self._retries_before,
        ]
        self._retries_before = retries
        mine = torch.tensor(counts, dtype=torch.float64)
        summands = (mine, self._table(), self._images_passed[None], self._sums)
        vector = torch.cat([part.to(self._sums).flatten() for part in summands])
        # The one moment at which the host waits for the device.
        over_ranks = self._worker.all_reduce(vector).cpu()
        found, table, passed, sums = torch.split(over_ranks, [part.numel() for part in summands])
        updates, seconds, waited, corrupt, transferred, cached, tried = found.tolist()
        made = sums[_UPDATES_MADE].item()
        world_size = self._worker.world_size
        metrics = {
            **self._means(sums),
            **_of_ranks(table.view(world_size, -1)),
            "train/skipped_updates": (updates - made) / world_size,
            "train/skipped_fraction": 1 - made / updates,
            "schedule/learning_rate": self._coefficients.learning_rate,
            "schedule/kl_coefficient": self._coefficients.kl,
            "schedule/spectral_coefficient": self._coefficients.spectral,
            "speed/images_per_second": _ratio(passed.item() * world_size, seconds),
            "speed/seconds_per_step": seconds / updates,
            "data/wait_seconds": waited / world_size,
            "data/wait_fraction": _ratio(waited, seconds),
            "data/corrupt_samples": corrupt,
            "data/store_retries": tried,
            "data/cached_fraction": cached / max(transferred + cached, 1.0),
        }
        self._begin()
        return metrics

    def _table(self) -> Tensor:
        """(W, PER_RANK): zeros but for the line of this rank, in which nan stands for what is not known."""
        timed_seconds, waited_seconds = self._waiting.total.read(), self._waiting.waited.read()
        work_seconds = _ratio(timed_seconds - waited_seconds, self._timed_updates)
        waiting_share = _ratio(waited_seconds, timed_seconds)
        found = {
            "speed/work_seconds_per_step": work_seconds,
            "speed/work_seconds_per_step/max": work_seconds,
            "speed/communication_fraction": waiting_share,
            "speed/communication_fraction/min": waiting_share,
            "data/wait_seconds/max": self._wait_seconds,
            **self._machine.read(),
        }
        table = torch.zeros(self._worker.world_size, len(PER_RANK), dtype=torch.float64)
        mine = [found.get(name, math.nan) for name in PER_RANK]
        table[self._worker.rank] = torch.tensor(mine, dtype=torch.float64)
        return table

    def _means(self, sums: Tensor) -> dict[str, float]:
        made, images = sums[_UPDATES_MADE], sums[_IMAGES]
        per_update = (sums / made).tolist()
        kl_GZ = sums[_KL:].view(self._model.num_groups, -1) / images
        # In an interval of skipped updates nothing is known of them.
        active = active_channels(kl_GZ).sum(1) + 0 * kl_GZ.sum(1)
        reconstruction, kl = (sums[_RECONSTRUCTION] / images).item(), kl_GZ.sum().item()
        return {
            "train/nelbo_nats": reconstruction + kl,
            "train/bits_per_dim": bits_per_dim(reconstruction + kl, self._model),
            "train/reconstruction_nats": reconstruction,
            "train/kl_nats": kl,
            **_of_groups("train/kl_nats", kl_GZ.sum(1)),
            "train/active_channels": active.sum().item(),
            **_of_groups("train/active_channels", active),
            "train/loss": per_update[_LOSS],
            "train/spectral_penalty": per_update[_SPECTRAL],
            "train/batch_norm_penalty": per_update[_BATCH_NORM],
            "train/gradient_norm": per_update[_GRADIENT],
        }


def _of_ranks(table: Tensor) -> dict[str, float]:
    """What the lines of all ranks say together; what no rank measured is left out."""
    columns = dict(zip(PER_RANK, table.T.tolist(), strict=True))
    folded = {name: fold(name, column) for name, column in columns.items()}
    known = {name: value for name, value in folded.items() if not math.isnan(value)}
    slowest = known.get("speed/work_seconds_per_step/max")
    if slowest is not None:
        known["speed/slowest_rank"] = columns["speed/work_seconds_per_step/max"].index(slowest)
    return known


def _of_groups(name: str, values_G: Tensor) -> dict[str, float]:
    return {f"{name}/group_{group:02d}": value for group, value in enumerate(values_G.tolist())}


def _ratio(total: float, count: float) -> float:
    """nan where nothing was counted."""
    return total / count if count else math.nan
