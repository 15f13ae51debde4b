"""Divergence in real, tiny runs: what is skipped, where weights go back to, when it is given up."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from cluster.training import EXIT_CODES
from pipeline.data.index import load_index
from pipeline.data.loader import training_batches
from pipeline.run_folder import RunError
from pipeline.training.checkpoint import Checkpoint, checkpoints, newest, open_attempt
from pipeline.training.interventions import Intervention, Kind, from_record
from pipeline.training.machine import Machine
from pipeline.training.metrics import Metrics
from pipeline.training.recovery import DivergedError, before
from pipeline.training.state import Training, TrainState
from pipeline.training.tracking import NullTracker
from pipeline.training.train import step
from pipeline.training.worker import LocalWorker
from tests.injecting import (
    CrashError,
    Injecting,
    Injection,
    break_gradient,
    break_image,
    break_statistic,
    break_weight,
    crash,
    stop,
)
from tests.pipeline.training.launches import Launches, assert_same, tensors
from tests.tiny_run import Home

# Updates of 4 images: the trouble is in those that begin at 20, 24, 28, 32 and 36.
EPISODE: Mapping[Any, Injection] = dict.fromkeys(range(20, 40, 4), break_image)
OFTEN = ("cadence.checkpoint_images=4", "checkpoint.keep=20", "cadence.evaluate_images=1000")


# -- skip -------------------------------------------------------------------------------


def test_what_is_not_finite_is_skipped_said_and_noted(home: Home, tmp_path: Path) -> None:
    run = Launches(home, tmp_path, *OFTEN)
    trouble = {8: break_image, 20: break_gradient, 32: break_statistic}
    assert run.launch(trouble) == "finished"
    interventions = run.last.record["interventions"]
    assert [(each["kind"], each["images_seen"], each["reason"]) for each in interventions] == [
        ("skip", 12, "not finite: batch-norm statistics, loss, gradient"),
        ("skip", 24, "not finite: gradient"),
        ("skip", 36, "not finite: batch-norm statistics"),
    ]
    assert "At 24 images: update skipped: not finite: gradient" in run.lines
    assert run.last.record["updates"] == 9
    # Nothing is saved amid an episode; from the first skip on this run is in one.
    assert [found.images_seen for found in checkpoints(run.url)] == [48, 8, 4]
    batches = training_batches(
        run.config, load_index(run.config.data.root), rank=0, world_size=1, start=20, stop=24
    )
    assert [each["keys"] for each in interventions][1] == next(batches).keys
    batches.close()


def test_a_spike_is_skipped_and_gradients_that_stay_long_do_not_freeze_the_training(
    home: Home, tmp_path: Path
) -> None:
    rare = [f"cadence.{what}_images=1000" for what in ("log", "evaluate", "checkpoint")]
    run = Launches(home, tmp_path, "train.total_images=480", *rare)
    longer = partial(break_gradient, factor=1e5)
    assert run.launch({160: longer, **dict.fromkeys(range(240, 480, 4), longer)}) == "finished"
    assert run.done == [("skip", images, None) for images in (164, 244, 248, 252, 256)] + [
        ("clip", 260, None)
    ]
    assert all("gradient's norm" in each["reason"] for each in run.last.record["interventions"])
    # All others were made, with gradients shortened to what they were before.
    assert run.last.record["updates"] == 120 - 6
    assert all(tensor.isfinite().all() for tensor in run.last.load("model").values())


# -- roll back --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled_back(shared_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """A run that went through the episode without an interruption."""
    run = Launches(shared_home, tmp_path_factory.mktemp("whole"), *OFTEN)
    assert run.launch(EPISODE) == "finished"
    return run


def test_weights_come_back_from_before_the_onset_and_images_go_on(rolled_back: Launches) -> None:
    # One of 20 images existed: but what was suspicious at 20 may have been its weights.
    assert {found.images_seen for found in checkpoints(rolled_back.url)} == {4, 8, 12, 16, 40, 44, 48}
    assert rolled_back.done[:-1] == [("skip", images, None) for images in (24, 28, 32, 36)]
    assert rolled_back.done[-1] == ("roll_back", 40, 16)
    before, after = (open_attempt(rolled_back.url, images, 1) for images in (16, 40))
    expected, found = tensors(before), tensors(after)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert after.record["condition"] == before.record["condition"]
    assert rolled_back.last.record["updates"] == 4 + 2


def test_weights_of_another_batch_size_come_back_without_its_losses(home: Home, tmp_path: Path) -> None:
    """Of larger batches they scatter less: what is healthy now would lie beyond their limits."""
    large = Launches(home, tmp_path, *OFTEN)
    assert large.launch({12: stop}) == "stopped"
    assert len(large.last.record["condition"]["losses"]) == 4
    small = Launches(home, tmp_path, "train.batch_size=2", "cadence.checkpoint_images=1000")
    assert small.launch(dict.fromkeys(range(20, 30, 2), break_image)) == "finished"
    assert small.done[-1] == ("roll_back", 30, 16)
    assert len(small.last.record["condition"]["losses"]) == (48 - 30) // 2


@pytest.mark.parametrize("where", [pytest.param(20, marks=pytest.mark.campaign), 28])
def test_a_run_stopped_amid_an_episode_goes_on_as_if_it_had_not_been(
    home: Home, tmp_path: Path, rolled_back: Launches, where: int
) -> None:
    run = Launches(home, tmp_path, *OFTEN)

    def stop_and_break(at: Injecting) -> None:
        stop(at)
        break_image(at)

    assert run.launch({**EPISODE, where: stop_and_break}) == "stopped"
    # Newer than the one to go back to, but saved amid the trouble.
    assert (run.last.images_seen, run.last.sound) == (where + 4, False)
    sound = newest(run.url, before(where + 5))
    assert sound is not None
    assert sound.images_seen == 20
    assert run.launch(EPISODE) == "finished"
    assert_same(rolled_back.last, run.last)


@pytest.mark.parametrize("where", [pytest.param(32, marks=pytest.mark.campaign), 40])
def test_a_run_that_crashed_in_an_episode_or_after_it_takes_the_same_decisions(
    home: Home, tmp_path: Path, rolled_back: Launches, where: int
) -> None:
    run = Launches(home, tmp_path, *OFTEN)
    with pytest.raises(CrashError):
        run.launch({**EPISODE, where: crash})
    # A rollback is saved at once: a crash after it does not lead back into the trouble.
    assert run.last.images_seen == (40 if where == 40 else 20)
    assert run.launch(EPISODE) == "finished"
    assert_same(rolled_back.last, run.last)


def test_a_rollback_goes_to_no_checkpoint_that_an_earlier_one_left_behind(rolled_back: Launches) -> None:
    """The trouble comes again at once: what was seen between 16 and 40 images did not help then."""
    done = from_record(rolled_back.last.record["interventions"])
    for at_most, expected in ((48, 48), (47, 44), (39, 16), (15, 12)):
        found = newest(rolled_back.url, before(at_most + 1, done))
        assert found is not None
        assert found.images_seen == expected
    assert newest(rolled_back.url, before(4, done)) is None


def test_broken_weights_are_not_saved_not_even_when_the_run_is_stopped(home: Home, tmp_path: Path) -> None:
    run = Launches(home, tmp_path, *OFTEN)

    def stop_and_break(at: Injecting) -> None:
        stop(at)
        break_weight(at)

    assert run.launch({20: stop_and_break}) == "stopped"
    assert run.last.images_seen == 20
    assert run.last.sound
    # They break again, and come back from a checkpoint.
    assert run.launch({20: break_weight}) == "finished"
    assert run.done[-1] == ("roll_back", 40, 16)
    assert all(tensor.isfinite().all() for tensor in run.last.load("ema").values())


def test_trouble_before_the_first_checkpoint_begins_anew(home: Home, tmp_path: Path) -> None:
    run = Launches(home, tmp_path, "cadence.checkpoint_images=8", "checkpoint.keep=20")
    assert run.launch({4: break_weight}) == "finished"
    assert run.done[-1] == ("roll_back", 24, 0)
    begun = TrainState.create(run.config, LocalWorker(), None, None)
    again = open_attempt(run.url, 24, 1)
    for file, expected in begun.tensors().items():
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.load(file).items())
    assert again.load("optimizer") == {}
    assert again.record["updates"] == 0


def test_a_training_is_not_begun_anew_while_there_is_a_sound_checkpoint_of_it(
    home: Home, tmp_path: Path
) -> None:
    run = Launches(home, tmp_path, *OFTEN)
    assert run.launch({16: stop}) == "stopped"
    for older in (4, 8, 12, 16):
        shutil.rmtree(tmp_path / f"checkpoints/{older:012d}-001")
    # The only one left is of the onset itself.
    assert run.launch(EPISODE) == "finished"
    assert run.done[-1] == ("roll_back", 40, 20)
    assert run.last.record["updates"] == 5 + 2


def test_what_follows_a_rollback_has_other_noise_and_what_softens_gentler_coefficients(home: Home) -> None:
    config = home.config(f"data.root={home.store}/data/tiny")
    worker, data = LocalWorker(torch.device("cpu")), load_index(config.data.root)
    batches = training_batches(config, data, rank=0, world_size=1, start=0, stop=4)
    batch = next(batches)
    batches.close()
    training = Training(config, data, worker, NullTracker(), None)

    def loss(*interventions: Intervention) -> tuple[float, float]:
        state = TrainState.create(config, worker, None, None)
        state.interventions = list(interventions)
        state.counts = Counter(each.kind for each in interventions)
        metrics = Metrics(worker, config.model, Machine(worker.device, {}))
        result = step(training, state, state.model, batch, metrics)
        return result.reading.loss, metrics.reduce()["schedule/spectral_coefficient"]

    plain = loss()
    skipped = loss(Intervention(Kind.SKIP, 0, ""))
    back = loss(Intervention(Kind.ROLL_BACK, 0, "", back_to=0))
    softened = loss(Intervention(Kind.SOFTEN, 0, "", back_to=0, spectral_factor=3.0))
    assert skipped == plain
    assert back[0] != plain[0]
    assert (softened[0], softened[1]) == (back[0], pytest.approx(3 * plain[1]))


def test_weights_that_do_not_evaluate_to_numbers_are_where_trouble_begins(home: Home, tmp_path: Path) -> None:
    often = (*OFTEN[:2], "cadence.evaluate_images=24", "train.total_images=72")
    run = Launches(home, tmp_path, *often)
    # A finite statistic that only an evaluation uses: updates go on as if nothing were wrong.
    trouble: dict[Any, Injection] = {
        20: partial(break_statistic, value=-1e6),
        **dict.fromkeys(range(36, 56, 4), break_image),
    }
    found: list[Checkpoint] = []
    trouble[28] = lambda _: found.append(run.last)
    assert run.launch(trouble) == "finished"
    assert (run.done[0], run.done[-1]) == (("skip", 40, None), ("roll_back", 56, 20))
    assert (found[0].images_seen, found[0].sound) == (24, False)
    assert found[0].metrics["validation/bits_per_dim"] is None
    assert run.last.sound
    assert run.last.record["best"] == run.last.metrics["validation/bits_per_dim"]


@pytest.mark.campaign
def test_a_model_that_does_not_evaluate_to_numbers_is_not_registered(home: Home) -> None:
    rare = ("cadence.evaluate_images=1000", "cadence.checkpoint_images=8", "stability.enabled=false")
    worker = Injecting(LocalWorker(), {16: partial(break_statistic, value=-1e6)})
    end = home.train("silent", *rare, "train.total_images=32", worker=worker)
    # Nothing was measured before the end; of those at 16, 24 and 32 images only the first is from before.
    assert (end["state"], end["result"]["images_seen"]) == ("finished", 16)
    assert "The checkpoint at 24 images does not evaluate to numbers." in worker.lines
    worker = Injecting(LocalWorker(), {0: partial(break_statistic, value=-1e6)})
    with pytest.raises(RunError, match="none is intact and evaluates to numbers"):
        home.train("mute", *rare, "train.total_images=8", worker=worker)


# -- give up ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, pytest.param(3, marks=pytest.mark.campaign)])
def test_a_short_training_that_does_nothing_but_diverge_is_given_up_too(
    home: Home, tmp_path: Path, keep: int
) -> None:
    """A twentieth of it is over before the next rollback; copies push out no older checkpoint."""
    run = Launches(home, tmp_path, "train.total_images=400", *OFTEN, f"checkpoint.keep={keep}")
    trouble = dict.fromkeys(range(20, 400, 4), break_image)
    # The budget is part of the state: the same command does not get another one.
    for _ in range(2):
        with pytest.raises(DivergedError, match="at 100 images, after 3 rollbacks"):
            run.launch(trouble)
    assert [kind for kind, _, _ in run.done if kind != "skip"] == ["roll_back", "soften", "soften"]
    # Every one of them a little later: images never go back.
    assert [(images, back) for kind, images, back in run.done if kind != "skip"] == [
        (40, 16),
        (60, 16),
        (80, 16),
    ]


def test_a_spent_budget_ends_the_run_with_its_samples_named_and_its_last_good_checkpoint_registered(
    home: Home,
) -> None:
    settings = (
        "train.total_images=96",
        "stability.skips_in_a_row=2",
        "stability.max_rollbacks=2",
        "stability.recovery_fraction=1",
        "cadence.evaluate_images=16",
    )
    trouble = dict.fromkeys(range(28, 96, 4), break_image)
    end = home.train("hopeless", *settings, worker=Injecting(LocalWorker(), trouble))
    assert end["state"] == "diverged"
    url = Path(home.run_url("hopeless"))
    kept = newest(str(url))
    assert kept is not None
    done = kept.record["interventions"]
    assert [each["kind"] for each in done] == ["skip", "roll_back", "skip", "soften"]
    assert [each["back_to"] for each in done if each["back_to"] is not None] == [16, 16]

    assert "2 updates in a row were skipped; the last one: not finite:" in end["reason"]
    assert "at 52 images, after 2 rollbacks" in end["reason"]
    samples = json.loads((url / "files/stability/000000000052-give_up.json").read_text())["keys"]
    assert len(samples) == 4
    assert all(key in end["reason"] for key in samples)
    record = json.loads((url / "run.json").read_text())
    assert (record["state"], record["reason"]) == ("diverged", end["reason"])

    result = record["result"]
    # Those of 36 and 44 are what followed from it and was given up.
    assert result["images_seen"] == 16
    client = MlflowClient(home.tracking)
    version = client.get_model_version("nvae-hopeless", result["model"].rpartition("/")[2])
    assert version.tags["run.diverged"] == "true"
    tags = client.get_run(result["mlflow_run_id"]).data.tags
    assert (tags["stability.roll_back"], tags["stability.soften"], tags["stability.give_up"]) == (
        "2",
        "1",
        "1",
    )


def test_damage_that_leaves_nothing_to_go_back_to_ends_the_run_and_what_is_intact_is_registered(
    home: Home,
) -> None:
    often = ("cadence.checkpoint_images=12", "train.total_images=96")
    assert home.train("rotten", *often, worker=Injecting(LocalWorker(), {8: stop}))["state"] == "stopped"
    url = Path(home.run_url("rotten"))

    def damage_and_break(at: Injecting) -> None:
        (url / "checkpoints/000000000012-001/model.safetensors").write_bytes(b"")
        break_image(at)

    trouble = {24: damage_and_break, **dict.fromkeys(range(28, 96, 4), break_image)}
    end = home.train("rotten", *often, worker=Injecting(LocalWorker(), trouble))
    assert (end["state"], EXIT_CODES[end["state"]]) == ("diverged", 3)
    assert "in trouble since 24 images and cannot go back to before" in end["reason"]
    assert "Damaged: 000000000012-001" in end["reason"]
    # No update was made since: that of 24 is as good as it was.
    assert end["result"]["images_seen"] == 24
    assert end["result"]["model"] == "models:/nvae-rotten/1"
