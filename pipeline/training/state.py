"""The state of a training, which is what a checkpoint holds, and what surrounds it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nvae.health import magnitude
from nvae.levers import levers_for
from nvae.model import NVAE
from nvae.optimizer import make_ema, make_optimizer
from pipeline import config_file
from pipeline.config import RunConfig
from pipeline.data.index import Index
from pipeline.training import interventions as interventions_of
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.interventions import Intervention, Kind
from pipeline.training.optimizer_state import flatten_optimizer, restore_optimizer
from pipeline.training.stability import Condition
from pipeline.training.tracking import Tracker
from pipeline.training.worker import Worker


@dataclass
class TrainState:
    """What a training has come to."""

    model: NVAE
    ema: AveragedModel
    optimizer: Optimizer
    images_seen: int = 0
    best: float = math.inf
    """Lowest validation bits/dim so far; kept by every rank, since it decides what all do."""
    condition: Condition = field(default_factory=Condition)
    """What an update is compared with; goes back with the weights."""
    interventions: list[Intervention] = field(default_factory=list)
    """What was done last against divergence; never goes back."""
    counts: Counter[Kind] = field(default_factory=Counter)
    """How often which of it was done, from the first image on."""
    evaluation_due: bool = False
    """Whether an evaluation fell due that was not made, or not to its end: a stop came first."""
    checkpoint_due: bool = False
    """Whether a checkpoint fell due that has still to be written; no part of one, of course."""

    _highest: tuple[float, float] = (0.0, 0.0)
    """Scores since the last log line, of loss and gradient."""

    @classmethod
    def create(
        cls, config: RunConfig, worker: Worker, resume: Checkpoint | None, initial: NVAE | None
    ) -> "TrainState":
        """A fresh model, one that begins with the weights of `initial`, or a resumed one."""
        model = first_weights(config, initial)
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        model.to(worker.device)
        model.use(levers_for(worker.device, config.train.levers))
        state = cls(
            model,
            make_ema(model, config.optimizer.ema_decay),
            make_optimizer(model, config.optimizer.weight_decay),
        )
        if resume is not None:
            state.resume(resume, config)
        return state

    def resume(self, checkpoint: Checkpoint, config: RunConfig) -> None:
        """Put back everything that `tensors` and `record` gave."""
        record = checkpoint.record
        self.roll_back(checkpoint, config)
        self.images_seen = checkpoint.images_seen
        self.best = math.inf if record["best"] is None else record["best"]
        self.interventions = interventions_of.from_record(record["interventions"])
        self.counts = Counter({Kind(kind): n for kind, n in record["intervention_counts"].items()})
        self.evaluation_due = record["evaluation_due"]

    def roll_back(self, checkpoint: Checkpoint, config: RunConfig) -> None:
        """Put back the weights and all that belongs to them. Progress and interventions stay."""
        self.model.load_state_dict(checkpoint.load("model"))
        self.averaged.load_state_dict(checkpoint.load("ema"))
        restore_optimizer(self.optimizer, self.model, checkpoint.load("optimizer"))
        self.ema.n_averaged.fill_(checkpoint.record["updates"])
        self.condition = Condition.from_record(checkpoint.record["condition"])
        if checkpoint.record["config"]["train"]["batch_size"] != config.train.batch_size:
            # Losses of batches of another size scatter differently.
            self.condition = replace(self.condition, losses=(), log_norms=())

    @torch.no_grad()
    def begin_anew(self, config: RunConfig, initial: NVAE | None) -> None:
        """Put back the weights that the training began with. Progress and interventions stay."""
        first = first_weights(config, initial)
        for model in (self.model, self.averaged):
            model.load_state_dict(first.state_dict())
            # Also those that a checkpoint leaves out: whether a layer was initialized from data.
            for mine, theirs in zip(model.buffers(), first.buffers(), strict=True):
                mine.copy_(theirs)
        restore_optimizer(self.optimizer, self.model, {})
        self.ema.n_averaged.fill_(0)
        self.condition = Condition()

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The files of a checkpoint, by name."""
        return {
            "model": self.model.state_dict(),
            "ema": self.averaged.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer, self.model),
        }

    def record(self, config: RunConfig, data_hash: str) -> dict[str, Any]:
        """All that is no tensor, as plain values."""
        return {
            "config": config_file.to_mapping(config_file.without_secrets(config)),
            "data_hash": data_hash,
            "updates": int(self.ema.n_averaged),
            "best": self.best if math.isfinite(self.best) else None,
            "condition": self.condition.to_record(),
            "interventions": interventions_of.to_record(self.interventions),
            "intervention_counts": {str(kind): count for kind, count in self.counts.items()},
            "evaluation_due": self.evaluation_due,
        }

    def note_scores(self, scores: tuple[float, float]) -> None:
        """How far an update was off (stability.py); what is not finite has no score."""
        finite = [score if math.isfinite(score) else 0.0 for score in scores]
        self._highest = (max(self._highest[0], finite[0]), max(self._highest[1], finite[1]))

    def highest_scores(self) -> dict[str, float]:
        """The highest since they were last asked for, by their metrics' names."""
        loss, gradient = self._highest
        self._highest = (0.0, 0.0)
        return {"stability/loss_score": loss, "stability/gradient_score": gradient}

    def is_finite(self) -> bool:
        """Whether every weight and all that belongs to it is a number. Waits for the device."""
        numbers = [
            tensor
            for file in self.tensors().values()
            for tensor in file.values()
            if tensor.is_floating_point()
        ]
        return bool(magnitude(numbers).isfinite())

    @property
    def averaged(self) -> NVAE:
        """The model with averaged weights: the one that is evaluated, sampled, registered."""
        assert isinstance(self.ema.module, NVAE)
        return self.ema.module


@dataclass(frozen=True)
class Training:
    """What surrounds the state: where it trains, on what, and who writes things down."""

    config: RunConfig
    data: Index
    worker: Worker
    tracker: Tracker
    checkpoints: CheckpointWriter | None
    """Rank 0's writer; None on the other ranks."""
    url: str | None = None
    """The run's folder, where its checkpoints are; None for one that has no folder."""
    initial: Callable[[], NVAE | None] = lambda: None
    """Loads the model whose weights the training begins with; None for noise."""


def first_weights(config: RunConfig, initial: NVAE | None) -> NVAE:
    """A model of noise, the same for every rank, or one with the weights of `initial`; on the CPU."""
    torch.manual_seed(config.train.seed)
    model = NVAE(config.model)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    return model
