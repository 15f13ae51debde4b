"""Workers and drivers of real trainings, killed at random moments."""

import random
import time

from tests.faults.injection import Tally
from tests.faults.training_runs import (
    BATCH,
    Place,
    Training,
    TrainingRow,
    distance,
    kill,
    small_updates,
)

WORKER_SECONDS, NODE_SECONDS = 60, 90
"""Within these a training is to make updates again after the death of a worker, of a node."""


def moments(seed: int, kills: int, updates: int) -> list[int]:
    """Images seen at which to kill, at random, in order; before orphans could make the last updates."""
    among = range(1, updates * 19 // 20)
    return sorted(update * BATCH for update in random.Random(seed).sample(among, kills))


def workers(place: Place) -> TrainingRow:
    """One of two workers killed, many times in one run that nobody touches."""
    kills, updates = (2, 200) if place.short else (20, 2000)
    whole, broken = _pair(place, updates)
    chance, tally, recoveries = random.Random(place.seed), Tally(), []
    broken.start()
    for images in moments(place.seed, kills, updates):
        with tally.attempt(f"a worker killed at {images} images"):
            broken.wait_for_images(images)
            victim = chance.choice(broken.notes.newest())
            moment = time.monotonic()
            kill(victim.pid)
            recoveries.append(broken.wait_for_update(moment, victim.launch))
    broken.finish()
    return judged(
        tally, "L1", "SIGKILL of a worker at a random moment", broken, recoveries, WORKER_SECONDS, whole
    )


def drivers(place: Place) -> TrainingRow:
    """The driver killed, and the same command repeated at once, while its orphans still live."""
    kills, updates = (1, 200) if place.short else (10, 1000)
    whole, broken = _pair(place, updates)
    tally, recoveries = Tally(), []
    broken.start()
    for images in moments(place.seed, kills, updates):
        with tally.attempt(f"the driver killed at {images} images"):
            broken.wait_for_images(images)
            (launch,) = {rank.launch for rank in broken.notes.newest()}
            moment = broken.kill_driver()
            broken.start()
            recoveries.append(broken.wait_for_update(moment, launch))
    broken.finish()
    return judged(
        tally, "L3", "SIGKILL of the driver, then the same command", broken, recoveries, NODE_SECONDS, whole
    )


def _pair(place: Place, updates: int) -> tuple[Training, Training]:
    """An uninterrupted run that is over, and one of the same settings that is to be broken."""
    whole = Training(place, "whole", *small_updates(updates))
    whole.start()
    whole.finish()
    return whole, Training(place, "broken", *small_updates(updates))


def judged(
    tally: Tally,
    id: str,
    fault: str,
    broken: Training,
    recoveries: list[float],
    limit: float,
    whole: Training | None = None,
) -> TrainingRow:
    """What became of a broken run that is over, beside the plan and beside a whole one."""
    history = broken.history()
    late = sum(seconds > limit for seconds in recoveries)
    checks = [
        (history.lost == history.repeated == 0, f"{history} in the history of the final weights"),
        (not late, f"{late} of {len(recoveries)} times it took more than {limit:.0f} s to train again"),
    ]
    handed_out = sum(
        len(rank.samples) * BATCH / rank.world_size for rank in broken.notes.ranks.values() if rank.pid
    )
    again = handed_out / (broken.stopped_at or broken.config.train.total_images) - 1
    measured = f"{len(broken.notes.starts())} launches, {again:.0%} of the updates made again"
    if whole is not None:
        apart = distance(whole.run_url, broken.run_url)
        measured = f"final state {apart:g} from an uninterrupted run's; {measured}"
        checks.append((apart == 0, f"the final state is {apart:.2g} from that of an uninterrupted run"))
    failed = [what for holds, what in checks if not holds]
    survived = 0 if failed else tally.survived
    return TrainingRow(
        id, fault, tally.tried, survived, measured, (*tally.broken, *failed), history, tuple(recoveries)
    )
