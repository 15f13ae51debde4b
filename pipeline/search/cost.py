"""Where the device time of a search went, and what stopping early has saved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.search.ledger import Trial


def spent(trial: Trial) -> float:
    """Device-seconds; of a running trial what it is known to have trained, until its start ends."""
    return max(trial.spent_device_seconds, trial.last.device_seconds if trial.last else 0.0)


@dataclass(frozen=True)
class Stage:
    """What all trials together have used between two rungs."""

    label: str
    trials: int
    """That came into it."""
    device_seconds: float


def spending(trials: Sequence[Trial], rungs: Sequence[float], *, by_time: bool) -> list[Stage]:
    """Where the device-seconds of a search went, in order of the rungs; the last are in no evaluation."""
    bounds = [0.0, *rungs, math.inf]
    unit = "device-hours" if by_time else "images"
    names = [f"{bound / 3600:.3g}" if by_time else f"{bound:,.0f}" for bound in bounds[:-1]]
    stages = []
    for low, high, name, after in zip(bounds, bounds[1:], names, [*names[1:], ""], strict=False):
        used = [_seconds_at(each, high, by_time) - _seconds_at(each, low, by_time) for each in trials]
        label = f"{name} to {after} {unit}" if after else f"from {name} {unit} on" if rungs else "training"
        if any(used):
            stages.append(Stage(label, sum(seconds > 0 for seconds in used), sum(used)))
    beside = [spent(each) - (each.last.device_seconds if each.last else 0.0) for each in trials]
    label = "starts, lost work, work not evaluated"
    return [*stages, Stage(label, sum(seconds > 0 for seconds in beside), sum(beside))]


def _seconds_at(trial: Trial, place: float, by_time: bool) -> float:
    """Device-seconds of a trial when it was at a rung, between evaluations at even speed."""
    if trial.last is None:
        return 0.0
    if by_time:
        return min(place, trial.last.device_seconds)
    images, seconds = 0, 0.0
    for each in trial.evaluations:
        if each.images_seen >= place:
            share = (place - images) / (each.images_seen - images)
            return seconds + share * (each.device_seconds - seconds)
        images, seconds = each.images_seen, each.device_seconds
    return seconds


def saved_device_seconds(trials: Sequence[Trial], total_images: int) -> float:
    """What the trials that were pruned would have used besides, each at its own speed so far."""
    return sum(
        (total_images - each.last.images_seen) * each.last.device_seconds / each.last.images_seen
        for each in trials
        if each.state == "pruned" and each.last is not None
    )
