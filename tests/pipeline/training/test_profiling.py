"""Profiles: where they begin and end, what they hold, that nothing else changes."""

import gzip
import json
import threading
from collections.abc import Mapping

import pytest
import torch
from torch.autograd.profiler import record_function

from pipeline.data.index import load_index
from pipeline.training.profiling import UPDATES, Profiling
from pipeline.training.state import Training
from pipeline.training.tracking import NullTracker
from pipeline.training.train import train
from pipeline.training.watchdog import Limits, Mark
from pipeline.training.worker import LocalWorker
from tests.tiny_run import Home

CPU = torch.device("cpu")


class Files(NullTracker):
    """Keeps the files and the curves of a training."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.curves: dict[tuple[str, int], float] = {}

    def file(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def log(self, metrics: Mapping[str, float], at: int) -> None:
        self.curves |= {(name, at): value for name, value in metrics.items() if name.startswith("train/")}

    def traced(self, beginning: str) -> list[str]:
        """The ranges of the only trace whose names begin so, in the order of time."""
        (trace,) = (data for name, data in self.files.items() if name.endswith(".json.gz"))
        events = json.loads(gzip.decompress(trace))["traceEvents"]
        found = [event for event in events if event.get("name", "").startswith(beginning)]
        return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


class Rank(LocalWorker):
    """One of several ranks, whose meetings are counted."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__(CPU)
        self.rank, self.meetings = rank, 0

    def barrier(self) -> None:
        self.meetings += 1


def profiled(at_images: int | None, images: range, rank: int = 0) -> tuple[Files, int]:
    """The files of a loop that sees `images`, and how often its rank met the others."""
    files, worker = Files(), Rank(rank)
    with Profiling(at_images, worker, files, images.start) as profiling:
        for images_seen in images:
            profiling.before_update(images_seen)
            with record_function(f"update {images_seen}"):
                torch.ones(2) + 1
    return files, worker.meetings


def test_the_updates_from_the_image_on_are_profiled_once():
    files, meetings = profiled(at_images=6, images=range(0, 40, 4))
    # 6 is amid a batch: the next one begins at 8.
    assert sorted(files.files) == ["profile-000000000008.json.gz", "profile-000000000008.txt"]
    assert files.traced("update ") == [f"update {8 + 4 * number}" for number in range(UPDATES)]
    table = files.files["profile-000000000008.txt"].decode()
    assert "aten::add" in table
    assert "Self CPU time total" in table
    assert meetings == 1


def test_the_other_ranks_meet_rank_0_and_write_nothing():
    files, meetings = profiled(at_images=6, images=range(0, 40, 4), rank=1)
    assert (files.files, meetings) == ({}, 1)


def test_a_profile_at_the_first_image_is_one():
    assert profiled(at_images=0, images=range(0, 40, 4))[0].traced("update ")[0] == "update 0"


@pytest.mark.parametrize("at_images", [None, 6])
def test_a_training_that_was_not_asked_or_continues_behind_makes_none(at_images):
    files, meetings = profiled(at_images, images=range(8, 40, 4))
    assert (files.files, meetings) == ({}, 0)


def test_the_watchdog_waits_for_a_profile_longer_than_for_an_update():
    limits = Limits(stall_seconds=90.0, stall_steps=20)
    profile, update = (limits.seconds(Mark(phase, step_seconds=1.0)) for phase in ("profile", "update"))
    assert profile >= 5 * update


def test_a_loop_that_fails_amid_a_profile_leaves_the_profiler_stopped():
    with pytest.raises(ZeroDivisionError), Profiling(0, Rank(), Files(), 0) as profiling:
        profiling.before_update(0)
        1 / 0  # noqa: B018
    assert not torch.autograd._profiler_enabled()


def trained(home: Home, *overrides: str) -> Files:
    """What a training of 24 images in batches of 4 leaves."""
    config = home.config(
        "train.total_images=24", "cadence.evaluate_images=24", f"data.root={home.store}/data/tiny", *overrides
    )
    tracker = Files()
    with LocalWorker() as worker:
        assert train(Training(config, load_index(config.data.root), worker, tracker, None)) == "finished"
    return tracker


def test_a_training_is_the_same_with_a_profile_and_leaves_no_thread(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    plain = trained(home)
    assert plain.files == {}
    # There is but one update left when it begins.
    found = trained(home, "train.profile_at_images=18")
    assert found.traced("step/") == ["step/forward", "step/penalties", "step/backward", "step/optimizer"]
    assert "files/profile-000000000020.json.gz" in capsys.readouterr().err
    assert found.curves == plain.curves
    assert "machine" not in {thread.name for thread in set(threading.enumerate()) - before}
