"""What was done against divergence, and how often: part of a training's state, of bounded size.

Schedules ask it for the softening that is still in force, noise for the number of rollbacks,
the ladder (stability.py) for what is left of its budget, and people for what happened.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pipeline.config import RunConfig


class Kind(StrEnum):
    """The rungs of the ladder."""

    SKIP = "skip"
    """An update was left out."""
    CLIP = "clip"
    """From here gradients that are too long are shortened instead of left out."""
    ROLL_BACK = "roll_back"
    """The weights of an earlier checkpoint came back; images and noise went on."""
    SOFTEN = "soften"
    """The same, and the coefficients became gentler for a while."""
    GIVE_UP = "give_up"
    """The training ended."""


NAMES = MappingProxyType(
    {
        f"stability/{Kind.SKIP}": "updates left out since the first image, also those that led to more",
        f"stability/{Kind.CLIP}": "how often long gradients began to be shortened",
        f"stability/{Kind.ROLL_BACK}": "how often weights came back",
        f"stability/{Kind.SOFTEN}": "how often of these coefficients became gentler as well",
        f"stability/{Kind.GIVE_UP}": "1 at the end of a run that diverged for good",
    }
)
"""Metrics, each with a point when it changes."""

ROLLBACKS = (Kind.ROLL_BACK, Kind.SOFTEN)

ROLLBACKS_KEPT = 128
"""More than count against any budget (stability.max_rollbacks)."""
OTHERS_KEPT = 64
"""Of those nobody decides by more than their number; all of them are in the run's journal."""


@dataclass(frozen=True)
class Intervention:
    """One thing that was done, and why."""

    kind: Kind
    images_seen: int
    """When: images seen after the update that was the reason."""
    reason: str
    back_to: int | None = None
    """Images seen at the checkpoint whose weights came back; 0: the initial weights."""
    spectral_factor: float = 1.0
    """Of the spectral coefficient, at that moment."""
    learning_rate_factor: float = 1.0
    keys: tuple[str, ...] = ()
    """Samples of the batch that was left out, over all ranks."""


def keep(interventions: list[Intervention], done: Intervention) -> None:
    """Add `done`, and drop the oldest of its sort where there are more than anybody asks for."""
    interventions.append(done)
    alike = [each for each in interventions if (each.kind in ROLLBACKS) == (done.kind in ROLLBACKS)]
    if len(alike) > (ROLLBACKS_KEPT if done.kind in ROLLBACKS else OTHERS_KEPT):
        interventions.remove(alike[0])


def rollbacks(counts: Mapping[Kind, int]) -> int:
    """How often weights came back, of the counts of every kind."""
    return sum(counts.get(kind, 0) for kind in ROLLBACKS)


def in_numbers(counts: Mapping[Kind, int]) -> dict[str, float]:
    """The metrics of NAMES: whatever was done, an update was left out; softening comes with weights."""
    numbers = {kind: counts.get(kind, 0) for kind in Kind}
    numbers[Kind.SKIP] = sum(numbers.values())
    numbers[Kind.ROLL_BACK] = rollbacks(counts)
    return {f"stability/{kind}": float(number) for kind, number in numbers.items()}


def left_behind(interventions: Iterable[Intervention]) -> list[range]:
    """Images seen at checkpoints that rollbacks gave up: what followed from their weights did not help."""
    return [range(each.back_to + 1, each.images_seen) for each in interventions if each.back_to is not None]


def recovery_images(config: RunConfig) -> int:
    """Images after which a rollback is over: nothing of its softening is left."""
    return math.ceil(config.stability.recovery_fraction * config.train.total_images)


def budget_images(config: RunConfig) -> int:
    """Images for which a rollback counts: while it recovers, and as long as a budget takes to spend.

    Without the second a short training that does nothing but diverge would never be given up.
    """
    stability = config.stability
    updates = 2 * (stability.max_rollbacks + 1) * stability.skips_in_a_row
    return max(recovery_images(config), updates * config.train.batch_size)


def to_record(interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
    """As plain values for a checkpoint's record."""
    return [asdict(each) for each in interventions]


def from_record(record: Sequence[Mapping[str, Any]]) -> list[Intervention]:
    """What `to_record` was given."""
    return [
        Intervention(**{**each, "kind": Kind(each["kind"]), "keys": tuple(each["keys"])}) for each in record
    ]
