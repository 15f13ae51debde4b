"""Several real processes that train together: interrupted and resumed they are the uninterrupted run."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from nvae.model import NVAE
from nvae.parallel import data_parallel
from pipeline import config_file
from pipeline.config import RunConfig
from pipeline.data.index import load_index
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.recovery import agreed
from pipeline.training.state import Training
from pipeline.training.tracking import NullTracker
from pipeline.training.train import train
from pipeline.training.worker import LocalWorker, Phase, Worker
from tests.injecting import CrashError, Injecting, crash
from tests.tiny_run import Home

TOTAL = 48
HALF = 24
BATCH = 6


class Rank(LocalWorker):
    """One of several processes; crashes before the update that begins after so many images."""

    def __init__(self, crash_at: int | None) -> None:
        super().__init__()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._crash_at = crash_at

    def wrap(self, model: NVAE) -> nn.Module:
        return data_parallel(model)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier()

    def mark(self, phase: Phase, images_seen: int) -> None:
        if (phase, images_seen) == ("update", self._crash_at):
            raise CrashError


class Curves(NullTracker):
    """Keeps what rank 0 would send to MLflow."""

    def __init__(self) -> None:
        self.at: dict[int, Mapping[str, float]] = {}

    def log(self, metrics: Mapping[str, float], at: int) -> None:
        self.at[at] = self.at.get(at, {}) | metrics


def launch(url: str, config: RunConfig, worker: Worker, crash_at: int | None = None) -> Curves:
    """From the newest checkpoint to the end, or to where all ranks crash."""
    writer = CheckpointWriter(url, claim_attempt(url), keep=9) if worker.rank == 0 else None
    resume = agreed(partial(newest, url), url, worker)
    curves = Curves()
    training = Training(config, load_index(config.data.root), worker, curves, writer, url)
    try:
        assert train(training, resume) == "finished"
    except CrashError:
        assert crash_at is not None
    finally:
        if writer is not None:
            writer.wait()
    worker.barrier()
    return curves


def run_rank(rank: int, world_size: int, folder: str, config: RunConfig, crashes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
    launch(f"{folder}/whole", config, Rank(None))
    for crash_at in crashes:
        launch(f"{folder}/{crash_at}", config, Rank(crash_at), crash_at)
        launch(f"{folder}/{crash_at}", config, Rank(None))
    curves = launch(f"{folder}/wide", config, Rank(HALF + BATCH), HALF + BATCH)
    if rank == 0:
        Path(folder, "wide.json").write_text(json.dumps(curves.at[HALF + BATCH]))
    dist.destroy_process_group()


def alone(url: str, config: RunConfig, crash_at: int) -> Curves:
    """Like `launch`, but in one process that knows of no other."""
    return launch(url, config, Injecting(LocalWorker(), {crash_at: crash}), crash_at)


@pytest.mark.parametrize(
    ("world_size", "crashes"), [(2, (HALF,)), pytest.param(3, (6, HALF, 42), marks=pytest.mark.campaign)]
)
def test_ranks_that_crashed_and_continued_make_the_same_updates(
    home: Home, tmp_path: Path, world_size: int, crashes: tuple[int, ...]
) -> None:
    """At the same width the files are the same byte by byte; at another the next update is, but for
    rounding. With three ranks also the order of adding up decides about the last bits."""
    config = config_file.load(
        home.yaml,
        [
            f"data.root={home.store}/data/tiny",
            "data.lanes=6",
            f"train.batch_size={BATCH}",
            f"cadence.log_images={BATCH}",
            "cadence.checkpoint_images=12",
            "cadence.evaluate_images=1000",
            "evaluation.images=3",
            f"train.total_images={TOTAL}",
        ],
    )
    alone(str(tmp_path / "narrow"), config, HALF)
    shutil.copytree(tmp_path / "narrow", tmp_path / "wide")
    multiprocessing.spawn(
        run_rank, args=(world_size, str(tmp_path), config, crashes), nprocs=world_size, join=True
    )
    whole = newest(str(tmp_path / "whole"))
    assert whole is not None
    assert whole.images_seen == TOTAL
    for crash_at in crashes:
        resumed = newest(str(tmp_path / str(crash_at)))
        assert resumed is not None
        assert (resumed.images_seen, resumed.attempt) == (TOTAL, 2)
        assert resumed.manifest.files == whole.manifest.files
        assert resumed.record == whole.record

    narrow = alone(str(tmp_path / "narrow"), config, HALF + BATCH).at
    wide = json.loads((tmp_path / "wide.json").read_text())
    assert list(narrow) == [HALF + BATCH], "it did not continue from the checkpoint"
    for name in ("train/loss", "train/gradient_norm", "train/reconstruction_nats", "train/kl_nats"):
        assert wide[name] == pytest.approx(narrow[HALF + BATCH][name], rel=1e-5), name
