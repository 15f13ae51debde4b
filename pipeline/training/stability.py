"""Whether a training is sound, and what to do when it is not: a verdict on each update.

Everything here is a pure function of numbers that are the same on all ranks and part of the
checkpoint, so that all ranks, and a run that was interrupted and resumed, take the same
decisions. train.py asks for limits before an update and for a verdict after it; recovery.py
carries the verdict out.

An update is compared with the last WINDOW that were made: how many robust deviations (median,
and median absolute deviation) its loss, and the logarithm of its gradient norm, lie above the
middle. Only above: nothing diverges downwards. The window lives on the host. Its numbers arrive
with the one transfer by which ranks agree on an update (nvae/health.py), so that limits cost no
work and no waiting of the device. Penalties are left out of the loss that is compared: softening
multiplies them, and that is no spike. How far the healthy updates of a run lie below the limits is
in its curves: stability/loss_score and stability/gradient_score, the highest of each log interval.

The ladder. An update that is not finite, or above a limit, is skipped. Too many skips in a row,
or among the last WINDOW updates, mean that the weights have gone wrong, not a batch: they roll
back to a checkpoint from before the onset of the episode, its first suspicious update, which
may lie long before the first skip. From the second rollback within a span on they also soften.
When the budget of the span is spent, the training gives up. Gradient norms alone take another
way: where the loss is as it was and long gradients go on coming, the norm has found a new level.
They are then shortened to the limit and enter the window, so that the limit follows, and a limit
that is too low cannot freeze a training (openai/vdvae issue 25).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import takewhile
from statistics import median
from typing import Any

from nvae.health import Limits, Reading, Trouble
from pipeline.config import StabilityConfig
from pipeline.training.interventions import ROLLBACKS, Intervention, Kind

WINDOW = 128
"""Updates that one is compared with."""
ENOUGH = 32
"""Updates in the window before anything counts as a spike."""
CALM = 16
"""Updates without suspicion that end an episode."""
SUSPICIOUS = 0.5
"""Share of the highest acceptable score from which an update that is made begins an episode."""

# Deviations count as at least this much: a share of the median loss, and of the norm. Else a
# training that hardly moves any more would be full of spikes.
_LOSS_FLOOR = 0.01
_LOG_NORM_FLOOR = 0.1
_DEVIATION = 1.4826
"""Standard deviations in a median absolute deviation of normal numbers."""


@dataclass(frozen=True)
class Condition:
    """How the training is doing; part of its state."""

    losses: tuple[float, ...] = ()
    """Of the last updates that were made, without penalties."""
    log_norms: tuple[float, ...] = ()
    """Logarithms of their gradient norms."""
    troubles: tuple[int, ...] = ()
    """Of the last updates, made or skipped; 0: made without any."""
    onset: int | None = None
    """Images seen before the first suspicious update of the episode; None: there is none."""
    calm: int = 0
    """Updates without suspicion since the last suspicious one of the episode."""
    made: int = 0
    """Updates made in the episode."""
    clipping: bool = False
    """Whether gradients that are too long are shortened instead of skipped."""

    def to_record(self) -> dict[str, Any]:
        """As plain values for a checkpoint's record; JSON keeps floats bit for bit."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Condition":
        lists = {name: tuple(record[name]) for name in ("losses", "log_norms", "troubles")}
        return cls(**{**record, **lists})


@dataclass(frozen=True)
class Verdict:
    """What an update means for the training."""

    condition: Condition
    """How the training is doing after it."""
    kind: Kind | None = None
    """What is to be done; None: go on."""
    reason: str = ""


def limits(config: StabilityConfig, condition: Condition) -> Limits:
    """What the next update may not exceed."""
    if not config.enabled:
        return Limits()
    return Limits(
        loss=_loss_scale(condition).at(config.loss_limit),
        gradient_norm=_exp(_norm_scale(condition).at(config.gradient_limit)),
        clip=condition.clipping,
    )


def judge(
    config: StabilityConfig,
    condition: Condition,
    reading: Reading,
    *,
    images_seen: int,
    span_images: int,
    interventions: Sequence[Intervention],
) -> Verdict:
    """What the update that began after `images_seen` images means.

    `span_images` is how long a rollback counts against the budget.
    """
    if reading.made:
        return _made(config, condition, reading, images_seen)
    now = replace(condition, troubles=(*condition.troubles, reading.trouble.value)[-WINDOW:])
    if not config.enabled:
        # The log line counts it.
        return Verdict(now)
    now = replace(now, onset=images_seen if now.onset is None else now.onset, calm=0)
    reason = describe(reading, limits(config, condition))
    skips, how_often = _too_many(config, now.troubles)
    if not skips:
        return Verdict(now, Kind.SKIP, reason)
    if all(trouble == Trouble.GRADIENT_SPIKE.value for trouble in skips):
        return Verdict(replace(now, troubles=(), clipping=True), Kind.CLIP, f"{how_often} ({reason})")
    since = images_seen - span_images
    spent = sum(each.kind in ROLLBACKS and each.images_seen > since for each in interventions)
    kind = Kind.ROLL_BACK if spent == 0 else Kind.SOFTEN
    if spent >= config.max_rollbacks:
        kind = Kind.GIVE_UP
    return Verdict(now, kind, f"{how_often}; the last one: {reason}")


def scores(condition: Condition, reading: Reading) -> tuple[float, float]:
    """Of the loss and of the gradient's norm: how many robust deviations above the middle.

    0 where the window knows too little.
    """
    return (
        _loss_scale(condition).score(reading.loss),
        _norm_scale(condition).score(_log(reading.gradient_norm)),
    )


def _made(config: StabilityConfig, condition: Condition, reading: Reading, images_seen: int) -> Verdict:
    loss_score, gradient_score = scores(condition, reading)
    suspicious = (
        loss_score > SUSPICIOUS * config.loss_limit or gradient_score > SUSPICIOUS * config.gradient_limit
    )
    now = replace(
        condition,
        losses=(*condition.losses, reading.loss)[-WINDOW:],
        log_norms=(*condition.log_norms, _log(reading.gradient_norm))[-WINDOW:],
        troubles=(*condition.troubles, 0)[-WINDOW:],
    )
    if config.enabled and suspicious and now.onset is None:
        now = replace(now, onset=images_seen)
    if now.onset is not None:
        now = replace(now, calm=0 if suspicious else now.calm + 1, made=now.made + 1)
        # After as many updates as the window holds, it says nothing any more of how it was before.
        if now.calm >= CALM or now.made >= WINDOW:
            now = replace(now, onset=None, calm=0, made=0, clipping=False)
    return Verdict(now)


def describe(reading: Reading, limits: Limits) -> str:
    """In words, what was wrong with an update."""
    numbers = {
        Trouble.WEIGHTS: "weights",
        Trouble.STATISTICS: "batch-norm statistics",
        Trouble.LOSS: "loss",
        Trouble.GRADIENT: "gradient",
    }
    spikes = {
        Trouble.LOSS_SPIKE: f"the loss, {reading.loss:.4g}, is above {limits.loss:.4g}",
        Trouble.GRADIENT_SPIKE: (
            f"the gradient's norm, {reading.gradient_norm:.4g}, is above {limits.gradient_norm:.4g}"
        ),
    }
    broken = [name for trouble, name in numbers.items() if trouble in reading.trouble]
    said = [f"not finite: {', '.join(broken)}"] if broken else []
    return "; ".join(said + [text for trouble, text in spikes.items() if trouble in reading.trouble])


def _too_many(config: StabilityConfig, troubles: Sequence[int]) -> tuple[Sequence[int], str]:
    """The skips that are more than can be put up with, and how to say so; none if they are not."""
    streak = list(takewhile(bool, reversed(troubles)))
    if len(streak) >= config.skips_in_a_row:
        return streak, f"{len(streak)} updates in a row were skipped"
    skips = [trouble for trouble in troubles if trouble]
    if len(skips) > config.skipped_fraction * WINDOW:
        return skips, f"{len(skips)} of the last {WINDOW} updates were skipped"
    return (), ""


@dataclass(frozen=True)
class _Scale:
    """The middle of the window, and what counts as one deviation from it."""

    middle: float
    deviation: float

    @classmethod
    def of(cls, window: Sequence[float], floor: Callable[[float], float]) -> "_Scale":
        """Deviation inf, so that nothing is far off, as long as too little is known."""
        if len(window) < ENOUGH:
            return cls(0.0, math.inf)
        middle = median(window)
        deviation = _DEVIATION * median(abs(value - middle) for value in window)
        return cls(middle, max(deviation, floor(middle)))

    def score(self, value: float) -> float:
        return (value - self.middle) / self.deviation

    def at(self, score: float) -> float:
        return self.middle + score * self.deviation


# An update asks for each scale several times: before it, and after it.
@lru_cache(maxsize=2)
def _loss_scale(condition: Condition) -> _Scale:
    return _Scale.of(condition.losses, lambda middle: _LOSS_FLOOR * abs(middle))


@lru_cache(maxsize=2)
def _norm_scale(condition: Condition) -> _Scale:
    return _Scale.of(condition.log_norms, lambda _: _LOG_NORM_FLOOR)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 700 else math.inf
