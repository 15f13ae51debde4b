"""The model on the validation split, during a training and at its end; pictures of it.

An evaluation may take hours. It can be stopped between two batches, by all ranks alike.
"""

import time
from collections.abc import Generator
from contextlib import closing

from nvae.model import NVAE
from pipeline.data.index import VALIDATION
from pipeline.data.loader import Batch, evaluation_batches
from pipeline.models.evaluation import evaluate
from pipeline.models.sampling import grid, png, reconstruct, sample_images
from pipeline.progress import evaluation_line
from pipeline.training.state import Training, TrainState

RECONSTRUCTIONS = 8
PROGRESS_SECONDS = 10.0
"""Between two lines of a long evaluation."""


class StoppedError(Exception):
    """The run was asked to stop while it was evaluated."""


def evaluate_and_show(training: Training, state: TrainState) -> dict[str, float]:
    """Scores of the averaged model on the validation split; rank 0 also draws pictures.

    Raises StoppedError, on all ranks alike.
    """
    config, worker = training.config, training.worker
    if not training.data.num_samples(VALIDATION):
        return {}
    batches = validation_batches(training, limit=config.evaluation.images)
    scores = evaluate(state.averaged, config, batches, worker)
    training.tracker.log(scores, at=state.images_seen)
    worker.say(evaluation_line(scores, state.images_seen))
    if worker.rank == 0:
        draw_pictures(training, state.averaged, at=state.images_seen)
    worker.barrier()
    return scores


def validation_batches(training: Training, limit: int | None = None) -> Generator[Batch, None, None]:
    """This rank's share of the validation split, or of its first `limit` images.

    Raises StoppedError between two batches, on all ranks alike.
    """
    batch_size = training.config.evaluation.batch_size
    batches = evaluation_batches(
        training.config,
        training.data,
        rank=training.worker.rank,
        world_size=training.worker.world_size,
        limit=limit,
        batch_size=batch_size,
    )
    count = training.data.num_samples(VALIDATION)
    return _stoppable(batches, training, count if limit is None else min(limit, count), batch_size)


def _stoppable(
    batches: Generator[Batch, None, None], training: Training, count: int, batch_size: int
) -> Generator[Batch, None, None]:
    """The batches, with a line every few seconds.

    With a thousand importance samples a batch takes minutes. Asking whether to stop is a
    meeting of all ranks, so that each asks equally often, however many batches it has.
    """
    worker = training.worker
    per_round = worker.world_size * batch_size
    said = time.monotonic()
    with closing(batches):
        for number in range(-(-count // per_round)):
            if worker.stop_requested():
                raise StoppedError
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                worker.say(f"Evaluated {number * per_round:,} of {count:,} images")
            batch = next(batches, None)
            if batch is not None:
                yield batch


def draw_pictures(training: Training, model: NVAE, at: int) -> list[str]:
    """Samples from the prior, and originals each beside its reconstruction; rank 0 alone.

    Returns where they are, below the run's folder.
    """
    config = training.config
    samples = sample_images(model, config.sampling.count, config.sampling.temperature, config.train.seed)
    with closing(
        evaluation_batches(
            config, training.data, rank=0, world_size=1, limit=RECONSTRUCTIONS, batch_size=RECONSTRUCTIONS
        )
    ) as originals:
        pairs = reconstruct(model, next(originals).images, config.train.seed)
    return [
        training.tracker.picture("samples", png(grid(samples)), at),
        training.tracker.picture("reconstructions", png(grid(pairs, columns=4)), at),
    ]
