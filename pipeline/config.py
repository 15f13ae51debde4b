"""The settings of a run. This file is their reference manual.

Every setting has one spelling, its dotted path (`objective.spectral_coefficient`): in YAML,
in KEY=VALUE overrides, in search spaces, in MLflow. A setting that is marked resumable may
change when a run continues; every other is part of the run's identity, and another value
means another run. Amounts of training are counted in images, never in steps or epochs, so
that the batch size and the number of workers may change.

Pydantic checks one value at a time here; what must hold between settings is in RULES, so
that `pipeline/config_file.py` can report every mistake of both kinds together. A validator
of a whole section was rejected: pydantic skips it as soon as one of its fields is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from nvae.config import NVAEConfig
from nvae.levers import Lever

RESUMABLE: dict[str, Any] = {"resumable": True}


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values are checked and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, name: str, value: Any) -> Any:
        """The value of one setting of this section as its own type, or ValueError.

        A flag is no number, although Python (and pydantic) would count true as 1.
        """
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise ValueError(f"{value!r} is a flag")
        return _adapter(cls, name).validate_python(value)


@cache
def _adapter(section: type[Section], name: str) -> TypeAdapter[Any]:
    field = section.model_fields[name]
    checked_type: Any = Annotated[field.annotation, field]
    return TypeAdapter(checked_type, config=ConfigDict(allow_inf_nan=False))


class DataConfig(Section):
    root: str = Field(json_schema_extra=RESUMABLE)
    """Where the shards are: a URL or path that holds an index.json, or `store:NAME` for the
    folder data/NAME of the store. May move between sessions; its content may not change."""
    shuffle_window: int = Field(128, ge=1)
    """Samples of one lane that are shuffled together; bounds the loader's memory."""
    lanes: int | None = Field(None, ge=1)
    """Contiguous pieces into which an epoch is cut and which are read side by side. By default
    the batch size up to 64; of more, a divisor from 33 to 64 or what comes closest to one."""
    horizontal_flip: bool = False
    """Mirror each training image with probability one half."""
    decode_threads: int = Field(2, ge=1, json_schema_extra=RESUMABLE)
    """Threads of each worker that decode images."""
    prefetch_batches: int = Field(4, ge=1, json_schema_extra=RESUMABLE)
    """Batches that each worker holds ready."""
    on_corrupt: Literal["fail", "skip"] = Field("fail", json_schema_extra=RESUMABLE)
    """What becomes of a sample whose bytes are damaged, fetched twice, or are no image: the run
    ends, or the sample is left out of the loss, counted and named in the log."""
    max_corrupt_fraction: float = Field(0.01, ge=0, le=1, json_schema_extra=RESUMABLE)
    """Skipping ends the run when a worker has lost more than this share of the samples that it
    has asked for since it started, or of 1000 if it has asked for fewer."""
    cache_folder: str | None = Field(None, pattern=r"^(/|~/)", json_schema_extra=RESUMABLE)
    """Absolute path of a folder on a local disk for a cache of what was fetched, which all
    workers of a machine share. None: no cache; data on a local disk are never cached."""
    cache_gib: float = Field(20, ge=0.1, json_schema_extra=RESUMABLE)
    """GiB that the cache never exceeds; what was not used for longest makes room."""


class ObjectiveConfig(Section):
    kl_warmup_fraction: float = Field(0.3, ge=0, le=1)
    """Share of the training during which the KL coefficient rises from its minimum to 1."""
    kl_constant_fraction: float = Field(1e-4, ge=0, le=1)
    """Share of the training before the KL coefficient begins to rise."""
    kl_minimum_coefficient: float = Field(1e-4, ge=0, le=1)
    """Lowest KL coefficient."""
    kl_balancing: bool = True
    """Weigh the KL of the groups during the warm-up so that none is switched off (NVAE Sec. 3.2)."""
    spectral_coefficient: float = Field(1e-2, ge=0)
    """Weight lambda of spectral regularization and of the batch-norm scale penalty (NVAE
    Sec. 3.2). 0 turns both off."""
    spectral_coefficient_initial: float | None = Field(None, gt=0)
    """If given, lambda falls from this value to `spectral_coefficient` while the KL warms up,
    linearly in its logarithm."""


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-2, gt=0)
    """Highest learning rate of Adamax, reached after the warm-up."""
    minimum_learning_rate: float = Field(1e-4, ge=0)
    """Learning rate at the last image, the end of the cosine."""
    warmup_images: int = Field(0, ge=0)
    """Images over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(3e-4, ge=0)
    """L2 penalty of all parameters, added to the gradient."""
    gradient_clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of the whole gradient; longer ones are scaled down. None: no clipping."""
    ema_decay: float = Field(0.9995, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated, sampled and registered, reached
    after a ramp. 0: no averaging."""


class TrainConfig(Section):
    total_images: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Images to train on, counted with repetition."""
    batch_size: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Images per update over all workers together."""
    micro_batch_size: int | None = Field(None, ge=1, json_schema_extra=RESUMABLE)
    """Images that one worker holds in memory at once; gradients are accumulated over
    micro-batches, batch statistics are taken within one (over all workers). None: no
    accumulation."""
    precision: Literal["fp32", "bf16"] = Field("fp32", json_schema_extra=RESUMABLE)
    """bf16: convolutions in bfloat16; statistics, likelihoods and penalties stay in fp32."""
    activation_checkpointing: Literal["none", "batch_norm", "cells"] = Field(
        "batch_norm", json_schema_extra=RESUMABLE
    )
    """What the backward pass recomputes to save memory: nothing, batch norm + swish (as in
    the paper), or whole cells."""
    levers: Literal["auto"] | tuple[Lever, ...] = Field("auto", json_schema_extra=RESUMABLE)
    """What is computed otherwise than the plain model says, for speed alone: "auto" is what was
    measured to pay on the device, on GPUs nothing yet; [] is the plain model."""
    seed: int = Field(1, ge=0, le=2**32 - 1)
    """Seed of the initial weights, the order of samples and all noise."""
    stall_seconds: float = Field(90.0, ge=1, json_schema_extra=RESUMABLE)
    """A training that stands still for so long is ended and started again from its last
    checkpoint; five times as long for the first update or a batch of an evaluation, twenty times
    where files are read and written: at the start, for a checkpoint and at the end."""
    stall_steps: int = Field(20, ge=1, json_schema_extra=RESUMABLE)
    """But not before this many times the median time of an update has passed."""
    profile_at_images: int | None = Field(None, ge=0, json_schema_extra=RESUMABLE)
    """Profile the two updates from this many images on, on rank 0, into the run's folder `files`:
    a trace and a table of the operations that take longest. None: no profile."""


class CadenceConfig(Section):
    log_images: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Images between two points of the training curves."""
    evaluate_images: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Images between two evaluations on the validation split, with pictures."""
    checkpoint_images: int = Field(ge=1, json_schema_extra=RESUMABLE)
    """Images between two checkpoints."""


class CheckpointConfig(Section):
    keep: int = Field(3, ge=2, json_schema_extra=RESUMABLE)
    """Newest checkpoints to keep; the best one is kept besides. At least two: when the last one is
    damaged, or was saved when trouble had begun already, the one before is needed."""


class StabilityConfig(Section):
    enabled: bool = Field(True, json_schema_extra=RESUMABLE)
    """Skip updates whose loss or gradient is a spike, roll back from divergence and go on more
    gently. If not, only updates that are not finite are skipped, and a log interval of nothing
    else ends the run."""
    loss_limit: float = Field(10.0, ge=1, json_schema_extra=RESUMABLE)
    """An update is skipped whose loss lies this many robust standard deviations above the
    median of the last 128 updates. From half of it on an update is suspicious: a rollback goes
    to before the first suspicious one."""
    gradient_limit: float = Field(10.0, ge=1, json_schema_extra=RESUMABLE)
    """The same for the logarithm of the gradient's norm."""
    skips_in_a_row: int = Field(5, ge=1, json_schema_extra=RESUMABLE)
    """After so many skipped updates in a row the weights roll back to an earlier checkpoint; if
    nothing but long gradients was the reason, they are from then on shortened to the limit."""
    skipped_fraction: float = Field(0.2, gt=0, le=1, json_schema_extra=RESUMABLE)
    """So does a larger share than this of the last 128 updates."""
    max_rollbacks: int = Field(3, ge=0, le=100, json_schema_extra=RESUMABLE)
    """Rollbacks within `recovery_fraction` of the training; where one more is needed, the run
    ends as diverged."""
    spectral_factor: float = Field(3.0, ge=1, le=1000, json_schema_extra=RESUMABLE)
    """What the spectral coefficient is multiplied with at the second and every later rollback
    within `recovery_fraction` of the training. It returns geometrically."""
    learning_rate_factor: float = Field(0.5, gt=0, le=1, json_schema_extra=RESUMABLE)
    """What the learning rate is multiplied with at these rollbacks; it returns, too."""
    recovery_fraction: float = Field(0.05, gt=0, le=1, json_schema_extra=RESUMABLE)
    """Share of the training after which a softened coefficient is what it was, and after which a
    rollback no longer counts (in short trainings later: as late as the budget takes to spend)."""


class EvaluationConfig(Section):
    images: int | None = Field(None, ge=1, json_schema_extra=RESUMABLE)
    """Validation images of each evaluation during training. None: all."""
    batch_size: int = Field(16, ge=1, json_schema_extra=RESUMABLE)
    """Images per worker evaluated at once."""
    importance_samples: int = Field(1, ge=1, json_schema_extra=RESUMABLE)
    """Draws per image of the importance-weighted likelihood in the last evaluation."""


class SamplingConfig(Section):
    count: int = Field(16, ge=1, json_schema_extra=RESUMABLE)
    """Images of the sample grids made during training."""
    temperature: float = Field(0.7, gt=0, json_schema_extra=RESUMABLE)
    """Factor of the priors' standard deviations when these grids are drawn."""


class RegistryConfig(Section):
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", json_schema_extra=RESUMABLE)
    """Registered model that receives the trained weights as a new version. By default
    `nvae-` and the run's name."""


class StorageConfig(Section):
    connect_timeout_seconds: float = Field(5.0, gt=0, le=600, json_schema_extra=RESUMABLE)
    """Longest wait for a connection to a store, its TLS handshake included."""
    read_timeout_seconds: float = Field(15.0, gt=0, le=600, json_schema_extra=RESUMABLE)
    """Longest silence of a store in the midst of an answer; then the rest is asked for again."""
    retry_seconds: float = Field(1800.0, ge=0, le=7 * 86_400, json_schema_extra=RESUMABLE)
    """How long a store that answered before may fail before the run does; the other workers wait
    as long. A run that has nobody to mend a bucket before the morning wants 43_200."""
    longest_pause_seconds: float = Field(8.0, gt=0, le=600, json_schema_extra=RESUMABLE)
    """Longest pause between two tries. Pauses are drawn at random below a bound that doubles
    from 0.2 s up to this; a store that names a pause itself (Retry-After) is heeded."""


class RunConfig(Section):
    """One training run."""

    data: DataConfig
    """What is learned from, and in which order."""
    model: NVAEConfig = NVAEConfig()
    """The model; see nvae/config.py."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimized."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it is minimized."""
    train: TrainConfig
    """How much, and on what arithmetic."""
    cadence: CadenceConfig
    """How often something is written."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    stability: StabilityConfig = StabilityConfig()
    """What is done against divergence; see pipeline/training/stability.py."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the validation split is evaluated."""
    sampling: SamplingConfig = SamplingConfig()
    """The pictures made during training."""
    registry: RegistryConfig = RegistryConfig()
    """Where the result is registered."""
    storage: StorageConfig = StorageConfig()
    """How patient reads and writes are with disks and networks at fault."""

    @classmethod
    def section(cls, name: str) -> type[Section]:
        """The class of a section of settings other than the model."""
        kind: Any = cls.model_fields[name].annotation
        assert issubclass(kind, Section), f"{name} is no section"
        section: type[Section] = kind
        return section


class SearchConfig(Section):
    """How a search looks for the best settings of a run; see pipeline/search/."""

    searcher: Literal["tpe", "random", "grid"] = "tpe"
    """Who chooses the settings of a trial: a model of what was good so far (Optuna's tree of Parzen
    estimators), chance, or each combination of the listed values in turn."""
    random_trials: int = Field(8, ge=1)
    """Of tpe: trials that are drawn at random before there is enough to learn from."""
    seed: int = Field(1, ge=0, le=2**32 - 1)
    """Of whatever is drawn at random."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Which trials are stopped early: at each rung all but the best share of those that reached it
    (asha); those that are worse than the median of the others so far (median); none."""
    compare: Literal["images", "device_seconds"] = "images"
    """Trials are compared at as many images seen, or at as much time of their devices."""
    first_rung_images: int | None = Field(None, ge=1)
    """Images after which a trial may be stopped for the first time, a multiple of
    `cadence.evaluate_images`, which is also what it is by default."""
    first_rung_device_seconds: float | None = Field(None, gt=0)
    """The same in time of a trial's devices together, if that is what is compared."""
    reduction_factor: int = Field(3, ge=2, le=100)
    """Of asha: the next rung lies at so many times the images of the one before, and one in so many
    trials goes on."""
    max_restarts: int = Field(2, ge=0, le=100, json_schema_extra=RESUMABLE)
    """Times that a trial whose process was lost, or which hangs, is started again; it continues from
    its checkpoint."""
    device_memory_gib: float | None = Field(None, gt=0)
    """Memory of the device of a worker; trials that are estimated to need more are not started. By
    default that of this machine's GPU, or each concurrent trial's share of its memory."""
    max_device_hours: float | None = Field(None, gt=0, json_schema_extra=RESUMABLE)
    """The search ends in order when all trials together have used so much time of their devices."""
    max_cost: float | None = Field(None, gt=0, json_schema_extra=RESUMABLE)
    """The same in money, by `price_per_device_hour`."""
    price_per_device_hour: float | None = Field(None, gt=0, json_schema_extra=RESUMABLE)
    """What a device costs for an hour, in any currency."""


@dataclass(frozen=True)
class Rule:
    """What must hold between settings that are each fine alone. The first path is to blame."""

    paths: tuple[str, ...]
    holds: Callable[..., bool]
    message: str


RULES = (
    Rule(
        ("train.total_images", "train.batch_size"),
        lambda total, batch: total >= batch,
        "{0} images are less than one batch of {1}",
    ),
    Rule(
        ("train.micro_batch_size", "train.batch_size"),
        lambda micro, batch: micro is None or micro <= batch,
        "{0} is more than train.batch_size, {1}",
    ),
    Rule(
        ("optimizer.warmup_images", "train.total_images"),
        lambda warmup, total: warmup <= total,
        "a warm-up of {0} images is longer than the training, train.total_images = {1}",
    ),
    Rule(
        ("optimizer.minimum_learning_rate", "optimizer.learning_rate"),
        lambda low, high: low <= high,
        "{0} is more than optimizer.learning_rate, {1}",
    ),
    Rule(
        ("objective.kl_warmup_fraction", "objective.kl_constant_fraction"),
        lambda warmup, constant: warmup + constant <= 1 + 1e-9,
        "{0} and kl_constant_fraction, {1}, exceed 1: the KL coefficient would never reach 1",
    ),
    Rule(
        ("objective.spectral_coefficient_initial", "objective.spectral_coefficient"),
        lambda initial, final: initial is None or final > 0,
        "cannot fall from {0} to 0 in its logarithm; leave it out or give a positive spectral_coefficient",
    ),
)
