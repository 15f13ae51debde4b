"""Rows that count what other campaigns try: outages of tracking, broken saves and broken checkpoints."""

import contextlib
import io
import random
from collections.abc import Sequence

from tests.faults import checkpoint_faults, tracking_faults
from tests.faults.checkpoint_faults import Counts
from tests.faults.training_runs import Place, TrainingRow

SHORT = ("away_at_the_start", "away_in_the_middle", "away_to_the_end", "away_for_a_whole_launch")


def tracking(place: Place) -> TrainingRow:
    """A real MLflow server that is away, slow, full or lying while a training goes on."""
    # It prints a table of its own.
    with contextlib.redirect_stdout(io.StringIO()):
        outcomes = tracking_faults.run(place.seed, SHORT if place.short else ())
    points, lost = sum(each.points for each in outcomes), sum(each.lost for each in outcomes)
    doubled, slowest = sum(each.doubled for each in outcomes), max(each.slowest_call_ms for each in outcomes)
    return TrainingRow(
        "T1",
        "outages of tracking",
        sum(each.tried for each in outcomes),
        sum(each.survived for each in outcomes),
        f"of {points} points {lost} lost, {doubled} doubled; the longest call took {slowest:.0f} ms",
        tuple(f"{each.name}: {what}" for each in outcomes for what in each.broken),
    )


def saves(place: Place) -> TrainingRow:
    """A process killed at every step of a checkpoint's writing, claim and clearing away."""
    kills = checkpoint_faults.deaths(
        random.Random(place.seed), place.folder / "kills", 3 if place.short else 1000
    )
    return _counted("C1", "SIGKILL within a save", [kills])


def damage(place: Place) -> TrainingRow:
    """Checkpoints with flipped bits, cut, missing, mixed files."""
    flips = checkpoint_faults.damage(
        random.Random(place.seed), place.folder / "flips", 20 if place.short else 1000
    )
    mixtures = checkpoint_faults.mixtures(place.folder / "mixtures")
    return _counted("C2", "flipped bits, cut and mixed files of checkpoints", [flips, mixtures])


def _counted(id: str, fault: str, counts: Sequence[Counts]) -> TrainingRow:
    """One row of several counts."""
    return TrainingRow(
        id,
        fault,
        sum(each.tried for each in counts),
        sum(each.survived for each in counts),
        "; ".join(f"{each.name} {each.tried:,}" for each in counts),
        tuple(f"{each.name}: {what}" for each in counts for what in each.broken),
    )
