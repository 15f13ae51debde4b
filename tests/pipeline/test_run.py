"""A run's life: what refuses to begin, what MLflow is told, what a repeated command does."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import config_file, registration, run, run_folder
from pipeline.data import shards
from pipeline.data.index import ShardError, load_index
from pipeline.errors import InputError
from pipeline.models.export import load_directory
from pipeline.models.names import RegistryError, UnreachableError
from pipeline.models.registry import Registry, load
from pipeline.registration import PATIENCE_SECONDS, NotRegisteredError, Patience
from pipeline.run_folder import RunError
from pipeline.training.checkpoint import checkpoints, images_saved
from pipeline.training.tracking import RunTracker, TrackingError
from pipeline.training.worker import LocalWorker
from tests.injecting import CrashError, Injecting, crash, stop
from tests.tiny_run import Home, nvae, points

RUN = "all-of-it"
NATS = ("nelbo_nats", "reconstruction_nats", "kl_nats", "kl_nats/group_00", "kl_nats/group_01")


@pytest.fixture(scope="module")
def finished(shared_home: Home) -> dict[str, Any]:
    """A run that was trained to its end; how it ended."""
    return shared_home.train(RUN)


def mlflow_run(home: Home, name: str) -> Any:
    record = run_folder.known_record(home.store, name)
    return MlflowClient(home.tracking).get_run(record.mlflow_run_id)


def history(home: Home, name: str, metric: str) -> list[tuple[int, float]]:
    """(images seen, value) of one curve, as MLflow stores it."""
    client, run_id = MlflowClient(home.tracking), mlflow_run(home, name).info.run_id
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def traces(home: Home) -> tuple[set[Path], int]:
    """Everything that a launch could leave: files, and MLflow runs."""
    files = {path for path in home.folder.rglob("*") if "mlflow.db" not in path.name}
    if not Path(home.store, "mlflow.db").exists():
        return files, 0
    client = MlflowClient(home.tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return files, len(client.search_runs(experiments))


# -- what refuses to begin --------------------------------------------------------------


def another_data_set(home: Home) -> str:
    root = f"{home.store}/data/another"
    shards.build("portraits:12", root, image_size=16, validation_fraction=0.25, if_missing=True)
    return root


def data_set_without_a_shard(home: Home) -> str:
    root = Path(home.store, "data", "incomplete")
    if not root.exists():
        shutil.copytree(Path(home.store, "data", "tiny"), root)
        (root / "train-000000.tar").unlink()
    return str(root)


REFUSALS: dict[str, tuple[Callable[[Home], dict[str, Any]], type[InputError], str]] = {
    "another identity": (
        lambda home: {
            "name": RUN,
            "overrides": ["model.latent_channels=3", "train.seed=7", "optimizer.ema_decay=0.5"],
        },
        RunError,
        r"model\.latent_channels: 2 -> 3\n(.|\n)*optimizer\.ema_decay: 0\.9 -> 0\.5\n"
        r"(.|\n)*train\.seed: 1 -> 7\n(.|\n)*give the new run another --name\.$",
    ),
    "another identity of the same shape": (
        lambda home: {"name": RUN, "overrides": ["train.seed=7"]},
        RunError,
        r"train\.seed: 1 -> 7\n(.|\n)*--from models:/nvae-all-of-it/1 --name NEW-NAME",
    ),
    "another data set": (
        lambda home: {"name": RUN, "overrides": [f"data.root={another_data_set(home)}"]},
        RunError,
        r"the data set: content \w{12} -> \w{12}",
    ),
    "another parent": (
        lambda home: {"name": RUN, "parent": "models:/nvae-all-of-it@best"},
        RunError,
        r"--from: None -> 'models:/nvae-all-of-it@best'",
    ),
    "a batch that the workers cannot share": (
        lambda home: {"workers": 3},
        RunError,
        r"train\.batch_size 4 cannot be shared equally by 3 workers; .*train\.batch_size=3",
    ),
    "no data set": (
        lambda home: {"overrides": ["data.root=store:nowhere"]},
        ShardError,
        r"data/nowhere",
    ),
    "a missing shard": (
        lambda home: {"overrides": [f"data.root={data_set_without_a_shard(home)}"]},
        ShardError,
        r"train-000000\.tar is missing\n(.|\n)*nvae shards verify",
    ),
    "images that do not fit": (
        lambda home: {"overrides": ["model.image_size=24"]},
        ShardError,
        r"model\.image_size",
    ),
    "a name that is none": (lambda home: {"name": "../x"}, RunError, "is no name for a run"),
    "no such parent": (
        lambda home: {"parent": "models:/nvae-nobody@best"},
        RegistryError,
        r"no registered model 'nvae-nobody'.*nvae-all-of-it",
    ),
    "a parent of another shape": (
        lambda home: {
            "parent": "models:/nvae-all-of-it@best",
            "overrides": ["model.latent_channels=3", "train.batch_size=8"],
        },
        RunError,
        r"model\.latent_channels: 2 in its weights, 3 here\nGive these",
    ),
    "no address of MLflow": (
        lambda home: {"tracking": "ftp://mlflow"},
        TrackingError,
        r"ftp://mlflow",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_nothing_is_written_when_something_is_wrong(home: Home, finished: dict[str, Any], what: str) -> None:
    asked, kind, message = REFUSALS[what]
    arguments = {"name": "refused", **asked(home)}
    before, record = traces(home), run_folder.read_record(home.run_url(RUN))
    with pytest.raises(kind, match=message):
        home.begin(arguments.pop("name"), *arguments.pop("overrides", []), **arguments)
    assert traces(home) == before
    assert run_folder.read_record(home.run_url(RUN)) == record


def test_a_run_that_somebody_else_ran_meanwhile_does_not_begin(home: Home) -> None:
    prepared = home.prepare("contended")
    home.begin("contended")
    with pytest.raises(RunError, match="by somebody else just now"):
        run.begin(prepared)


# -- what may change --------------------------------------------------------------------


def test_a_resumable_setting_may_change(home: Home) -> None:
    home.train("longer", "train.total_images=16")
    end = home.train("longer", "train.total_images=28", "train.batch_size=6", "cadence.log_images=4")
    assert end["state"] == "finished"
    assert max(at for _, at in points(home.run_url("longer"))) == 28
    record = run_folder.known_record(home.store, "longer")
    assert record.config["train"]["total_images"] == 28
    # Who continues keeps the order of samples with which the run began.
    assert record.config["data"]["lanes"] == 4


def test_a_moved_data_set_is_the_same_data_set(home: Home) -> None:
    home.train("moved", "train.total_images=8")
    elsewhere = f"{home.store}/data/moved"
    shutil.copytree(f"{home.store}/data/tiny", elsewhere)
    end = home.train("moved", "train.total_images=16", f"data.root={elsewhere}")
    assert end["state"] == "finished"


def test_a_parent_is_what_it_was_when_the_run_began(home: Home, finished: dict[str, Any]) -> None:
    best = "models:/nvae-all-of-it@best"
    home.begin("pinned", parent=best)
    record = run_folder.known_record(home.store, "pinned")
    assert (record.parent, record.initial_model) == (best, finished["result"]["model"])
    # The same command continues, and so does one without it.
    assert home.begin("pinned", parent=best).initial_model == record.initial_model
    assert home.begin("pinned").initial_model == record.initial_model


def test_weights_of_a_start_that_was_broken_off_are_not_those_of_the_next(
    home: Home, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = home.train("other-weights", "train.seed=5", "train.total_images=8")["result"]["model"]

    def interrupted(*arguments: Any, **more: Any) -> str:
        raise CrashError

    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(run, "create_run", interrupted)
        home.begin("begun-twice", parent=finished["result"]["model"])
    home.begin("begun-twice", parent=other)
    kept = load_directory(f"{home.run_url('begun-twice')}/initial").model.state_dict()
    wanted = load(other, home.tracking).model.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], kept[name])] == []


# -- what MLflow is told ----------------------------------------------------------------


def test_every_setting_is_a_parameter_under_its_own_path(home: Home, finished: dict[str, Any]) -> None:
    parameters = mlflow_run(home, RUN).data.params
    settings = config_file.leaves(home.config())
    assert parameters.keys() == settings.keys()
    assert parameters["objective.spectral_coefficient"] == str(settings["objective.spectral_coefficient"])
    assert json.loads(parameters["model.groups_per_scale"]) == settings["model.groups_per_scale"]


def test_data_code_and_job_are_tags(home: Home, finished: dict[str, Any]) -> None:
    tags = mlflow_run(home, RUN).data.tags
    assert tags["data.hash"] == load_index(f"{home.store}/data/tiny").content_hash
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+.+)?", tags["code.version"])
    assert tags["ray.job_id"] == "local"
    assert tags["run.url"] == home.run_url(RUN)


def test_the_curves_are_in_images_seen(home: Home, finished: dict[str, Any]) -> None:
    metrics = mlflow_run(home, RUN).data.metrics
    wanted = {f"{split}/{name}" for split in ("train", "validation") for name in (*NATS, "bits_per_dim")} | {
        "train/spectral_penalty",
        "train/batch_norm_penalty",
        "schedule/learning_rate",
        "schedule/kl_coefficient",
        "schedule/spectral_coefficient",
        "speed/images_per_second",
        "data/wait_seconds",
        "checkpoint/delay_seconds",
        "checkpoint/images_since",
    }
    assert wanted - metrics.keys() == set()
    assert [at for at, _ in history(home, RUN, "train/nelbo_nats")] == [8, 16, 24, 32, 40, 48]
    assert [at for at, _ in history(home, RUN, "validation/nelbo_nats")] == [24, 48]


def test_pictures_are_artifacts(home: Home, finished: dict[str, Any]) -> None:
    run_id = mlflow_run(home, RUN).info.run_id
    files = {file.path for file in MlflowClient(home.tracking).list_artifacts(run_id, "pictures")}
    assert files == {
        f"pictures/{what}-{at:012d}.png" for what in ("samples", "reconstructions") for at in (24, 48)
    }
    for picture in finished["result"]["pictures"]:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_registered_with_its_scores(home: Home, finished: dict[str, Any]) -> None:
    result = finished["result"]
    version = Registry(home.tracking).find("models:/nvae-all-of-it@best")
    assert result["alias"] == "models:/nvae-all-of-it@best"
    assert version.score == pytest.approx(result["metrics"]["validation/bits_per_dim"])
    assert (version.run_name, version.run_id) == (RUN, mlflow_run(home, RUN).info.run_id)
    assert mlflow_run(home, RUN).info.status == "FINISHED"


# -- the same command again -------------------------------------------------------------


def test_a_continued_run_has_one_mlflow_run_and_one_curve(home: Home) -> None:
    """Interrupted in the middle, so that points are computed a second time."""
    with pytest.raises(CrashError):
        home.train("continued", "cadence.evaluate_images=48", worker=Injecting(LocalWorker(), {24: crash}))
    first = run_folder.known_record(home.store, "continued")
    assert (first.state, first.reason) == ("failed", "CrashError")
    assert home.train("continued", "cadence.evaluate_images=48")["state"] == "finished"
    second = run_folder.known_record(home.store, "continued")
    assert second.mlflow_run_id == first.mlflow_run_id
    assert (second.state, len(second.launches), second.created) == ("finished", 2, first.created)
    assert [at for at, _ in history(home, "continued", "train/loss")] == [8, 16, 24, 32, 40, 48]


def test_the_last_evaluation_can_be_stopped_and_continued(home: Home) -> None:
    """At its end the training itself no longer stops; the evaluation after it may take days."""
    cadence = ["cadence.log_images=48", "cadence.evaluate_images=48"]
    worker = Injecting(LocalWorker(), {44: stop})
    assert home.train("late", *cadence, worker=worker) == {"state": "stopped", "reason": ""}
    assert images_saved(home.run_url("late")) == 48
    with pytest.raises(RegistryError, match="nvae-late"):
        Registry(home.tracking).versions("nvae-late")
    assert home.train("late", *cadence)["result"]["model"] == "models:/nvae-late/1"
    assert [at for at, _ in history(home, "late", "train/loss")] == [48]


def test_a_finished_run_that_is_repeated_registers_nothing_twice(
    home: Home, finished: dict[str, Any]
) -> None:
    versions = Registry(home.tracking).versions("nvae-all-of-it")
    again = home.train(RUN)
    assert again["result"]["model"] == finished["result"]["model"]
    assert again["result"]["export"] == finished["result"]["export"]
    assert Registry(home.tracking).versions("nvae-all-of-it") == versions
    assert [at for at, _ in history(home, RUN, "train/loss")] == [8, 16, 24, 32, 40, 48]


def test_a_run_whose_mlflow_never_answers_is_finished_and_registered_by_the_next_launch(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.registration.PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(RunTracker.close, "__defaults__", (0.5,))
    command = ["train", "tiny.yaml", "train.total_images=8", "--local", "--name", "untold"]
    ended = nvae(capsys, *command, "--tracking", "http://127.0.0.1:1")
    assert ended.code == 4
    assert "Finished untold, trained at 8 images. The model is not registered: " in ended.err
    record = run_folder.known_record(home.store, "untold")
    assert (record.state, record.result["model"]) == ("finished", None)
    assert "not registered" in record.reason
    assert record.result["checkpoint"] in record.reason
    assert "Run the same command again when MLflow at http://127.0.0.1:1 answers" in record.reason
    trained = checkpoints(home.run_url("untold"))
    again = home.train("untold", "train.total_images=8")
    assert (again["state"], again["reason"]) == ("finished", "")
    assert again["result"]["alias"] == "models:/nvae-untold@best"
    assert [at for at, _ in history(home, "untold", "train/loss")] == [8]
    assert checkpoints(home.run_url("untold")) == trained


def test_a_run_that_waits_for_mlflow_can_be_stopped_and_registered_later(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(RunTracker.close, "__defaults__", (0.5,))
    spec = run.begin(home.prepare("patient", "train.total_images=8", tracking="http://127.0.0.1:1"))
    asked = threading.Event()
    worker = LocalWorker(asked_to_stop=asked.is_set)
    say = worker.say

    def hear(line: str) -> None:
        say(line)
        if "does not take it yet" in line:
            asked.set()

    monkeypatch.setattr(worker, "say", hear)
    end = run.work(vars(spec), worker)
    assert asked.is_set()
    assert end == {"state": "stopped", "reason": ""}


class Clock:
    """Stands in for `time`; waiting takes no time at all."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_patience_with_mlflow_begins_at_the_first_failure_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(registration, "time", clock)
    patience = Patience(LocalWorker(), "http://127.0.0.1:1")

    def mlflow(*answers: str) -> Callable[[], str]:
        left = iter(answers)

        def answer() -> str:
            found = next(left, "away")
            if found == "away":
                raise UnreachableError(found)
            return found

        return answer

    for _ in range(2):
        # The model is evaluated and uploaded before anything is asked.
        clock.now += 2 * PATIENCE_SECONDS
        assert patience.ask(mlflow("away", "there")) == "there"
    clock.now += 2 * PATIENCE_SECONDS
    began = clock.now
    with pytest.raises(NotRegisteredError, match="away"):
        patience.ask(mlflow())
    assert PATIENCE_SECONDS < clock.now - began < PATIENCE_SECONDS + 31
