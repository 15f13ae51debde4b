"""Runs that take seconds: a data set of small portraits, a model of two groups, one process."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from pipeline import config_file, run, run_folder
from pipeline.config import RunConfig
from pipeline.preparation import Prepared, prepare
from pipeline.training.journal import StoredJournal, decode
from pipeline.training.tracking import default_tracking_uri
from pipeline.training.worker import LocalWorker, Worker
from pipeline.width import Workers

IMAGES = 24
YAML = """
data:
  root: store:tiny
  shuffle_window: 4
  horizontal_flip: true
model:
  image_size: 8
  groups_per_scale: [1, 1]
  latent_channels: 2
  encoder_channels: 4
  decoder_channels: 4
  preprocess_blocks: 1
  preprocess_cells: 1
  postprocess_cells: 1
  mixture_components: 2
optimizer:
  warmup_images: 8
  ema_decay: 0.9
train:
  total_images: 48
  batch_size: 4
cadence:
  log_images: 8
  evaluate_images: 24
  checkpoint_images: 16
sampling:
  count: 2
"""


@dataclass(frozen=True)
class Home:
    """A working directory with a store that holds the data set `store:tiny`, and tiny.yaml."""

    folder: Path

    @property
    def store(self) -> str:
        return str(self.folder / "nvae-store")

    @property
    def tracking(self) -> str:
        return default_tracking_uri(self.store)

    @property
    def yaml(self) -> str:
        return str(self.folder / "tiny.yaml")

    def config(self, *overrides: str) -> RunConfig:
        return config_file.load(self.yaml, overrides)

    def run_url(self, name: str) -> str:
        return run_folder.folder(self.store, name)

    def prepare(
        self,
        name: str,
        *overrides: str,
        parent: str | None = None,
        workers: int = 1,
        tracking: str | None = None,
    ) -> Prepared:
        return prepare(
            self.config(*overrides),
            name=name,
            store_url=self.store,
            tracking_uri=tracking or self.tracking,
            workers=Workers(workers, workers),
            parent=parent,
        )

    def begin(self, name: str, *overrides: str, **asked: Any) -> run.RunSpec:
        """As the driver does it, without the lease."""
        return run.begin(self.prepare(name, *overrides, **asked))

    def train(
        self, name: str, *overrides: str, parent: str | None = None, worker: Worker | None = None
    ) -> dict[str, Any]:
        """A launch from beginning to end, in this process; how it ended."""
        spec = self.begin(name, *overrides, parent=parent)
        with run.running(spec) as end:
            run_folder.note_launch(spec.url, 1)
            end.update(run.work(vars(spec), worker or LocalWorker()))
        return end


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def nvae(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """The `nvae` command in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["nvae", *arguments])
        main()
    shown = capsys.readouterr()
    code = exit_.value.code
    return Outcome(code if isinstance(code, int) else int(code is not None), shown.out, shown.err)


NVAE = str(Path(sys.executable).with_name("nvae"))
"""The same as a program."""


def points(run_url: str) -> dict[tuple[str, int], float]:
    """What the journal holds of a run's curves: (metric, images seen) -> value noted last."""
    journal = StoredJournal(run_url)
    return {
        (name, entry.body["at"]): value
        for segment in journal.segments()
        for entry in decode(journal.read(segment))
        if entry.kind == "metrics"
        for name, value in entry.body["values"].items()
    }
