"""Numbers that are none, put into a running training at chosen updates, and what it did about them."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.training.checkpoint import newest
from pipeline.training.interventions import Intervention, Kind, from_record
from pipeline.training.worker import Worker
from tests.faults.injection import Tally
from tests.faults.training_runs import BATCH, Place, Training, TrainingRow, small_updates, weights
from tests.injecting import (
    Injecting,
    break_gradient,
    break_image,
    break_loss,
    break_statistic,
    break_weight,
)

PLAN = "poison.json"
"""In the folder of a training's notes: [images seen before the update, kind] of each injection."""
APART_UPDATES = 150
"""Between two injections, so that each is answered by itself and none uses up another's budget."""
ANSWER_UPDATES = 20
"""Within these a training is to make updates again."""


def on_last_rank(act: Callable[[Injecting], object]) -> Callable[[Injecting], object]:
    """The other ranks have to hear of it from that one."""
    return lambda at: act(at) if at.rank == at.world_size - 1 else None


KINDS: dict[str, Callable[[Injecting], object]] = {
    "the loss of every rank": break_loss,
    "the loss of one rank": on_last_rank(break_loss),
    "an image of one rank": on_last_rank(break_image),
    "a gradient of one rank": on_last_rank(break_gradient),
    "a batch-norm variance of one rank": on_last_rank(break_statistic),
    "a weight of one rank, for good": on_last_rank(break_weight),
}


def poisoned(worker: Worker, notes: Path) -> Worker:
    """The worker, with the injections that the folder's plan holds, if it holds one."""
    plan = notes / PLAN
    if not plan.exists():
        return worker
    return Injecting(worker, {images: KINDS[kind] for images, kind in json.loads(plan.read_text())})


def nans(place: Place) -> TrainingRow:
    """Each kind a few times in one training of two workers, in random order."""
    kinds = [*KINDS] * (1 if place.short else 4)
    random.Random(place.seed).shuffle(kinds)
    injections = [((number + 1) * APART_UPDATES * BATCH, kind) for number, kind in enumerate(kinds)]
    training = Training(place, "poisoned", *small_updates((len(kinds) + 1) * APART_UPDATES))
    (training.folder / PLAN).write_text(json.dumps(injections))
    training.start()
    training.finish(seconds=1800)

    tally, last = Tally(), newest(training.run_url)
    assert last is not None
    done = from_record(last.record["interventions"])
    for images, kind in injections:
        with tally.attempt(f"{kind} at {images} images"):
            _check_answer(images, done)
    history = training.history()
    with tally.attempt("the end"):
        assert all(torch.isfinite(value).all() for value in weights(training.run_url).values())
        assert (history.lost, history.repeated) == (0, 0), history
    counts = Counter(each.kind for each in done)
    forgotten = sum(each.images_seen - each.back_to for each in done if each.back_to is not None) // BATCH
    measured = (
        f"{len(KINDS)} kinds; {counts[Kind.SKIP]} updates skipped, {counts[Kind.ROLL_BACK]} rollbacks, "
        f"which forgot {forgotten} updates; nothing else was done, and every weight is finite"
    )
    return TrainingRow(
        "N1", "nan or inf", tally.tried, tally.survived, measured, tuple(tally.broken), history
    )


def _check_answer(images: int, done: list[Intervention]) -> None:
    """The update was not made, and soon others were; nothing harder than a rollback was needed."""
    answers = [each for each in done if images < each.images_seen <= images + APART_UPDATES * BATCH]
    assert answers, "nobody noticed"
    assert answers[0].images_seen == images + BATCH, f"noticed only at {answers[0].images_seen} images"
    assert {each.kind for each in answers} <= {Kind.SKIP, Kind.ROLL_BACK}, str(answers)
    assert answers[-1].images_seen <= images + ANSWER_UPDATES * BATCH, f"went on to {answers[-1]}"
