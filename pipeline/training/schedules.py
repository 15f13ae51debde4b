"""Learning rate and loss coefficients as pure functions of the configuration and of progress.

A resumed run needs no scheduler's state: it asks again. Everything is smooth in `images_seen`,
so that batch size and number of workers may change in the middle of a run.

A rollback may have softened the coefficients (stability.py). What is left of each softening is a
factor that returns geometrically to 1; several multiply.

With `model.published_compatibility` the learning rate is the published one: a staircase of one
step per epoch, whose cosine begins at the last value of the warm-up and not at its end, since
torch's scheduler goes on from the rate that it finds. KL and spectral coefficients are the same.
"""

import math
from collections.abc import Sequence

from nvae.step import Coefficients
from pipeline.config import ObjectiveConfig, RunConfig
from pipeline.training.interventions import Intervention, recovery_images


def schedule(
    config: RunConfig, images_seen: int, *, epoch_images: int, interventions: Sequence[Intervention] = ()
) -> Coefficients:
    """The coefficients of the update that begins after `images_seen` images.

    `epoch_images` is the number of images in an epoch (for the published schedule: in the whole
    batches of one).
    """
    kl = kl_coefficient(config, images_seen)
    if config.model.published_compatibility:
        rate = published_learning_rate(config, images_seen, epoch_images)
    else:
        rate = learning_rate(config, images_seen)
    spectral = spectral_coefficient(config.objective, kl)
    for each in interventions:
        left = remaining(config, images_seen - each.images_seen)
        rate *= each.learning_rate_factor**left
        spectral *= each.spectral_factor**left
    return Coefficients(rate, kl, spectral)


def remaining(config: RunConfig, images_since: int) -> float:
    """What is left of a softening: 1 at once, 0 when it is over, as an exponent of its factors."""
    return max(1 - images_since / recovery_images(config), 0.0)


def learning_rate(config: RunConfig, images_seen: int) -> float:
    """Rises linearly from 0 to its maximum, then falls along half a cosine to its minimum."""
    optimizer, total = config.optimizer, config.train.total_images
    if images_seen < optimizer.warmup_images:
        return optimizer.learning_rate * images_seen / optimizer.warmup_images
    progress = (images_seen - optimizer.warmup_images) / max(total - optimizer.warmup_images, 1)
    return _cosine(optimizer.learning_rate, optimizer.minimum_learning_rate, min(progress, 1.0))


def published_learning_rate(config: RunConfig, images_seen: int, epoch_images: int) -> float:
    """The published staircase. Its last epoch is at the minimum."""
    optimizer, train = config.optimizer, config.train
    if images_seen < optimizer.warmup_images:
        return optimizer.learning_rate * images_seen / optimizer.warmup_images
    warmup_epochs = optimizer.warmup_images // epoch_images
    falling_epochs = train.total_images // epoch_images - warmup_epochs - 1
    fallen_epochs = min(images_seen // epoch_images - warmup_epochs, falling_epochs)
    first = optimizer.learning_rate
    if optimizer.warmup_images:
        # The rate of the last iteration of the warm-up, one short of the maximum.
        first *= max(1 - train.batch_size / optimizer.warmup_images, 0)
    return _cosine(first, optimizer.minimum_learning_rate, fallen_epochs / max(falling_epochs, 1))


def kl_coefficient(config: RunConfig, images_seen: int) -> float:
    """Weight of the KL: constant, then rising linearly to 1, and never below its minimum."""
    objective = config.objective
    progress = images_seen / config.train.total_images
    risen = progress - objective.kl_constant_fraction
    if risen < 0:
        return objective.kl_minimum_coefficient
    if risen >= objective.kl_warmup_fraction:
        return 1.0
    return max(risen / objective.kl_warmup_fraction, objective.kl_minimum_coefficient)


def spectral_coefficient(objective: ObjectiveConfig, kl: float) -> float:
    """Weight of the penalties: constant, or falling with the KL coefficient, geometrically."""
    last, first = objective.spectral_coefficient, objective.spectral_coefficient_initial
    if first is None or last == 0:
        return last
    return math.exp((1 - kl) * math.log(first) + kl * math.log(last))


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
