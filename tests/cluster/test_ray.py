"""Two real Ray Train workers: what they train, what becomes of their failures, what a user sees."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import launch as launch_module
from cluster.failures import MAX_ERRORS
from cluster.launch import launch
from cluster.nodes import ray_connection
from pipeline import config_file, run, run_folder
from pipeline.errors import FailedError
from pipeline.preparation import settle
from pipeline.run_folder import RunError
from pipeline.training.checkpoint import images_saved, newest
from pipeline.training.worker import LocalWorker
from tests.cluster.entries import few_updates
from tests.tiny_run import NVAE, Home, nvae, points

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two workers on this machine, started once."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_connection(workers=2):
            yield


def launched(
    home: Home, entry: str, arguments: dict[str, Any], said: list[str], **more: Any
) -> dict[str, Any]:
    url = home.run_url(entry)
    return launch(
        f"tests.cluster.entries:{entry}", arguments, widths=(2,), run_url=url, say=said.append, **more
    )


@pytest.mark.campaign
def test_two_workers_see_the_images_of_one_and_stay_one_model(home: Home, cluster: None) -> None:
    """Noise is each image's own, so that all that is learned agrees but for rounding."""
    config = settle(home.config("cadence.log_images=16"), home.store)
    arguments = {"config": config_file.to_mapping(config), "images": 16}
    one = few_updates(arguments, LocalWorker())
    said: list[str] = []
    two = launched(home, "few_updates", arguments, said)
    assert said == ["Worker 1: 2 samples smell"]
    assert two["images"] == one["images"]
    assert two["images_seen"] == one["images_seen"] == 16
    assert two["apart"] == 0
    learned = [name for name in one["metrics"] if name.startswith(("schedule/", "train/"))]
    assert {"schedule/learning_rate", "train/loss", "train/gradient_norm", "train/kl_nats"} < set(learned)
    for name in learned:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5), name


@pytest.mark.campaign
def test_a_users_mistake_in_a_worker_reaches_the_user_at_once(
    home: Home, cluster: None, tmp_path: Path, capfd: Capture
) -> None:
    said: list[str] = []
    with pytest.raises(RunError) as refused:
        launched(home, "refuse", {"tries": str(tmp_path)}, said)
    assert str(refused.value) == (
        "2 problems in the configuration:\n  here: train.seed: is odd\n  there: data: is odd"
    )
    assert len(list(tmp_path.iterdir())) == 2, "it was tried again"
    assert said == []
    assert capfd.readouterr().err == ""


@pytest.mark.campaign
def test_what_fails_again_and_again_is_given_up(home: Home, cluster: None, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(FailedError, match="ZeroDivisionError: a bug of ours"):
        launched(home, "fail", {"tries": str(tmp_path)}, said)
    assert len(list(tmp_path.iterdir())) == 2 * (MAX_ERRORS + 1)
    assert len(said) == MAX_ERRORS


@pytest.mark.campaign
def test_a_rank_that_waits_for_its_bucket_is_waited_for(
    home: Home, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would give up after the seconds in which a group has to form."""
    monkeypatch.setattr(launch_module, "FORMING_SECONDS", 10)
    assert launched(home, "wait_long", {"seconds": 15}, []) == {"met": 2}


def test_a_killed_worker_is_replaced_and_no_image_is_lost(home: Home, cluster: None) -> None:
    spec = home.begin("work_killed_once", "train.total_images=80", "cadence.log_images=4", workers=2)
    said: list[str] = []
    end = launched(home, "work_killed_once", vars(spec), said, progress=lambda: images_saved(spec.url))
    assert end["state"] == "finished"
    assert [line for line in said if line.startswith("Lost worker 1")] != []
    continued = [line for line in said if line.startswith("Continuing at")]
    assert len(continued) == 1
    last = newest(spec.url)
    assert last is not None
    assert (last.images_seen, last.record["updates"], last.attempt) == (80, 20, 2)
    assert sorted(at for name, at in points(spec.url) if name == "train/loss") == list(range(4, 81, 4))
    assert not Path(spec.url, "ray").exists()


def test_more_workers_than_the_cluster_has_are_refused(home: Home, cluster: None) -> None:
    with pytest.raises(RunError, match=r"64 workers were asked for, but the cluster has \d+ CPUs"):
        launch("pipeline.run:work", {}, widths=(64,), run_url=home.run_url("many"), say=print)


@pytest.mark.campaign
def test_the_doctor_finds_a_good_place_in_order(home: Home, cluster: None, capsys: Capture) -> None:
    shown = nvae(capsys, "doctor", "tiny.yaml", "--json")
    checks = {check["name"]: check for check in json.loads(shown.out)}
    assert [check for check in checks.values() if not check["ok"]] == []
    assert shown.code == 0
    assert {"ray", "store", "mlflow", "data"} <= checks.keys()


@pytest.mark.campaign
def test_the_doctor_needs_no_training_before(
    home: Home, cluster: None, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = nvae(capsys, "doctor")
    assert shown.code == 0
    assert "the first training creates it" in shown.out


@pytest.mark.campaign
def test_the_doctor_names_a_remedy(home: Home, cluster: None, capsys: Capture) -> None:
    shown = nvae(
        capsys, "doctor", "tiny.yaml", "--json", "--tracking", "http://127.0.0.1:1", "--store", "/proc"
    )
    failed = {check["name"]: check for check in json.loads(shown.out) if not check["ok"]}
    assert shown.code == 1
    assert failed.keys() == {"store", "mlflow", "data"}
    assert all(check["remedy"] and check["found"] for check in failed.values())


@pytest.mark.campaign
def test_an_interrupted_command_continues_at_another_width(home: Home) -> None:
    """Ctrl-C at a terminal reaches every process of the command, Ray's too."""
    command = [NVAE, "train", "tiny.yaml", "train.total_images=4000", "--workers", "2", "--name", "wide"]
    command += ["cadence.evaluate_images=4000", "cadence.checkpoint_images=4000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as training:
        assert training.stderr is not None
        lines = [training.stderr.readline() for _ in range(2)]
        subprocess.run(["kill", "-s", "INT", "--", f"-{training.pid}"], check=True)
        out, err = training.communicate(timeout=300)
    # Nothing but our own lines: the start, log lines, the wish to stop, the end.
    assert training.returncode == 0, err
    assert out == ""
    shown = [*lines, *err.splitlines(keepends=True)]
    assert shown.pop(0) == "Starting 2 Ray Train workers on 2 CPUs ...\n"
    assert shown.pop() == "Stopped. Run the same command again to continue wide.\n"
    others = [line for line in shown if "bits/dim" not in line]
    assert others == [f"{signal.SIGINT.name}: stopping after a checkpoint; once more stops at once\n"]
    assert run_folder.known_record(home.store, "wide").state == "stopped"
    reached = images_saved(home.run_url("wide"))
    assert reached == max(at for _, at in points(home.run_url("wide")))
    end = home.train("wide", f"train.total_images={reached + 8}")
    assert end["state"] == "finished"
    assert images_saved(home.run_url("wide")) == reached + 8
    assert run.registered_name("wide", home.config()) in end["result"]["model"]
