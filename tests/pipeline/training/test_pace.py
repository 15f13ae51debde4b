from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.pace import (
    FEWEST_POINTS,
    FIRST_LIMIT_SECONDS,
    LONGEST_LIMIT_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_POINTS,
    Pace,
    pause_seconds,
)


def deliver(points: int, fixed_seconds: float, seconds_per_point: float) -> tuple[float, Pace]:
    """A server with these times: seconds until it has all points, and the pace in the end."""
    pace, clock, tries = Pace(), 0.0, 0
    while points:
        tries += 1
        assert tries < 1000, "it will never have them"
        sent = min(points, pace.points)
        seconds = fixed_seconds + sent * seconds_per_point
        if seconds > pace.limit_seconds:
            clock += pace.limit_seconds
            pace.too_slow()
        else:
            clock += seconds
            pace.answered(seconds)
            points -= sent
    return clock, pace


@given(fixed=st.floats(0, 100), each=st.floats(0, 0.3))
def test_a_server_that_answers_within_the_longest_limit_gets_everything(fixed: float, each: float) -> None:
    deliver(5_000, fixed, each)


def test_a_server_that_needs_half_a_minute_costs_little_more_than_its_answers() -> None:
    seconds, pace = deliver(10_000, 30, 0)
    assert seconds < 2 * 10 * 30
    assert pace.points == MOST_POINTS


def test_a_server_for_which_points_are_dear_gets_fewer_at_once() -> None:
    _, pace = deliver(10_000, 0, 0.5)
    assert pace.points < MOST_POINTS


def test_limits_return_when_answers_are_quick_again() -> None:
    pace = Pace()
    for _ in range(20):
        pace.too_slow()
    assert (pace.limit_seconds, pace.points) == (LONGEST_LIMIT_SECONDS, FEWEST_POINTS)
    for _ in range(5):
        pace.answered(0.02)
    assert (pace.limit_seconds, pace.points) == (FIRST_LIMIT_SECONDS, MOST_POINTS)


def test_pauses_grow_and_a_server_that_asks_for_rest_gets_a_long_one_at_once() -> None:
    pauses = [pause_seconds(failures, overloaded=False) for failures in range(1, 100)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.5, LONGEST_PAUSE_SECONDS)
    assert pause_seconds(1, overloaded=True) == LONGEST_PAUSE_SECONDS
