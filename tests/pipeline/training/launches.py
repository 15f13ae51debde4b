"""Launches of one run without Ray and MLflow, and what is left of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.data.index import load_index
from pipeline.training.checkpoint import Checkpoint, newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.state import Training
from pipeline.training.tracking import NullTracker
from pipeline.training.train import train
from pipeline.training.worker import LocalWorker, Phase
from tests.injecting import Injecting, Injection
from tests.tiny_run import Home


class _Patient(Injecting):
    """Waits for every checkpoint: none is left out because the one before it was so short ago."""

    def __init__(self, writer: CheckpointWriter, injections: Mapping[Any, Injection]) -> None:
        super().__init__(LocalWorker(), injections)
        self._writer = writer

    def mark(self, phase: Phase, images_seen: int) -> None:
        self._writer.settle()
        super().mark(phase, images_seen)


class Launches:
    """A run in the folder `url`; each launch goes on from the newest checkpoint."""

    def __init__(self, home: Home, url: Path, *overrides: str) -> None:
        self.url = str(url)
        self.config: RunConfig = home.config(f"data.root={home.store}/data/tiny", *overrides)
        self.lines: list[str] = []

    def launch(self, injections: Mapping[Any, Injection] | None = None) -> str:
        writer = CheckpointWriter(self.url, claim_attempt(self.url), self.config.checkpoint.keep)
        worker = _Patient(writer, injections or {})
        data, resume = load_index(self.config.data.root), newest(self.url)
        if resume is not None:
            writer.continue_from(resume)
        try:
            return train(Training(self.config, data, worker, NullTracker(), writer, self.url), resume)
        finally:
            writer.wait()
            self.lines += worker.lines

    @property
    def last(self) -> Checkpoint:
        found = newest(self.url)
        assert found is not None
        return found

    @property
    def done(self) -> list[tuple[str, int, int | None]]:
        """(kind, images seen, back to) of every intervention."""
        interventions = self.last.record["interventions"]
        return [(each["kind"], each["images_seen"], each["back_to"]) for each in interventions]


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{name}": tensor
        for file in ("model", "ema", "optimizer")
        for name, tensor in checkpoint.load(file).items()
    }


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert dict(one.record) == dict(other.record)
