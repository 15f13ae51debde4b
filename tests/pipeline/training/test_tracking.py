import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import storage
from pipeline.training import courier, delivery
from pipeline.training.journal import Journal
from pipeline.training.mlflow_client import Client
from pipeline.training.pace import PERSON_LIMIT_SECONDS, Pace
from pipeline.training.run_description import TrackingError, redact
from pipeline.training.tracking import (
    DeliveryError,
    NullTracker,
    RunTracker,
    Tracker,
    conclude,
    create_run,
    default_tracking_uri,
    nest,
    replay,
    undelivered,
)
from tests.fault_proxy import FaultProxy
from tests.http_faults import Fail, Reset
from tests.mlflow_server import MlflowServer

PNG = b"\x89PNG not really"


@pytest.fixture
def sqlite(empty_mlflow: str) -> str:
    return empty_mlflow


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "faces")


def create(tracking_uri: str, run: str, **changes: Any) -> str:
    arguments = {
        "run_url": run,
        "experiment": "nvae",
        "run_name": "faces",
        "parameters": {"train.seed": 1, "objective.spectral_coefficient": 0.01},
        "tags": {"data.hash": "abc"},
    }
    return create_run(tracking_uri, **(arguments | changes))


def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri)


def points(tracking_uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(images seen, value) of every point that MLflow stores, doubled ones twice."""
    history = client(tracking_uri).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def artifacts(tracking_uri: str, run_id: str, folder: str) -> set[str]:
    return {file.path for file in client(tracking_uri).list_artifacts(run_id, folder)}


# -- making a run -----------------------------------------------------------------------


def test_parameters_and_tags_are_in_mlflow_under_their_own_names(sqlite: str, run: str) -> None:
    parameters = {
        "train.seed": 1,
        "data.root": "s3://bucket/faces",
        "data.horizontal_flip": True,
        "train.micro_batch_size": None,
        "model.groups_per_scale": [4, 4, 8],
        "objective.spectral_coefficient": 1e-5,
        **{f"many.number_{i}": i for i in range(250)},
    }
    run_id = create(sqlite, run, parameters=parameters)
    found = client(sqlite).get_run(run_id)
    assert found.data.params == {
        "train.seed": "1",
        "data.root": "s3://bucket/faces",
        "data.horizontal_flip": "true",
        "train.micro_batch_size": "null",
        "model.groups_per_scale": "[4, 4, 8]",
        "objective.spectral_coefficient": "1e-05",
        **{f"many.number_{i}": str(i) for i in range(250)},
    }
    assert found.data.tags["data.hash"] == "abc"
    assert found.info.run_name == "faces"
    assert found.info.status == "RUNNING"


def test_a_run_that_is_created_again_is_the_same_and_keeps_its_parameters(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    client(sqlite).set_terminated(run_id, "KILLED")
    again = create(sqlite, run, parameters={"train.seed": 2, "train.precision": "bf16"}, tags={"code": "2"})
    assert again == run_id
    found = client(sqlite).get_run(run_id)
    assert found.data.params["train.seed"] == "1"
    assert found.data.params["train.precision"] == "bf16"
    assert found.data.tags["code"] == "2"
    assert found.info.status == "RUNNING"


def test_a_run_is_put_below_another_that_was_not_known_when_it_began(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    nest(run, NOWHERE, "parent")  # what does not arrive is not taken for done
    nest(run, sqlite, "parent")
    found = client(sqlite).get_run(run_id)
    assert found.data.tags["mlflow.parentRunId"] == "parent" and found.data.tags["data.hash"] == "abc"
    assert conclude(run, sqlite, "FINISHED") == run_id
    nest(run, sqlite, "parent")
    assert client(sqlite).get_run(run_id).info.status == "FINISHED"
    nest(f"{run}-without-folder", sqlite, "parent")  # a trial that was never started


def test_values_that_are_too_long_for_mlflow_are_cut(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run, parameters={"long": "x" * 7000}, tags={"long": "y" * 9000})
    found = client(sqlite).get_run(run_id)
    assert found.data.params["long"] == "x" * 5999 + "…"
    assert len(found.data.tags["long"]) == 8000


def test_runs_of_the_same_name_in_different_folders_are_different_runs(sqlite: str, tmp_path: Path) -> None:
    assert create(sqlite, str(tmp_path / "a")) != create(sqlite, str(tmp_path / "b"))


def test_artifacts_of_a_local_store_lie_beside_its_database(sqlite: str, run: str) -> None:
    found = client(sqlite).get_run(create(sqlite, run))
    store = Path(sqlite.removeprefix("sqlite:///")).parent
    assert found.info.artifact_uri.startswith((store / "mlartifacts").as_uri())


def test_the_default_tracking_server_is_a_file_beside_a_local_store() -> None:
    assert default_tracking_uri("/data/store") == "sqlite:////data/store/mlflow.db"
    assert default_tracking_uri("s3://bucket/store") == f"sqlite:///{Path.cwd()}/nvae-store/mlflow.db"


@pytest.mark.parametrize("uri", ["", "htp://host", "mlflow", "pipe:touch x", "s3://bucket"])
def test_an_address_that_mlflow_cannot_have_is_the_users_mistake(uri: str, run: str) -> None:
    with pytest.raises(TrackingError, match="no address of MLflow"):
        create(uri, run)


# -- secrets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pa55word@host/x", "https://host/x"),
        ("https://user:p@ss@host/x", "https://host/x"),
        ("no https://tok3n@host and s3://a:b@c/d", "no https://host and s3://c/d"),
        ("https://h/x?X-Amz-Signature=abc&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?y=1&AWSAccessKeyId=abc", "https://h/x?y=1&AWSAccessKeyId=***"),
        ("mail me@example.org", "mail me@example.org"),
        ("s3://bucket/faces256", "s3://bucket/faces256"),
    ],
)
def test_passwords_and_signatures_are_left_out(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_no_secret_reaches_mlflow_or_the_journal(sqlite: str, run: str) -> None:
    secret = "hunter2"
    url = f"https://me:{secret}@host/data?token={secret}"
    run_id = create(sqlite, run, parameters={"data.root": url, "list": [url]}, tags={"from": url})
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        tracker.tag("source", url)
    found = client(sqlite).get_run(run_id)
    assert secret not in f"{found.data.params} {found.data.tags}"
    for file in Path(run).rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file


# -- delivery ---------------------------------------------------------------------------


def test_points_pictures_files_tags_and_the_end_arrive(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in (100, 200, 300):
            tracker.log({"train/loss": at / 100, "train/kl_nats/group_03": 0.5}, at=at)
        tracker.log({"validation/bits_per_dim": math.nan, "train/gradient_norm": math.inf}, at=300)
        tracker.picture("samples", PNG, at=300)
        tracker.file("model/config.json", b"{}")
        tracker.tag("ray.job", "first")
        tracker.tag("ray.job", "second")
        tracker.status("FINISHED")
    assert points(sqlite, run_id, "train/loss") == [(100, 1.0), (200, 2.0), (300, 3.0)]
    assert points(sqlite, run_id, "train/kl_nats/group_03") == [(100, 0.5), (200, 0.5), (300, 0.5)]
    found = client(sqlite).get_run(run_id)
    assert math.isnan(found.data.metrics["validation/bits_per_dim"])
    assert found.data.metrics["train/gradient_norm"] > 1e300
    assert found.data.tags["ray.job"] == "second"
    assert found.info.status == "FINISHED"
    assert artifacts(sqlite, run_id, "pictures") == {"pictures/samples-000000000300.png"}
    assert artifacts(sqlite, run_id, "model") == {"model/config.json"}
    assert (Path(run) / "pictures" / "samples-000000000300.png").read_bytes() == PNG


def test_delivering_everything_again_stores_nothing_twice(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in range(600):
            tracker.log(
                {"train/loss": math.nan if at == 7 else 1.0 / (at + 1), "train/nelbo_nats": 1.0}, at=at
            )
    for state in Path(run, "journal").glob("delivered-*"):
        state.unlink()
    RunTracker(run, 2, sqlite, run_id).close()
    for _ in range(2):
        assert replay(run, sqlite, "RUNNING").points == 1200
    assert len(points(sqlite, run_id, "train/loss")) == 600
    assert len(points(sqlite, run_id, "train/nelbo_nats")) == 600


def test_points_that_a_later_launch_computes_again_are_dropped(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in (100, 200, 300):
            tracker.log({"train/loss": 1.0}, at=at)
    with RunTracker(run, 2, sqlite, run_id) as tracker:
        for at in (200, 300, 400):
            tracker.log({"train/loss": 2.0, "train/nelbo_nats": 3.0}, at=at)
    assert points(sqlite, run_id, "train/loss") == [(100, 1.0), (200, 1.0), (300, 1.0), (400, 2.0)]
    assert points(sqlite, run_id, "train/nelbo_nats") == [(200, 3.0), (300, 3.0), (400, 3.0)]


def test_that_an_earlier_launch_was_killed_does_not_end_the_run_of_a_later_one(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    first = Journal(run, 1)  # A launch that could deliver nothing.
    first.note("metrics", at=100, values={"train/loss": 1.0})
    first.note("status", value="KILLED")
    first.close()
    with RunTracker(run, 2, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 2.0}, at=200)
    assert points(sqlite, run_id, "train/loss") == [(100, 1.0), (200, 2.0)]
    assert client(sqlite).get_run(run_id).info.status == "RUNNING"


def test_what_mlflow_refuses_for_good_is_left_out_and_the_rest_arrives(
    sqlite: str, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in (1, 2):
            tracker.log({"train/loss": 1.0, "what?": 2.0, "train/nelbo_nats": 3.0}, at=at)
        tracker.tag("x" * 300, "too long a key")
        tracker.tag("code.version", "1")
    assert points(sqlite, run_id, "train/loss") == [(1, 1.0), (2, 1.0)]
    assert points(sqlite, run_id, "train/nelbo_nats") == [(1, 3.0), (2, 3.0)]
    assert client(sqlite).get_run(run_id).data.tags["code.version"] == "1"
    assert caplog.text.count("MLflow refuses what?") == 1


KILLED = """
import os, signal, sys
from pipeline.training.tracking import RunTracker
tracker = RunTracker(sys.argv[1], 1, sys.argv[2], sys.argv[3])
for at in range(400):
    tracker.log({"train/loss": float(at)}, at=at)
tracker.picture("samples", b"png", at=400)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_next_launch_delivers_what_the_killed_one_noted(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    died = subprocess.run([sys.executable, "-c", KILLED, run, sqlite, run_id], timeout=60)
    assert died.returncode == -signal.SIGKILL
    with RunTracker(run, 2, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 0.5}, at=399)
        tracker.log({"train/loss": 400.0}, at=400)
    assert points(sqlite, run_id, "train/loss") == [(at, float(at)) for at in range(401)]
    assert artifacts(sqlite, run_id, "pictures") == {"pictures/samples-000000000400.png"}


NOWHERE = "http://user:hunter2@127.0.0.1:9"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses connections is given up at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.training.tracking.REPLAY_FAILURES", 2)


def test_a_journal_can_be_replayed_to_a_server_that_never_heard_of_the_run(
    sqlite: str, run: str, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert create(NOWHERE, run) == ""
        with RunTracker(run, 1, NOWHERE) as tracker:
            tracker.log({"train/loss": 1.0}, at=100)
            tracker.picture("samples", PNG, at=100)
            tracker.tag("ray.job", "first")
            tracker.status("FAILED")
            tracker.close(timeout_seconds=0)
    assert "Training goes on" in caplog.text
    assert "lacks 1 points and 1 files" in caplog.text
    assert "`nvae track replay faces`" in caplog.text
    said: list[str] = []
    with pytest.raises(DeliveryError, match=r"It lacks 1 points and 1 files\. Repeat this") as refused:
        replay(run, NOWHERE, "FINISHED", said.append)
    assert "trying again" in said[0]
    assert refused.value.__cause__ is None
    for text in (caplog.text, str(refused.value), *said):
        assert "hunter2" not in text
    for _ in range(2):
        replayed = replay(run, sqlite, "FINISHED")
        assert replayed.points == 1
        found = client(sqlite).get_run(replayed.run_id)
        assert found.info.status == "FINISHED"
        assert found.data.params["train.seed"] == "1"
        assert found.data.tags["ray.job"] == "first"
    assert create(sqlite, run) == replayed.run_id
    assert points(sqlite, replayed.run_id, "train/loss") == [(100, 1.0)]
    assert artifacts(sqlite, replayed.run_id, "pictures") == {"pictures/samples-000000000100.png"}


def test_a_folder_without_journal_has_nothing_to_replay(sqlite: str, run: str) -> None:
    with pytest.raises(TrackingError, match="is it the folder of a run"):
        replay(run, sqlite, "FINISHED")


def test_a_replay_beside_a_running_launch_doubles_nothing(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in range(0, 300, 3):
            for each in range(at, at + 3):
                tracker.log({"train/loss": float(each)}, at=each)
            if at % 100 == 0:
                tracker.sync()
                assert replay(run, sqlite, "RUNNING").run_id == run_id
    assert points(sqlite, run_id, "train/loss") == [(at, float(at)) for at in range(300)]


def test_the_driver_tells_mlflow_how_a_run_ended_whose_first_rank_could_not(
    sqlite: str, run: str, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = create(sqlite, run)
    killed = Journal(run, 1)  # Rank 0, killed before it delivered anything.
    killed.note("metrics", at=100, values={"train/loss": 1.0})
    killed.close()
    assert undelivered(run, sqlite).points == 1
    assert conclude(run, sqlite, "FAILED") == run_id
    assert points(sqlite, run_id, "train/loss") == [(100, 1.0)]
    assert client(sqlite).get_run(run_id).info.status == "FAILED"
    assert not undelivered(run, sqlite)
    assert conclude(run, NOWHERE, "FAILED") == ""
    assert "`nvae track replay faces` tells it" in caplog.text
    assert "hunter2" not in caplog.text
    with RunTracker(run, 2, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 2.0}, at=200)
    assert client(sqlite).get_run(run_id).info.status == "RUNNING"


# -- what MLflow loses ------------------------------------------------------------------


def test_a_run_that_is_deleted_in_mlflow_while_it_runs_is_made_again_with_all_its_points(
    sqlite: str, run: str
) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 1.0}, at=1)
        tracker.picture("samples", PNG, at=1)
        tracker.sync()
        wait_until(lambda: points(sqlite, run_id, "train/loss") == [(1, 1.0)])
        client(sqlite).delete_run(run_id)
        tracker.log({"train/loss": 2.0}, at=2)
        tracker.status("FINISHED")
    assert tracker.run_id != run_id
    assert points(sqlite, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert artifacts(sqlite, tracker.run_id, "pictures") == {"pictures/samples-000000000001.png"}
    assert client(sqlite).get_run(tracker.run_id).info.status == "FINISHED"


def wait_until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_points_that_mlflow_took_and_lost_are_sent_again_at_the_end(
    sqlite: str, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a proxy that answers 200 to everything."""
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 1.0, "train/nelbo_nats": 3.0}, at=1)
        tracker.log({"train/loss": 2.0}, at=2)
        tracker.sync()
        wait_until(lambda: len(points(sqlite, run_id, "train/loss")) == 2)
        delete_points(sqlite, run_id, "step = 1")
    assert "lost 2 points that it had taken" in caplog.text
    assert points(sqlite, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert points(sqlite, run_id, "train/nelbo_nats") == [(1, 3.0)]


def delete_points(database: str, run_id: str, where: str) -> None:
    """What MLflow has no request for."""
    import sqlite3

    with sqlite3.connect(database.removeprefix("sqlite:///")) as connection:
        for table in ("metrics", "latest_metrics"):
            connection.execute(f"delete from {table} where run_uuid = ? and ({where})", (run_id,))


@pytest.mark.parametrize("damage", ["journal", "state", "both", "description"])
def test_a_damaged_journal_costs_what_is_damaged_and_doubles_nothing(
    sqlite: str, run: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        for at in range(4):
            tracker.log({"train/loss": float(at)}, at=at)
    journal = Path(run, "journal")
    if damage in ("journal", "both"):
        (segment,) = journal.glob("*.jsonl")
        data = bytearray(segment.read_bytes())
        data[10] ^= 1  # The first line; the second is cut off in its middle, with all behind it.
        segment.write_bytes(data[: 3 * len(data) // 8])
    if damage in ("state", "both"):
        (state,) = journal.glob("delivered-*")
        state.write_bytes(state.read_bytes()[:-5])
    if damage == "description":
        Path(journal, "mlflow.json").write_bytes(b"{")
        assert create(sqlite, run) == run_id
        for state in journal.glob("delivered-*"):
            state.unlink()
    with RunTracker(run, 2, sqlite) as tracker:
        for at in range(6):
            tracker.log({"train/loss": 9.0}, at=at)
    assert tracker.run_id == run_id
    assert points(sqlite, run_id, "train/loss") == [(at, float(at) if at < 4 else 9.0) for at in range(6)]
    assert "damaged" in caplog.text


def test_empty_runs_whose_making_mlflow_never_confirmed_are_deleted(sqlite: str, run: str) -> None:
    run_id = create(sqlite, run)
    made = client(sqlite).get_run(run_id)
    key = made.data.tags[delivery.KEY_TAG]
    stray = client(sqlite).create_run(made.info.experiment_id, tags={delivery.KEY_TAG: key}).info.run_id
    with RunTracker(run, 1, sqlite) as tracker:
        tracker.log({"train/loss": 1.0}, at=1)
    assert tracker.run_id == run_id
    assert client(sqlite).get_run(stray).info.lifecycle_stage == "deleted"
    assert client(sqlite).get_run(run_id).info.lifecycle_stage == "active"


def test_a_run_on_a_real_object_store_is_delivered_and_continued_elsewhere(sqlite: str, s3: str) -> None:
    run = storage.join(s3, f"runs/tracked-{os.getpid()}")
    run_id = create(sqlite, run)
    with RunTracker(run, 1, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 1.0}, at=100)
        tracker.picture("samples", PNG, at=100)
        assert tracker.sync()
    with RunTracker(run, 2, sqlite, run_id) as tracker:
        tracker.log({"train/loss": 9.0}, at=100)
        tracker.log({"train/loss": 2.0}, at=200)
    assert points(sqlite, run_id, "train/loss") == [(100, 1.0), (200, 2.0)]
    assert artifacts(sqlite, run_id, "pictures") == {"pictures/samples-000000000100.png"}


def test_ranks_that_do_not_track_accept_every_call() -> None:
    tracker: Tracker = NullTracker()
    tracker.log({"train/loss": 1.0}, at=1)
    tracker.picture("samples", PNG, at=1)
    tracker.file("x", b"")
    tracker.tag("x", "y")
    tracker.status("FINISHED")
    assert tracker.sync()


# -- outages of a real server -----------------------------------------------------------


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """In front of a real MLflow server."""
    with FaultProxy(mlflow_server.url) as proxy:
        yield proxy


def test_a_server_that_is_away_at_the_start_in_the_middle_and_busy_gets_every_point_once(
    proxy: FaultProxy, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """More outages, each through a whole training: tests/faults/test_tracking.py."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(courier, "POLL_SECONDS", 0.1)
    caplog.set_level(logging.WARNING)
    proxy.add(Reset())
    assert create(proxy.url, run) == ""
    tracker = RunTracker(run, 1, proxy.url)
    slowest = 0.0
    for at in range(120):
        if at == 40:
            proxy.clear()
            wait_until(lambda: tracker.run_id != "")
        if at == 80:
            busy = proxy.add(Fail(503))
        began = time.perf_counter()
        tracker.log({"train/loss": float(at), "train/nelbo_nats": math.nan}, at=at)
        slowest = max(slowest, time.perf_counter() - began)
    wait_until(lambda: busy.struck >= 2)
    proxy.clear()
    tracker.picture("samples", PNG, at=600)
    tracker.status("FINISHED")
    assert tracker.close(timeout_seconds=60)
    run_id = tracker.run_id
    assert points(proxy.url, run_id, "train/loss") == [(at, float(at)) for at in range(120)]
    assert len(points(proxy.url, run_id, "train/nelbo_nats")) == 120
    assert artifacts(proxy.url, run_id, "pictures") == {"pictures/samples-000000000600.png"}
    found = client(proxy.url).get_run(run_id)
    assert (found.info.status, found.data.params["train.seed"]) == ("FINISHED", "1")
    assert slowest < 0.1  # Noting takes 0.1 ms; a busy machine may suspend the thread.
    assert 1 <= caplog.text.count("cannot be delivered") <= 2


def test_of_several_who_ask_at_once_the_most_patient_sets_the_time_limit(sqlite: str) -> None:
    """MLflow has one limit for the whole process: the registry's must not be cut by the curves'."""

    def limit(_: object) -> str:
        return os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    curves, registry = Client(sqlite), Client(sqlite, Pace(PERSON_LIMIT_SECONDS))
    assert curves.ask(limit) == "5"
    assert registry.ask(lambda _: (curves.ask(limit), limit(_))) == ("20", "20")
    assert curves.ask(limit) == "5"


def test_mlflow_is_imported_by_the_delivery_alone() -> None:
    assert delivery.__name__ in sys.modules
    code = "import sys, pipeline.training.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
