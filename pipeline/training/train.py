"""The training loop: the one file that knows the order of a run.

Read it first. Everything it calls by name is a spoke that knows nothing of the others:
batches (data/loader.py), the update (nvae/step.py), schedules, the verdict on an update
(stability.py) and what it leads to (recovery.py), metrics, checkpoints and tracking. There are
no callbacks and no hooks, because a few calls in plain sight read better than as many
registered somewhere else.

Progress is one integer, `images_seen`; it never goes back, not even when the weights do. All
ranks run this same code and take every decision by values that are the same on all of them, so
none waits for another in vain. They agree once per update, inside it: whether it may be made,
and whether any of them was asked to stop.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from nvae.health import Reading
from nvae.noise import image_noise
from nvae.step import StepResult, StepSettings, update
from pipeline.config import CadenceConfig, RunConfig
from pipeline.data.loader import Batch, training_batches
from pipeline.progress import training_line
from pipeline.training.checkpoint import BEST_METRIC, Checkpoint, Wanted
from pipeline.training.interventions import ROLLBACKS, Kind, budget_images, left_behind, rollbacks
from pipeline.training.machine import Machine, folders
from pipeline.training.metrics import Metrics
from pipeline.training.profiling import Profiling
from pipeline.training.recovery import DivergedError, intervene
from pipeline.training.schedules import schedule
from pipeline.training.stability import judge, limits, scores
from pipeline.training.state import Training, TrainState
from pipeline.training.validation import StoppedError, evaluate_and_show

logger = logging.getLogger(__name__)


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


def train(training: Training, resume: Checkpoint | None = None) -> Literal["finished", "stopped"]:
    """Train one NVAE for `train.total_images`, continuing from `resume` if there is one.

    Returns when the last image was seen, or after a checkpoint when the run was asked to
    stop. Raises DivergedError, on all ranks alike.
    """
    config, worker = training.config, training.worker
    total = config.train.total_images
    state = TrainState.create(config, worker, resume, None if resume else training.initial())
    model = worker.wrap(state.model)
    machine = Machine(worker.device, folders(training.url, config.data.cache_folder))
    metrics = Metrics(worker, config.model, machine)
    profiling = Profiling(config.train.profile_at_images, worker, training.tracker, state.images_seen)
    cadence = Cadence(config.cadence, total, state.images_seen)
    if state.evaluation_due and look_and_save(training, state, cadence) == "stopped":
        return "stopped"

    batches = training_batches(
        config,
        training.data,
        rank=worker.rank,
        world_size=worker.world_size,
        start=state.images_seen,
        stop=whole_batches(total, config.train.batch_size, state.images_seen),
    )
    # Closed however the loop is left, for the batches that are made ahead have threads.
    with closing(batches), machine, profiling:
        for batch in batches:
            with metrics.paused():
                profiling.before_update(state.images_seen)
            worker.mark("update", state.images_seen)
            result = step(training, state, model, batch, metrics)
            kind = respond(training, state, result.reading, batch)
            cadence.advance(state.images_seen)
            if cadence.due("log"):
                worker.mark("log", state.images_seen)
                log(training, state, metrics)
            state.evaluation_due |= cadence.due("evaluate")
            state.checkpoint_due |= cadence.due("checkpoint")
            stopping = result.reading.votes[0] > 0 and not cadence.at_the_end
            with metrics.paused():
                # Saved at once, so that a crash does not lead back to before the rollback.
                came_back = kind in ROLLBACKS
                if look_and_save(training, state, cadence, stopping, came_back) == "stopped":
                    return "stopped"
            worker.mark("batch", state.images_seen)
    return "finished"


def whole_batches(total_images: int, batch_size: int, images_seen: int) -> int:
    """Where the training ends: `total_images`, rounded up so that the last batch is a whole one.

    The share of every rank is then the same in every update, and so is its number of
    micro-batches, each of which is a meeting of all ranks.
    """
    return images_seen + -(-(total_images - images_seen) // batch_size) * batch_size


def step(
    training: Training, state: TrainState, model: nn.Module, batch: Batch, metrics: Metrics
) -> StepResult:
    """One update of the weights by one global batch, if it is sound."""
    config, worker = training.config, training.worker
    coefficients = schedule(
        config,
        state.images_seen,
        epoch_images=training.data.num_samples("train"),
        interventions=state.interventions,
    )
    with metrics.timed():
        result = update(
            model,
            state.optimizer,
            batch.images.to(worker.device, non_blocking=True),
            coefficients,
            step_settings(config, len(batch.images)),
            noise=image_noise(
                batch.positions.tolist(),
                config.model,
                worker.device,
                seed=config.train.seed,
                rollbacks=rollbacks(state.counts),
            ),
            flip=batch.flip.to(worker.device, non_blocking=True),
            weights=batch.weights.to(worker.device, non_blocking=True),
            ema=state.ema,
            limits=limits(config.stability, state.condition),
            # So that a stop takes effect after the very update, on all ranks, whoever heard of it.
            ballot=[float(worker.stop_wanted())],
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
    return result


def respond(training: Training, state: TrainState, reading: Reading, batch: Batch) -> Kind | None:
    """Judge the update that was, or was not, made with `batch`, and do what that asks for.

    Returns what was done against divergence; None where all is well.
    """
    config = training.config
    state.note_scores(scores(state.condition, reading))
    verdict = judge(
        config.stability,
        state.condition,
        reading,
        images_seen=state.images_seen - batch.global_size,
        span_images=budget_images(config),
        interventions=state.interventions,
    )
    state.condition = verdict.condition
    if verdict.kind is not None:
        used = zip(batch.keys, batch.weights.tolist(), strict=True)
        intervene(training, state, verdict, [key for key, weight in used if weight > 0])
    return verdict.kind


def step_settings(config: RunConfig, images: int) -> StepSettings:
    """How a rank with `images` images of the batch makes its updates."""
    micro_batch = config.train.micro_batch_size or images
    return StepSettings(
        precision=config.train.precision,
        micro_batches=-(-images // micro_batch),
        kl_balancing=config.objective.kl_balancing,
        gradient_clip_norm=config.optimizer.gradient_clip_norm,
    )


def log(training: Training, state: TrainState, metrics: Metrics) -> None:
    """Note and show the numbers since the log line before."""
    config = training.config
    numbers = metrics.reduce() | state.highest_scores()
    largest = state.model.spectral.largest()
    if not math.isnan(largest):
        numbers["train/largest_singular_value"] = largest
    if training.checkpoints is not None:
        numbers |= training.checkpoints.metrics(state.images_seen)
    training.tracker.log(numbers, at=state.images_seen)
    training.worker.say(training_line(numbers, state.images_seen, config.train.total_images))
    if not config.stability.enabled:
        refuse_divergence(numbers, state.images_seen)


def refuse_divergence(numbers: Mapping[str, float], images_seen: int) -> None:
    """Raise DivergedError if not one of the updates behind `numbers` was finite."""
    if numbers["train/skipped_fraction"] == 1.0:
        raise DivergedError(
            f"no update before {images_seen:,} images had a finite loss and gradient; every one was "
            "skipped. The last checkpoint is from before. Raise objective.spectral_coefficient or lower "
            "optimizer.learning_rate in a new run, or set stability.enabled=true.",
            Wanted(sound=True),
        )


def look_and_save(
    training: Training, state: TrainState, cadence: Cadence, stopping: bool = False, urgent: bool = False
) -> Literal["stopped"] | None:
    """Evaluate if that is due, save if there is reason to; "stopped" if the run was asked to stop.

    What is due amid an episode of trouble waits for its end: weights of unknown health are saved
    only when the run leaves them. `urgent` is a save that may not be left out.
    """
    found: dict[str, float] = {}
    calm = state.condition.onset is None
    if state.evaluation_due and (calm or cadence.at_the_end) and not stopping:
        training.worker.mark("evaluate", state.images_seen)
        try:
            found = evaluate_and_show(training, state)
            state.evaluation_due = False
            training.worker.report({"images_seen": state.images_seen, **found})
        except StoppedError:
            # It is made anew when the run continues.
            stopping = True
    finite = all(math.isfinite(score) for score in found.values())
    if not finite:
        suspect(training, state)
    bits = found.get(BEST_METRIC, math.inf) if finite else math.inf
    if bits < math.inf:
        state.best = best_saved(training, state)
    urgent = urgent or stopping or cadence.at_the_end or (calm and bits < state.best)
    if urgent or (calm and state.checkpoint_due):
        training.worker.mark("checkpoint", state.images_seen)
        state.best = min(state.best, bits)
        state.checkpoint_due = False
        save(training, state, found, sound=calm and finite, may_be_left_out=not urgent)
    return "stopped" if stopping else None


def best_saved(training: Training, state: TrainState) -> float:
    """Lowest bits/dim of a checkpoint that is in the store or on its way there. Collective.

    A better one that did not get there is none to be measured against: nobody could register it.
    """
    worker, writer = training.worker, training.checkpoints
    best = 0.0
    if worker.rank == 0:
        best = state.best if writer is None else writer.best_value
    return float(worker.all_reduce(torch.tensor(best, dtype=torch.float64, device=worker.device)))


def suspect(training: Training, state: TrainState) -> None:
    """Weights that do not evaluate to numbers: trouble after them goes back to before."""
    logger.warning("the weights at %s images do not evaluate to numbers", f"{state.images_seen:,}")
    if training.config.stability.enabled and state.condition.onset is None:
        state.condition = replace(state.condition, onset=state.images_seen)


def save(
    training: Training,
    state: TrainState,
    metrics: Mapping[str, float],
    *,
    sound: bool,
    may_be_left_out: bool,
) -> None:
    """Write a checkpoint in the background.

    It may be left out when the one before is still being written.
    """
    if training.checkpoints is None:
        return
    if state.is_finite():
        record = state.record(training.config, training.data.content_hash)
        training.checkpoints.save(
            state.tensors(),
            record,
            state.images_seen,
            metrics,
            sound=sound,
            left_behind=left_behind(state.interventions),
            may_be_left_out=may_be_left_out,
        )
    else:
        logger.warning("no checkpoint at %s images: its weights are not finite", f"{state.images_seen:,}")
