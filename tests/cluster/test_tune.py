"""Real searches by Ray Tune: every kind of failed trial, a driver that dies, nodes, stops, budgets."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster import tune
from cluster.searching import Plan, wanted
from pipeline import run_folder
from pipeline.search import ledger as ledgers
from pipeline.search.ledger import Trial
from pipeline.search.reading import load
from tests.cluster.processes import command, nodes, wait_for
from tests.cluster.trial_entries import FAULTS, NORM
from tests.mlflow_server import serving
from tests.tiny_run import Home, nvae

SPACE = "  objective.spectral_coefficient: {log_uniform: [1.0e-4, 1]}"
SEARCH = """
run: tiny.yaml
settings:
  train: {{total_images: {total}, stall_seconds: 5}}
  cadence: {{evaluate_images: 16, log_images: 16, checkpoint_images: 16}}
  objective: {{kl_warmup_fraction: 0.1}}
  stability: {{skips_in_a_row: 2, max_rollbacks: 0}}
search: {search}
space:
{space}
"""


def write(home: Home, search: str, space: str = SPACE, total: int = 48) -> str:
    """The file of a search over the tiny run."""
    file = home.folder / "search.yaml"
    file.write_text(SEARCH.format(search=search, space=space, total=total))
    return str(file)


def planned(home: Home, file: str, name: str, **asked: Any) -> Plan:
    given = {"trials": None, "concurrent": 2, "workers": 1, "resources": "", "store": None, "tracking": None}
    return tune.plan(file, [], name, **{**given, **asked})


def trials(home: Home, name: str) -> list[Trial]:
    return ledgers.read_trials(ledgers.folder(home.store, name))


def searched(home: Home, faults: Sequence[str]) -> dict[str, Trial]:
    """The trials of one search, one of each fault."""
    norms = [NORM + FAULTS.index(fault) for fault in faults]
    space = f"  optimizer.gradient_clip_norm: {{choice: {norms}}}"
    file = write(home, "{searcher: grid, scheduler: none, max_restarts: 1}", space)
    plan = replace(planned(home, file, "faults"), entry="tests.cluster.trial_entries:work_with_a_fault")
    assert tune.execute(plan) == 0
    return dict(zip(faults, trials(home, "faults"), strict=True))


def test_a_search_completes_whatever_becomes_of_its_trials(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trial of each fault: each is ranked with its reason, and the good ones are compared."""
    found = searched(home, ["none", "nan", "exception", "out_of_memory", "killed_once"])
    states = {fault: trial.state for fault, trial in found.items()}
    assert states == {
        "none": "finished",
        "nan": "diverged",
        "exception": "failed",
        "out_of_memory": "out_of_memory",
        "killed_once": "finished",
    }
    assert found["exception"].reason == "RuntimeError: the disk is on fire"
    assert found["none"].starts == 1 and found["killed_once"].starts == 2
    for fault in ("none", "killed_once"):
        assert [each.images_seen for each in found[fault].evaluations] == [16, 32, 48]
    # What was lost with a process has cost time, and counts in no comparison.
    times = [each.device_seconds for each in found["killed_once"].evaluations]
    assert times == sorted(times) and found["killed_once"].spent_device_seconds > times[-1]
    # The fault changed nothing but the moment: both learned the same from the same images.
    assert scores(found["none"]) == pytest.approx(scores(found["killed_once"]), abs=1e-6)

    check_report(home, capsys)
    check_mlflow(home, found)


@pytest.mark.campaign
def test_a_trial_that_is_lost_again_and_again_is_given_up(home: Home) -> None:
    found = searched(home, ["none", "hang", "killed"])
    states = {fault: trial.state for fault, trial in found.items()}
    assert states == {"none": "finished", "hang": "hung", "killed": "failed"}
    assert found["killed"].reason == "its process was lost 2 times"
    assert "stacks-" in found["hang"].reason and Path(found["hang"].reason.rpartition(" ")[2]).exists()
    assert found["hang"].starts == 2


def scores(trial: Trial) -> list[float]:
    return [each.score for each in trial.evaluations]


def check_report(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    shown = nvae(capsys, "report", "faults", "--json")
    assert shown.code == 0
    rows = json.loads(shown.out)
    assert [row["state"] for row in rows[:2]] == ["finished", "finished"]
    assert {row["state"] for row in rows[2:]} == {"diverged", "failed", "out_of_memory"}
    assert all(row["bits_per_dim"] is None and row["reason"] for row in rows[2:])
    assert rows[0]["settings"]["optimizer.gradient_clip_norm"] >= NORM and rows[0]["model"]
    assert [each["images_seen"] for each in rows[0]["evaluations"]] == [16, 32, 48]
    page = Path(ledgers.folder(home.store, "faults"), "report.html").read_text()
    assert "the disk is on fire" in page
    best = rows[0]["trial"]
    full = nvae(capsys, "train", "--from-trial", f"faults/{best}", "train.batch_size=8", "--dry-run")
    assert full.code == 0, full.err
    assert "total_images: 48" in full.out and "batch_size: 8" in full.out
    settings = trials(home, "faults")[best - 1].settings
    assert f"gradient_clip_norm: {settings['optimizer.gradient_clip_norm']}" in full.out


def check_mlflow(home: Home, found: dict[str, Trial]) -> None:
    """The runs of trials stand below that of the search, whose best model has an alias."""
    client = MlflowClient(home.tracking)
    record = ledgers.known_search(home.store, "faults")
    parent = client.get_run(record.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    images = sum(trial.last.images_seen for trial in found.values() if trial.last)
    assert parent.data.metrics["search/images_seen"] == images
    curve = client.get_metric_history(record.mlflow_run_id, "search/images_seen")
    assert sorted(point.step for point in curve) == list(range(1, len(found) + 1))
    (experiment,) = {parent.info.experiment_id}
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{record.mlflow_run_id}'")
    assert {child.data.tags["search.trial"] for child in children} == {
        str(trial.number) for trial in found.values()
    }
    assert [file.path for file in client.list_artifacts(record.mlflow_run_id)] == ["report.html"]
    best = client.get_model_version_by_alias("nvae-faults", "best-of-faults")
    # Both learned the same, so the first is the best.
    assert f"models:/nvae-faults/{best.version}" == found["none"].model
    assert record.result["alias"] == "models:/nvae-faults@best-of-faults"


def test_another_search_of_the_same_name_is_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(home, "{searcher: random, scheduler: none}")
    url = ledgers.folder(home.store, "other")
    plan = planned(home, file, "other")
    record = ledgers.SearchRecord(
        "other", "now", load(file).as_plain(), tune._check_data(plan), "sqlite:///x", "", 3, 1
    )
    ledgers.write_search(url, record)
    shown = nvae(
        capsys, "tune", write(home, "{searcher: random, scheduler: none, seed: 5}"), "--name", "other"
    )
    assert shown.code == 2
    assert "  search.seed: 1 -> 5" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resources", "CPU"], "write NAME=AMOUNT"),
        (["--resources", "CPU=-1"], "amounts above 0"),
        (["--resources", "CPU=nan"], "amounts above 0"),
        (["--resources", "=1"], "write NAME=AMOUNT"),
        (["--name", ""], "is no name for a run"),
        (["run=mnist"], "is given in"),
        (["--resources", "CPU=1", "--workers-per-trial", "2"], "for trials of one worker"),
        (["--name", "a/b"], "is no name for a run"),
        (["--workers-per-trial", "3"], "cannot be shared equally by 3 workers"),
        (["space.train.seed.choice=[1, 2]"], "could not be compared"),
        (["data.root=store:nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(
    home: Home, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    shown = nvae(capsys, "tune", write(home, "{scheduler: none}"), *arguments)
    assert shown.code == 2
    assert message in shown.err and "Traceback" not in shown.err
    assert not Path(home.store, "searches", "search").exists()


def test_what_no_node_has_is_not_waited_for(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    shown = nvae(
        capsys, "tune", write(home, "{scheduler: none}"), "--resources", "CPU=1,FOO=2", "--name", "foo"
    )
    assert shown.code == 2
    assert "No node of the cluster has CPU=1, FOO=2" in shown.err and "FOO=0." in shown.err
    assert not trials(home, "foo") and ledgers.known_search(home.store, "foo").state == "failed"


def test_as_many_trials_are_wanted_as_a_listed_space_has_and_no_more(home: Home) -> None:
    space = "  objective.spectral_coefficient: {choice: [0.1, 1]}\n  train.batch_size: {integer: [4, 6]}"

    def trials_of(searcher: str, asked: int | None, before: int | None = None) -> int:
        file = write(home, f"{{searcher: {searcher}, scheduler: none}}", space)
        return wanted(planned(home, file, "many", trials=asked), before)

    assert [trials_of("grid", *asked) for asked in ((None,), (4,), (100,), (None, 4))] == [6, 4, 6, 4]
    assert [trials_of("random", *asked) for asked in ((None,), (4,))] == [6, 4]
    ranged = planned(home, write(home, "{searcher: random, scheduler: none}"), "ranged")
    assert (wanted(ranged), wanted(ranged, 7)) == (20, 7)


def test_a_dry_run_shows_trials_and_starts_nothing(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(home, "{searcher: random, device_memory_gib: 1.0e-6}")
    shown = nvae(capsys, "tune", file, "--dry-run", "--trials", "3", "--name", "dry")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].split("\t") == ["TRIAL", "SETTINGS", "PARAMETERS", "MEMORY (GIB)", "TIME", "PROBLEM"]
    assert len(lines) == 4 and all("GiB on a device of" in line for line in lines[1:])
    assert not Path(ledgers.folder(home.store, "dry")).exists()


# -- with processes that die -----------------------------------------------------------------------


def search_command(home: Home, file: str, name: str, *more: str) -> list[str]:
    return ["tune", file, "--name", name, "--concurrent", "2", *more]


@pytest.mark.campaign
def test_a_search_that_is_told_to_stop_continues_where_it_was(home: Home) -> None:
    file = write(home, "{searcher: random, scheduler: none}", total=400)
    arguments = search_command(home, file, "stopped", "--trials", "3")
    with command(*arguments) as searching:
        wait_for("evaluations", lambda: sum(len(each.evaluations) for each in trials(home, "stopped")) > 2)
        searching.send(signal.SIGTERM)
        assert searching.wait() == 0, searching.said
        assert "The same command continues the search." in searching.said
    before = {trial.number: trial for trial in trials(home, "stopped")}
    with command(*arguments) as searching:
        assert searching.wait() == 0, searching.said
    after = trials(home, "stopped")
    assert [trial.state for trial in after] == ["finished"] * 3
    for number, trial in before.items():
        assert after[number - 1].evaluations[: len(trial.evaluations)] == trial.evaluations
    check_each_evaluated_once(after, 400)


@pytest.mark.campaign
def test_one_trial_can_be_stopped(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(home, "{searcher: random, scheduler: none}", total=2_000)
    with command(*search_command(home, file, "one", "--trials", "2")) as searching:
        wait_for("both", lambda: [bool(each.evaluations) for each in trials(home, "one")] == [True, True])
        assert nvae(capsys, "runs", "stop", "one-0002").code == 0
        wait_for("the second to stop", lambda: trials(home, "one")[1].state == "stopped")
        assert trials(home, "one")[1].reason == "asked to stop"
        assert nvae(capsys, "runs", "stop", "one").code == 0
        assert searching.wait() == 0, searching.said
    assert trials(home, "one")[0].state == "running"
    assert ledgers.known_search(home.store, "one").state == "stopped"


@pytest.mark.campaign
def test_trials_that_began_without_mlflow_stand_below_the_search_in_the_end(
    home: Home, tmp_path: Path
) -> None:
    arguments = write(home, "{searcher: random, scheduler: none}", total=400), "late", "--trials", "2"
    with serving(tmp_path) as server:
        server.kill()
        with command(*search_command(home, *arguments), MLFLOW_TRACKING_URI=server.url) as searching:
            wait_for("evaluations", lambda: sum(len(each.evaluations) for each in trials(home, "late")) > 3)
            assert not ledgers.known_search(home.store, "late").mlflow_run_id
            server.start()
            assert searching.wait() == 0, searching.said
        parent = ledgers.known_search(home.store, "late").mlflow_run_id
        client = MlflowClient(server.url)
        experiment = client.get_run(parent).info.experiment_id
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert sorted(child.info.run_name for child in children) == ["late-0001", "late-0002"]


@pytest.mark.campaign
def test_a_spent_budget_ends_a_search_in_order(home: Home) -> None:
    file = write(home, "{searcher: random, scheduler: none, max_device_hours: 0.003}", total=100_000)
    with command(*search_command(home, file, "budget", "--trials", "4")) as searching:
        assert searching.wait() == 0, searching.said
    assert "of search.max_device_hours=0.003" in searching.said
    assert ledgers.known_search(home.store, "budget").state == "stopped"


@pytest.mark.campaign
def test_a_trial_of_two_workers_is_a_ray_train_run(home: Home) -> None:
    file = write(home, "{searcher: random, scheduler: asha, first_rung_images: 32}", total=96)
    arguments = ["tune", file, "--name", "wide", "--trials", "2", "--concurrent", "1"]
    with command(*arguments, "--workers-per-trial", "2") as searching:
        assert searching.wait() == 0, searching.said
    found = trials(home, "wide")
    assert {trial.state for trial in found} <= {"finished", "pruned"} and found[0].state == "finished"
    assert [each.images_seen for each in found[0].evaluations] == [16, 32, 48, 64, 80, 96]
    launches = run_folder.known_record(home.store, "wide-0001").launches
    assert [launch.workers for launch in launches] == [2]


@pytest.mark.campaign
def test_a_node_that_dies_takes_no_trial_along(home: Home) -> None:
    file = write(home, "{searcher: random, scheduler: none}", total=1_600)
    arguments = search_command(home, file, "nodes", "--trials", "3")
    with nodes(1, 1) as cluster, command(*arguments, RAY_ADDRESS=cluster.address) as searching:
        wait_for("both", lambda: sum(bool(each.evaluations) for each in trials(home, "nodes")) >= 2)
        cluster.kill(1)
        cluster.add()
        assert searching.wait(600) == 0, searching.said
    found = trials(home, "nodes")
    assert [(trial.state, trial.reason) for trial in found] == [("finished", "")] * 3
    assert max(trial.starts for trial in found) >= 2
    check_each_evaluated_once(found, 1_600)


@pytest.mark.campaign
def test_a_new_machine_continues_a_search_in_a_bucket(
    home: Home, s3: str, tmp_path: Path, mlflow_server: Any
) -> None:
    """Killed on one machine; the same command on another, which has nothing but the bucket and MLflow."""
    store = f"{s3}/tune"
    file = write(home, "{searcher: random, scheduler: none}", total=400)
    data = f"data.root={home.store}/data/tiny"
    arguments = search_command(home, file, "bucket", data, "--trials", "3", "--store", store)
    environment = {"MLFLOW_TRACKING_URI": mlflow_server.url}
    url = ledgers.folder(store, "bucket")
    with command(*arguments, **environment) as searching:
        wait_for("evaluations", lambda: sum(len(each.evaluations) for each in ledgers.read_trials(url)) > 3)
        searching.end()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tiny.yaml").write_text(Path(home.yaml).read_text())
    (elsewhere / "search.yaml").write_text(Path(file).read_text())
    os.chdir(elsewhere)
    again = [str(elsewhere / "search.yaml") if each == file else each for each in arguments]
    with command(*again, **environment) as searching:
        assert searching.wait() == 0, searching.said
    check_each_evaluated_once(ledgers.read_trials(url), 400)
    assert ledgers.read_search(url).result["report"] == f"{url}/report.html"
    assert not (elsewhere / "nvae-store").exists()


def check_each_evaluated_once(found: list[Trial], total: int) -> None:
    for trial in found:
        if trial.state == "finished":
            assert [each.images_seen for each in trial.evaluations] == list(range(16, total + 1, 16))
