"""`nvae track`: journals brought to an MLflow that lacks them."""

import json

import pytest
from mlflow import MlflowClient

from pipeline import lease, run_folder
from tests.mlflow_server import history
from tests.tiny_run import Home, nvae, points

RUN = "tracked"


@pytest.fixture(scope="module")
def trained(shared_home: Home) -> str:
    """A finished run; its folder."""
    shared_home.train(RUN)
    return shared_home.run_url(RUN)


def test_a_journal_is_replayed_to_another_mlflow_once_however_often(
    home: Home, trained: str, capsys: pytest.CaptureFixture[str], empty_mlflow: str
) -> None:
    other = empty_mlflow
    journal = points(trained)
    for _ in range(2):
        replayed = nvae(capsys, "track", "replay", RUN, "--tracking", other)
        assert replayed.code == 0
        assert f"has all {len(journal)} points of {RUN}, in its run" in replayed.out
    run_id = replayed.out.split()[-1].rstrip(".")
    there = history(other, run_id)
    assert {(name, at): value for name, curve in there.items() for at, value in curve} == journal
    assert sum(map(len, there.values())) == len(journal)
    client, home_client = MlflowClient(other), MlflowClient(home.tracking)
    found = client.get_run(run_id)
    original = home_client.get_run(run_folder.known_record(home.store, RUN).mlflow_run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", RUN)
    assert found.data.params == original.data.params
    assert found.data.tags["ray.job_id"] == "local"
    assert {file.path for file in client.list_artifacts(run_id, "pictures")} == {
        file.path for file in home_client.list_artifacts(original.info.run_id, "pictures")
    }
    # The run's own MLflow is what it was.
    assert history(home.tracking, original.info.run_id) == there


def test_status_says_what_each_mlflow_lacks(
    home: Home, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(nvae(capsys, "track", "status", RUN, "--json").out)
    lacking = {row["tracking"]: (row["points"], row["files"]) for row in rows}
    assert lacking[home.tracking] == (0, 0)
    home.begin("unheard", tracking="http://127.0.0.1:9")
    (row,) = json.loads(nvae(capsys, "track", "status", "unheard", "--json").out)
    assert (row["tracking"], row["mlflow_run_id"]) == ("http://127.0.0.1:9", None)
    assert RUN in nvae(capsys, "track", "status").out


def test_a_replay_tells_how_the_run_is(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run whose driver was killed, and of one that somebody is running."""
    home.begin("driverless")
    url = home.run_url("driverless")
    run_id = run_folder.update_record(url, state="running").mlflow_run_id
    client = MlflowClient(home.tracking)
    assert client.get_run(run_id).info.status == "RUNNING"
    with lease.held(url):
        assert "points of driverless so far" in nvae(capsys, "track", "replay", "driverless").out
        assert client.get_run(run_id).info.status == "RUNNING"
    assert nvae(capsys, "track", "replay", "driverless").code == 0
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_server_that_is_away_is_exit_code_1_and_a_mistake_is_2(
    home: Home, trained: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.training.tracking.REPLAY_FAILURES", 1)
    away = nvae(capsys, "track", "replay", RUN, "--tracking", "http://me:hunter2@127.0.0.1:9")
    assert away.code == 1
    assert f"It lacks {len(points(trained))} points and" in away.err
    assert "hunter2" not in away.err + away.out
    for mistake in (["nobody"], [RUN, "--tracking", "ftp://mlflow"]):
        refused = nvae(capsys, "track", "replay", *mistake)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("Error: ")
