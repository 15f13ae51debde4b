"""The loop: what an interruption changes (nothing), when something falls due, when it gives up."""

import json
import math
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import run
from pipeline.config import CadenceConfig
from pipeline.data import shards
from pipeline.data.index import load_index
from pipeline.models.export import load_directory
from pipeline.training.checkpoint import Checkpoint, checkpoints, newest, open_attempt
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.recovery import DivergedError
from pipeline.training.selection import candidates
from pipeline.training.state import Training, TrainState
from pipeline.training.tracking import NullTracker
from pipeline.training.train import Cadence, look_and_save, train
from pipeline.training.worker import LocalWorker, Phase
from tests.injecting import CrashError, Injecting, stop
from tests.tiny_run import Home, points


@pytest.fixture(scope="module")
def whole(shared_home: Home) -> str:
    """A run of 48 images that nothing interrupted."""
    shared_home.train("whole")
    return "whole"


def last(home: Home, name: str) -> Checkpoint:
    found = newest(home.run_url(name))
    assert found is not None
    return found


def learned(home: Home, name: str) -> dict[tuple[str, int], float]:
    """The curves without the clock's and the machine's."""
    return {
        (metric, at): value
        for (metric, at), value in points(home.run_url(name)).items()
        if not metric.startswith(("speed/", "data/", "memory/", "system/", "checkpoint/"))
    }


def test_a_run_that_was_stopped_and_continued_is_the_uninterrupted_one_bit_for_bit(
    home: Home, whole: str
) -> None:
    worker = Injecting(LocalWorker(), {36: stop})
    assert home.train("stopped", worker=worker)["state"] == "stopped"
    # After the very update: 40 is between two multiples of checkpoint_images.
    assert last(home, "stopped").images_seen == 40
    assert home.train("stopped")["state"] == "finished"
    assert_same_run(home, whole, "stopped")


class DyingWorker(LocalWorker):
    """Crashes at one of the marks that the training makes."""

    def __init__(self, marks: int) -> None:
        super().__init__()
        self._left = marks

    def mark(self, phase: Phase, images_seen: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise CrashError


_numbers = count()


@settings(max_examples=3, deadline=None)
@given(crashes=st.tuples(st.integers(1, 20), st.integers(1, 8)))
def test_a_run_that_crashed_anywhere_and_continued_is_the_uninterrupted_one_bit_for_bit(
    shared_home: Home, whole: str, crashes: tuple[int, int]
) -> None:
    name = f"crashed-{next(_numbers)}"
    for marks in crashes:
        with pytest.raises(CrashError):
            shared_home.train(name, worker=DyingWorker(marks))
    assert shared_home.train(name)["state"] == "finished"
    assert_same_run(shared_home, whole, name)


def assert_same_run(home: Home, one: str, other: str) -> None:
    whole, resumed = last(home, one), last(home, other)
    assert whole.images_seen == resumed.images_seen == 48
    # Byte by byte: model, averages, optimizer.
    assert whole.manifest.files == resumed.manifest.files
    assert dict(whole.record) == dict(resumed.record)
    assert learned(home, one) == learned(home, other)


def test_another_seed_is_another_run(home: Home, whole: str) -> None:
    home.train("other-seed", "train.seed=2")
    assert learned(home, whole) != learned(home, "other-seed")


@given(
    interval=st.integers(1, 50),
    batches=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    more=st.integers(0, 40),
    start=st.integers(0, 60),
)
def test_something_is_due_when_a_multiple_of_its_interval_was_passed_and_at_the_end(
    interval: int, batches: list[int], more: int, start: int
) -> None:
    total = start + sum(batches) + more
    config = CadenceConfig(log_images=interval, evaluate_images=7, checkpoint_images=11)
    cadence, seen = Cadence(config, total, start), start
    for batch in batches:
        passed = range(seen + 1, seen + batch + 1)
        seen += batch
        cadence.advance(seen)
        assert cadence.due("log") == (any(image % interval == 0 for image in passed) or seen == total)
        # A run that is continued here decides alike: nothing is remembered but the place.
        resumed = Cadence(config, total, passed[0] - 1)
        resumed.advance(seen)
        assert resumed.due("evaluate") == cadence.due("evaluate")
        assert resumed.due("checkpoint") == cadence.due("checkpoint")


def test_training_gives_up_when_no_update_is_finite(home: Home) -> None:
    config = home.config(
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_images=0",
        "stability.enabled=false",
        f"data.root={home.store}/data/tiny",
    )
    training = Training(config, load_index(config.data.root), LocalWorker(), NullTracker(), None)
    with pytest.raises(DivergedError, match=r"objective\.spectral_coefficient"):
        train(training)


def test_a_diverged_run_says_so_and_registers_nothing(home: Home) -> None:
    explosive = ("optimizer.learning_rate=1e30", "optimizer.warmup_images=0", "stability.enabled=false")
    end = home.train("diverged", *explosive)
    assert end["state"] == "diverged"
    assert "had a finite loss and gradient" in end["reason"]
    record = json.loads((Path(home.run_url("diverged")) / "run.json").read_text())
    assert (record["state"], record["result"]) == ("diverged", {})
    skipped = [v for (name, _), v in points(home.run_url("diverged")).items() if name.endswith("fraction")]
    assert 1.0 in skipped


def test_the_best_checkpoint_is_the_one_that_evaluated_best(home: Home) -> None:
    home.train("measured", "cadence.evaluate_images=16", "checkpoint.keep=5")
    url = home.run_url("measured")
    scores = {at: value for (name, at), value in points(url).items() if name == "validation/bits_per_dim"}
    assert sorted(scores) == [16, 32, 48]
    for checkpoint in checkpoints(url):
        until_then = [score for at, score in scores.items() if at <= checkpoint.images_seen]
        assert checkpoint.record["best"] == min(until_then)
    chosen = next(candidates(url))
    assert chosen.images_seen == min(scores, key=scores.__getitem__)


def test_an_evaluation_that_improves_is_saved_at_once(home: Home) -> None:
    """Else the best weights would be those of some later moment."""
    home.train("improved", "cadence.evaluate_images=20", "cadence.checkpoint_images=48", "checkpoint.keep=5")
    assert 20 in {checkpoint.images_seen for checkpoint in checkpoints(home.run_url("improved"))}


def test_an_evaluation_whose_checkpoint_was_lost_is_not_the_one_to_beat(home: Home, tmp_path: Path) -> None:
    url, failures = str(tmp_path), [OSError("no room")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    config = home.config(f"data.root={home.store}/data/tiny", "cadence.checkpoint_images=1000")
    worker, writer = LocalWorker(), CheckpointWriter(url, 1, keep=2, before_commit=fail_once)
    training = Training(config, load_index(config.data.root), worker, NullTracker(), writer, url)
    state = TrainState.create(config, worker, None, None)
    for state.images_seen in (4, 8, 12):
        # The same weights: no evaluation is better than the first.
        state.evaluation_due = True
        look_and_save(training, state, Cadence(config.cadence, 1000, state.images_seen))
        writer.settle()
    assert [checkpoint.images_seen for checkpoint in checkpoints(url)] == [8]


def test_a_run_begins_with_the_weights_it_is_given_though_they_are_gone_meanwhile(home: Home) -> None:
    end = home.train("parent")
    frozen = ("optimizer.learning_rate=1e-12", "optimizer.minimum_learning_rate=0", "train.total_images=8")
    spec = home.begin("child", *frozen, parent=end["result"]["checkpoint"])
    # Retention does so, or `nvae runs delete`.
    shutil.rmtree(home.run_url("parent"))
    assert run.work(vars(spec), LocalWorker())["state"] == "finished"
    # What was registered is there still.
    given = load_directory(end["result"]["export"]).model
    begun = open_attempt(home.run_url("child"), 8, 1).load("model")
    for name, parameter in given.named_parameters():
        torch.testing.assert_close(begun[name], parameter.detach(), rtol=0, atol=1e-9)


def test_a_run_without_validation_images_trains_and_registers(home: Home) -> None:
    root = f"{home.store}/data/all-train"
    shards.build("portraits:8", root, image_size=8, validation_fraction=0)
    end = home.train("all-train", f"data.root={root}", "train.total_images=8")
    assert end["state"] == "finished"
    assert end["result"]["metrics"] == {}
    assert end["result"]["alias"] is None
    assert last(home, "all-train").record["best"] is None


def test_every_log_line_has_finite_curves(home: Home, whole: str) -> None:
    curves = learned(home, whole)
    assert {at for name, at in curves if name == "train/loss"} == {8, 16, 24, 32, 40, 48}
    assert all(math.isfinite(value) for value in curves.values())
