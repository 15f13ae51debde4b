"""Workers and drivers of real trainings, killed at random moments."""

import random
import time

from tests.faults.injection import Tally
from tests.faults.training_runs import BATCH, Place, Training, TrainingRow, distance, kill

WORKER_SECONDS, NODE_SECONDS = 60, 90
"""Within these a training is to make updates again after the death of a worker, of a node."""
CHECKPOINT_UPDATES = 40


def settings(updates: int) -> tuple[str, ...]:
    """A training of so many small updates, with a checkpoint now and then."""
    return (
        f"train.total_images={updates * BATCH}",
        f"cadence.checkpoint_images={CHECKPOINT_UPDATES * BATCH}",
        f"cadence.log_images={CHECKPOINT_UPDATES * BATCH}",
        f"cadence.evaluate_images={updates * BATCH}",
    )


def moments(seed: int, kills: int, updates: int) -> list[int]:
    """Images seen at which to kill, at random, in order."""
    return sorted(update * BATCH for update in random.Random(seed).sample(range(1, updates - 1), kills))


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
    return _finish(
        tally, "L1", "SIGKILL of a worker at a random moment", whole, broken, recoveries, WORKER_SECONDS
    )


def drivers(place: Place) -> TrainingRow:
    """The driver killed, and the same command repeated at once, while its orphans still live."""
    kills, updates = (1, 200) if place.short else (10, 2000)
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
    return _finish(
        tally, "L3", "SIGKILL of the driver, then the same command", whole, broken, recoveries, NODE_SECONDS
    )


def _pair(place: Place, updates: int) -> tuple[Training, Training]:
    """An uninterrupted run that is over, and one of the same settings that is to be broken."""
    whole = Training(place, "whole", *settings(updates))
    whole.start()
    whole.finish()
    return whole, Training(place, "broken", *settings(updates))


def _finish(
    tally: Tally,
    id: str,
    fault: str,
    whole: Training,
    broken: Training,
    recoveries: list[float],
    limit: float,
) -> TrainingRow:
    """Wait for the end of the broken run, and compare it with the whole one."""
    broken.finish()
    history, apart = broken.history(), distance(whole.run_url, broken.run_url)
    late = sum(seconds > limit for seconds in recoveries)
    for holds, what in (
        (apart == 0, f"the final state differs by {apart:.2g} from that of an uninterrupted run"),
        (history.lost == history.repeated == 0, f"{history} in the history of the final weights"),
        (not late, f"{late} of {len(recoveries)} times it took more than {limit:.0f} s to train again"),
    ):
        if not holds:
            tally.survived = 0
            tally.broken.append(what)
    read = sum(len(rank.samples) for rank in broken.notes.ranks.values())
    needed = sum(len(rank.samples) for rank in whole.notes.read().ranks.values())
    measured = (
        f"final state {apart:g} from an uninterrupted run's; {len(broken.notes.starts())} launches, "
        f"{read / needed - 1:.0%} of the updates made again"
    )
    return TrainingRow(
        id, fault, tally.tried, tally.survived, measured, tuple(tally.broken), history, tuple(recoveries)
    )
