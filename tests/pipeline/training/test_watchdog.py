"""Who is named when a training stands still, and that a process of its own ends itself."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from pipeline.limits import count
from pipeline.training.watchdog import Limits, Mark, Phase, Pulse, judge

LIMITS = Limits(stall_seconds=60, stall_steps=10)
UPDATING = Mark("update", 400, seconds=61, step_seconds=1.0)

marks = st.builds(
    Mark,
    phase=st.sampled_from(get_args(Phase)),
    images_seen=st.integers(0, 3),
    seconds=st.floats(0, 1000),
    step_seconds=st.none() | st.floats(0, 50),
    waits=st.booleans(),
    silent_seconds=st.sampled_from([0.0, 1.0, 100.0]),
    over=st.booleans(),
)


def blamed(*marks: Mark) -> int | None:
    stalled = judge(dict(enumerate(marks)), LIMITS)
    return None if stalled is None else stalled.rank


def test_the_rank_that_is_least_far_is_the_one_the_others_wait_for() -> None:
    behind = replace(UPDATING, phase="batch", seconds=70)
    assert blamed(UPDATING, behind, UPDATING) == 1
    assert blamed(UPDATING, UPDATING, replace(UPDATING, images_seen=396)) == 2


def test_who_waits_in_a_collective_is_not_to_blame() -> None:
    assert blamed(replace(UPDATING, waits=True), UPDATING) == 1
    assert blamed(UPDATING, replace(UPDATING, waits=True)) == 0


def test_a_rank_that_is_not_heard_of_is_named_first() -> None:
    assert blamed(replace(UPDATING, phase="batch"), replace(UPDATING, silent_seconds=61)) == 1


def test_of_ranks_as_far_the_one_alive_longest_ago_is_named() -> None:
    assert blamed(UPDATING, replace(UPDATING, seconds=62), UPDATING) == 1


def test_who_registers_the_model_is_named_when_the_others_have_gone_home() -> None:
    """A rank whose work is over says so with its last report, and is not heard of any more."""
    registers = Mark("finish", 400, seconds=1300, step_seconds=1.0)
    gone = replace(registers, seconds=2000, silent_seconds=2000, over=True)
    assert blamed(registers, gone, gone) == 0
    assert blamed(replace(registers, seconds=1100), gone) is None
    assert blamed(registers, replace(gone, over=False)) == 1
    assert blamed(gone, gone) is None


def test_slow_updates_and_long_phases_get_their_time() -> None:
    assert blamed(replace(UPDATING, seconds=59)) is None
    assert blamed(replace(UPDATING, step_seconds=7.0)) is None
    assert blamed(replace(UPDATING, seconds=71, step_seconds=7.0)) == 0
    assert blamed(replace(UPDATING, phase="evaluate", seconds=299)) is None
    assert blamed(replace(UPDATING, phase="evaluate", seconds=301)) == 0
    assert blamed(replace(UPDATING, seconds=299, step_seconds=None)) is None


@given(st.lists(marks, min_size=1, max_size=6))
def test_a_training_that_moves_on_is_left_alone(found: list[Mark]) -> None:
    """Any rank that was alive a moment ago shows that none has hung for long."""
    assert blamed(*found, replace(UPDATING, seconds=1)) is None
    stalled = judge(dict(enumerate(found)), LIMITS)
    if stalled is not None:
        assert min(mark.seconds for mark in found if not mark.over) > 60
        assert stalled.mark == found[stalled.rank]
        assert not stalled.mark.over


def test_a_pulse_knows_the_median_update_and_when_it_was_last_alive() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    for moment in (10.0, 12.0, 14.0, 90.0):
        now[0] = moment
        pulse.mark("update", int(moment))
    now[0] = 95.0
    assert pulse.read() == Mark("update", 90, seconds=5.0, step_seconds=2.0)
    pulse.alive()
    assert pulse.read().seconds == 0
    assert not pulse.read().over
    pulse.over()
    assert pulse.read() == Mark("update", 90, step_seconds=2.0, over=True)


def test_waiting_for_a_store_that_falters_is_no_hanging() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    now[0] = 100.0
    assert pulse.read().seconds == 100
    count(retries=1)
    assert pulse.read().seconds == 0


HANGING = """
import sys, time
from pipeline.training.watchdog import Limits, Pulse, watched

def stuck_in_the_mud():
    time.sleep(100)

pulse = Pulse()
for images in (0, 4):
    pulse.mark("update", images)
with watched(pulse, Limits(0.1, 1), sys.argv[1], print):
    stuck_in_the_mud()
"""


def test_a_process_that_hangs_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "worker 0 hangs at 4 images in phase 'update'" in ended.stdout
    stacks = Path(tmp_path, "files", "stacks-000000000004-worker-0.txt").read_text()
    assert "stuck_in_the_mud" in stacks
    assert "stuck_in_the_mud" in ended.stderr
