"""Rows that count what other campaigns try: outages of tracking, broken saves and broken checkpoints."""

import contextlib
import io

from tests.faults import tracking_faults
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
