"""`nvae evaluate` on any number of workers: what each of them executes.

The validation split is cut into pieces of about 64 images, however many workers there are, and
worker r takes every W-th from the r-th on (models/assessment.py says why). It can be stopped
between two rounds of pieces, by all workers alike. Nothing is saved meanwhile: a lost worker
begins the evaluation anew.

Contiguous shares, as in training, were rejected: their batches begin elsewhere for another
number of workers, and kernels round differently then.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pipeline import sharded_quality, storage
from pipeline.data.index import VALIDATION, Index, load_index
from pipeline.data.loader import check_fits, evaluation_batches
from pipeline.data.verification import check_complete
from pipeline.models.assessment import Tally, comparable, unused_groups
from pipeline.models.evaluation import EvaluationError
from pipeline.models.export import LoadedModel, load_directory
from pipeline.training.worker import Worker

PIECE_IMAGES = 64
PROGRESS_SECONDS = 10.0
_STOPPED = {"state": "stopped", "reason": "an evaluation keeps nothing; start it again"}


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """What every worker executes, all alike.

    `arguments`: `model`, the folder of the weights, and the `manifest` that must be its; `data`, the
    data set; `draws`, `limit` (or None), `batch_size`, images times draws at once; `seed`; `quality`, what
    sharded_quality.measure is to be asked, or None. Answers with `state` "finished" and the figures, or
    "stopped". Raises EvaluationError if there is no image.
    """
    loaded = load_directory(arguments["model"], None, arguments["manifest"])
    config = loaded.config
    storage.configure(config.storage)
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": arguments["data"]})})
    index = load_index(arguments["data"])
    check_fits(config, index)
    check_complete(index, (VALIDATION,), cut_is_corrupt=config.data.on_corrupt == "skip")
    there, limit = index.num_samples(VALIDATION), arguments["limit"]
    count = there if limit is None else min(limit, there)
    loaded = LoadedModel(loaded.model, config, loaded.manifest, loaded.ref)
    tally = _tallied(loaded, index, count, arguments, worker)
    if tally is None:
        return dict(_STOPPED)
    if not tally.images:
        raise EvaluationError(
            f"{storage.shown(arguments['data'])}: the validation split has no readable image; build the data "
            "set with --validation-fraction, or check it with `nvae shards verify`."
        )
    quality = (
        sharded_quality.measure(loaded, index, arguments["quality"], worker) if arguments["quality"] else {}
    )
    if quality is None:
        return dict(_STOPPED)
    draws = arguments["draws"]
    scores = tally.scores(draws)
    return {
        "state": "finished",
        "scores": scores,
        "unused_groups": unused_groups(scores),
        "comparable": comparable(config.model, draws),
        "draws": draws,
        "seed": arguments["seed"],
        "data_hash": index.content_hash,
        **({"sample_quality": quality} if quality else {}),
    }


def _tallied(
    loaded: LoadedModel, index: Index, count: int, arguments: Mapping[str, Any], worker: Worker
) -> Tally | None:
    """The sums of all workers; None if they were asked to stop."""
    loaded.model.to(worker.device)
    batch_size = arguments["batch_size"]
    pieces = -(-count // PIECE_IMAGES)
    tally, said = Tally(loaded.config.model, count, pieces, worker.device), time.monotonic()
    for first in range(0, pieces, worker.world_size):
        if worker.stop_requested():
            return None
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            worker.say(f"Evaluated {first * count // pieces:,} of {count:,} images")
        piece = first + worker.rank
        if piece < pieces:
            batches = evaluation_batches(
                loaded.config, index, rank=piece, world_size=pieces, limit=count, batch_size=batch_size
            )
            with closing(batches):
                tally.add(
                    loaded.model, piece, batches, arguments["draws"], rows=batch_size, seed=arguments["seed"]
                )
    return tally.merged(worker)
