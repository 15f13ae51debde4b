"""Which checkpoint becomes the run's model.

After a training that ended well it is the one that was measured best. After one that diverged it
is the last that is known to be good, from before the trouble: a low score of weights that were
going wrong already says nothing. Neither is taken if it does not evaluate to numbers.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nvae.model import NVAE
from pipeline.artifacts import ArtifactError
from pipeline.data.index import VALIDATION
from pipeline.models.evaluation import evaluate
from pipeline.models.export import load_directory
from pipeline.progress import evaluation_line
from pipeline.training.checkpoint import BEST_METRIC, Checkpoint, Wanted, checkpoints
from pipeline.training.recovery import agreed
from pipeline.training.state import Training
from pipeline.training.validation import validation_batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """A checkpoint, the model in it, and its scores on the whole validation split, if there is one."""

    checkpoint: Checkpoint
    model: NVAE
    scores: Mapping[str, float]


def select(training: Training, run_url: str, good: Wanted | None = None) -> Selected | None:
    """The first of `candidates` that evaluates to numbers; None if not one does. Collective.

    `good` is what divergence left, None if there was none. Raises StoppedError if the run is
    asked to stop, on all ranks alike.
    """
    worker = training.worker
    ordered = candidates(run_url, good)
    what = "best" if good is None else "last good"
    while (checkpoint := agreed(lambda: next(ordered, None), run_url, worker)) is not None:
        model, scores = load_directory(checkpoint.url).model, {}
        if training.data.num_samples(VALIDATION):
            worker.say(f"Evaluating the {what} checkpoint on the whole validation split ...")
            samples = training.config.evaluation.importance_samples
            batches = validation_batches(training)
            scores = evaluate(model.to(worker.device), training.config, batches, worker, samples)
            line = evaluation_line(scores, checkpoint.images_seen)
            worker.say(f"{what.capitalize()} checkpoint, whole split: {line}")
        if all(math.isfinite(score) for score in scores.values()):
            return Selected(checkpoint, model, scores)
        worker.say(f"The checkpoint at {checkpoint.images_seen:,} images does not evaluate to numbers.")
    return None


def candidates(run_url: str, good: Wanted | None = None) -> Iterator[Checkpoint]:
    """The intact checkpoints that may become the run's model, in the order in which to try them.

    The best measured one first, then those that were not measured; the newest of equals. After
    divergence only sound ones of weights that were trained at all, first those that `good` takes.
    """
    found = checkpoints(run_url)
    if good is None:
        found.sort(key=lambda each: (_bits(each), not each.sound))
    else:
        found = [each for each in found if each.sound and each.record["updates"]]
        found.sort(key=lambda each: not good.takes(each.images_seen, sound=True))
    for checkpoint in found:
        try:
            checkpoint.verify()
        except ArtifactError as error:
            logger.warning("checkpoint passed over: %s", error)
        else:
            yield checkpoint


def _bits(checkpoint: Checkpoint) -> float:
    bits = checkpoint.metrics.get(BEST_METRIC)
    return math.inf if bits is None else bits
