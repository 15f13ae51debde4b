"""A training whose number of workers changes: nodes are killed and come back, or users want it so."""

import random
import time
from itertools import groupby

from tests.cluster.processes import Nodes, kill, nodes
from tests.faults.injection import Tally
from tests.faults.training_kills import NODE_SECONDS, judged, moments
from tests.faults.training_runs import BATCH, Place, Training, TrainingRow, small_updates

WIDTHS = (2, 1, 4, 2)
SECONDS_BETWEEN_KILLS = 900.0
"""At most: the longest part of the training that nobody touches takes some minutes."""


def raylets(place: Place) -> TrainingRow:
    """The raylet of a random node killed; once training goes on, another node joins."""
    kills, updates = (1, 200) if place.short else (10, 3000)
    chance, tally, recoveries = random.Random(place.seed), Tally(), []
    broken = Training(place, "broken", *small_updates(updates), workers="1:2")
    with nodes(1, 1) as cluster:
        broken.start(RAY_ADDRESS=cluster.address)
        alive = [0, 1]
        for images in moments(place.seed, kills, updates):
            with tally.attempt(f"a node killed at {images} images"):
                broken.wait_for_images(images, SECONDS_BETWEEN_KILLS)
                busy = [number for number in alive if cluster.workers(number)]
                victim = chance.choice(busy)
                recoveries.append(_kill_node(cluster, victim, broken))
                alive.remove(victim)
                cluster.add()
                alive.append(len(cluster) - 1)
        broken.finish()
    row = judged(tally, "L2", "SIGKILL of a raylet, later another joins", broken, recoveries, NODE_SECONDS)
    return row.with_more(f"workers: {_changes(broken)}")


def _kill_node(cluster: Nodes, victim: int, broken: Training) -> float:
    """Seconds until a later launch has made an update."""
    workers = cluster.workers(victim)
    (launch,) = {rank.launch for rank in broken.notes.newest()}
    moment = time.monotonic()
    cluster.kill(victim)
    # A machine that fails takes everything along; here the workers would outlive their raylet a little.
    kill(*workers)
    return broken.wait_for_update(moment, launch)


def widths(place: Place) -> TrainingRow:
    """The driver killed, and the same command repeated with another number of workers."""
    planned = WIDTHS[:2] if place.short else WIDTHS
    updates = 100 * len(planned)
    tally, recoveries = Tally(), []
    broken = Training(place, "broken", *small_updates(updates))
    broken.start("--workers", str(planned[0]))
    for images, workers in zip(moments(place.seed, len(planned) - 1, updates), planned[1:], strict=True):
        with tally.attempt(f"{workers} workers from {images} images on"):
            broken.wait_for_images(images)
            (launch,) = {rank.launch for rank in broken.notes.newest()}
            moment = broken.kill_driver()
            broken.start("--workers", str(workers))
            recoveries.append(broken.wait_for_update(moment, launch))
            assert broken.notes.newest()[0].world_size == workers
    broken.finish()
    row = judged(tally, "L6", "another number of workers", broken, recoveries, NODE_SECONDS)
    return row.with_more(f"workers: {_changes(broken)}; batches of {BATCH} throughout")


def _changes(training: Training) -> str:
    """`2 -> 1 -> 2`: the numbers of workers one after the other."""
    return " -> ".join(str(width) for width, _ in groupby(training.notes.widths()))
