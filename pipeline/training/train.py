"""The training loop: the one file that knows the order of a run.

Read it first. Everything it calls by name is a spoke that knows nothing of the others:
batches (data/loader.py), the update (nvae/step.py), schedules, metrics, checkpoints and
tracking. There are no callbacks and no hooks, because a few calls in plain sight read
better than as many registered somewhere else.

Progress is one integer, `images_seen`. All ranks run this same code and take every
decision by values that are the same on all of them, so none waits for another in vain.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nvae.model import NVAE
from nvae.step import StepSettings, make_ema, make_optimizer, step_noise, update
from pipeline import config_file
from pipeline.config import CadenceConfig, RunConfig
from pipeline.data.index import VALIDATION, Index
from pipeline.data.loader import Batch, evaluation_batches, training_batches
from pipeline.models.evaluation import evaluate
from pipeline.models.sampling import grid, png, reconstruct, sample_images
from pipeline.progress import evaluation_line, training_line
from pipeline.training.checkpoint import BEST_METRIC, Checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.metrics import Metrics
from pipeline.training.optimizer_state import flatten_optimizer, restore_optimizer
from pipeline.training.schedules import schedule
from pipeline.training.tracking import Tracker
from pipeline.training.worker import Worker

RECONSTRUCTIONS = 8


class DivergedError(RuntimeError):
    """No update since the last log line had a finite loss and gradient."""


@dataclass
class TrainState:
    """Everything that a checkpoint holds, on this rank's device."""

    model: NVAE
    ema: AveragedModel
    optimizer: Optimizer
    images_seen: int = 0
    best: float = math.inf
    """Lowest validation bits/dim so far; kept by every rank, since it decides what all do."""

    @classmethod
    def create(
        cls, config: RunConfig, worker: Worker, resume: Checkpoint | None, initial: NVAE | None
    ) -> "TrainState":
        """A fresh model, one that begins with the weights of `initial`, or a resumed one."""
        torch.manual_seed(config.train.seed)
        model = NVAE(config.model)
        if initial is not None:
            model.load_state_dict(initial.state_dict())
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        model.to(worker.device)
        state = cls(
            model,
            make_ema(model, config.optimizer.ema_decay),
            make_optimizer(model, config.optimizer.weight_decay),
        )
        if resume is not None:
            state.restore(resume)
        return state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `tensors` gave."""
        self.model.load_state_dict(checkpoint.load("model"))
        self.averaged.load_state_dict(checkpoint.load("ema"))
        restore_optimizer(self.optimizer, self.model, checkpoint.load("optimizer"))
        self.ema.n_averaged.fill_(checkpoint.record["updates"])
        self.images_seen = checkpoint.images_seen
        self.best = math.inf if checkpoint.record["best"] is None else checkpoint.record["best"]

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The files of a checkpoint, by name."""
        return {
            "model": self.model.state_dict(),
            "ema": self.averaged.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer, self.model),
        }

    @property
    def averaged(self) -> NVAE:
        """The model with averaged weights: the one that is evaluated, sampled, registered."""
        assert isinstance(self.ema.module, NVAE)
        return self.ema.module


class Cadence:
    """Says what falls due: at each multiple of its interval, and everything at the last image."""

    def __init__(self, config: CadenceConfig, total_images: int, images_seen: int) -> None:
        self._config, self._total = config, total_images
        self._before = self._now = images_seen

    def advance(self, images_seen: int) -> None:
        self._before, self._now = self._now, images_seen

    @property
    def at_the_end(self) -> bool:
        return self._now >= self._total

    def due(self, what: Literal["log", "evaluate", "checkpoint"]) -> bool:
        interval: int = getattr(self._config, f"{what}_images")
        return self._now // interval > self._before // interval or self.at_the_end


@dataclass(frozen=True)
class Training:
    """What surrounds the state: where it trains, on what, and who writes things down."""

    config: RunConfig
    data: Index
    worker: Worker
    tracker: Tracker
    checkpoints: CheckpointWriter | None
    """Rank 0's writer; None on the other ranks."""


def train(
    training: Training, resume: Checkpoint | None = None, initial: NVAE | None = None
) -> Literal["finished", "stopped"]:
    """Train one NVAE for `train.total_images`, continuing from `resume` if there is one.

    Returns when the last image was seen, or after a checkpoint when the run was asked to
    stop. Raises DivergedError, on all ranks alike.
    """
    config, worker, tracker = training.config, training.worker, training.tracker
    total = config.train.total_images
    state = TrainState.create(config, worker, resume, initial)
    model = worker.wrap(state.model)
    metrics = Metrics(worker, config.model)
    cadence = Cadence(config.cadence, total, state.images_seen)

    batches = training_batches(
        config,
        training.data,
        rank=worker.rank,
        world_size=worker.world_size,
        start=state.images_seen,
        stop=whole_batches(total, config.train.batch_size, state.images_seen),
    )
    # Closed however the loop is left, for the batches that are made ahead have threads.
    with closing(batches):
        for batch in batches:
            worker.mark("update", state.images_seen)
            step(training, state, model, batch, metrics)
            cadence.advance(state.images_seen)
            scores: dict[str, float] = {}
            stopping = False

            if cadence.due("log"):
                worker.mark("log", state.images_seen)
                numbers = metrics.reduce()
                tracker.log(numbers, at=state.images_seen)
                worker.say(training_line(numbers, state.images_seen, total))
                refuse_divergence(numbers, state.images_seen)
                stopping = worker.stop_requested() and not cadence.at_the_end
            with metrics.paused():
                if cadence.due("evaluate"):
                    worker.mark("evaluate", state.images_seen)
                    scores = evaluate_and_show(training, state)
                improved = scores.get(BEST_METRIC, math.inf) < state.best
                if improved:
                    state.best = scores[BEST_METRIC]
                if cadence.due("checkpoint") or stopping or improved:
                    worker.mark("checkpoint", state.images_seen)
                    save(training, state, scores)
            if stopping:
                return "stopped"
            worker.mark("batch", state.images_seen)
    return "finished"


def whole_batches(total_images: int, batch_size: int, images_seen: int) -> int:
    """Where the training ends: `total_images`, rounded up so that the last batch is a whole one.

    The share of every rank is then the same in every update, and so is its number of
    micro-batches, each of which is a meeting of all ranks.
    """
    return images_seen + -(-(total_images - images_seen) // batch_size) * batch_size


def step(training: Training, state: TrainState, model: nn.Module, batch: Batch, metrics: Metrics) -> None:
    """One update of the weights by one global batch."""
    config, worker = training.config, training.worker
    coefficients = schedule(config, state.images_seen, epoch_images=training.data.num_samples("train"))
    result = update(
        model,
        state.optimizer,
        batch.images.to(worker.device, non_blocking=True),
        coefficients,
        step_settings(config, len(batch.images)),
        noise=step_noise(config.train.seed, state.images_seen, worker.rank, worker.device),
        flip=batch.flip.to(worker.device, non_blocking=True),
        weights=batch.weights.to(worker.device, non_blocking=True),
        ema=state.ema,
    )
    metrics.add(
        result,
        coefficients,
        batch.wait_seconds,
        corrupt_samples=batch.corrupt_samples,
        transferred_bytes=batch.transferred_bytes,
        cached_bytes=batch.cached_bytes,
    )
    state.images_seen += batch.global_size


def step_settings(config: RunConfig, images: int) -> StepSettings:
    """How a rank with `images` images of the batch makes its updates."""
    micro_batch = config.train.micro_batch_size or images
    return StepSettings(
        precision=config.train.precision,
        micro_batches=-(-images // micro_batch),
        kl_balancing=config.objective.kl_balancing,
        gradient_clip_norm=config.optimizer.gradient_clip_norm,
    )


def refuse_divergence(numbers: Mapping[str, float], images_seen: int) -> None:
    """Raise DivergedError if not one of the updates behind `numbers` was finite."""
    if numbers["train/skipped_fraction"] == 1.0:
        raise DivergedError(
            f"no update before {images_seen:,} images had a finite loss and gradient; every one was "
            "skipped. The last checkpoint is from before. Raise objective.spectral_coefficient or lower "
            "optimizer.learning_rate in a new run."
        )


def evaluate_and_show(training: Training, state: TrainState) -> dict[str, float]:
    """Scores of the averaged model on the validation split; rank 0 also draws pictures."""
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
    """This rank's share of the validation split, or of its first `limit` images."""
    return evaluation_batches(
        training.config,
        training.data,
        rank=training.worker.rank,
        world_size=training.worker.world_size,
        limit=limit,
        batch_size=training.config.evaluation.batch_size,
    )


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


def save(training: Training, state: TrainState, scores: Mapping[str, float]) -> None:
    """Write a checkpoint in the background; all ranks tell whoever started them."""
    if training.checkpoints is not None:
        record = {
            "config": config_file.to_mapping(config_file.without_secrets(training.config)),
            "data_hash": training.data.content_hash,
            "updates": int(state.ema.n_averaged),
            "best": state.best if math.isfinite(state.best) else None,
        }
        training.checkpoints.save(state.tensors(), record, state.images_seen, scores)
    training.worker.report({"images_seen": state.images_seen, **scores})
