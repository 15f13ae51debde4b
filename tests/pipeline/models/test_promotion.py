"""Promotions on real MLflows: raced, killed between any two requests, tampered with, away."""

import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from nvae.model import NVAE
from pipeline import storage
from pipeline.models.connection import Connection
from pipeline.models.export import export
from pipeline.models.lineage import Lineage
from pipeline.models.names import RegistryError
from pipeline.models.promotion import Promotions, UnfitError, history_name, verified
from pipeline.models.promotion_history import ACCEPTED, OVERTAKEN
from pipeline.models.registry import Registry
from pipeline.models.versions import Version
from tests.pipeline.models.promoting import ALIAS, NAME, attempt, check_race, return_to, with_versions
from tests.pipeline.models.tiny import tiny_config, tiny_model


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_of_eight_at_once_the_best_holds_the_alias_and_all_are_in_one_line(uri: str) -> None:
    check_race(uri, 8)


# -- killed -----------------------------------------------------------------------------


def _killed_before_request(uri: str, run_id: str, number: int) -> None:
    """A process that promotes version 2, and dies by SIGKILL where its request `number` would begin."""
    asked, left = Connection.ask, [number]

    def counting(self: Connection, *arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return asked(self, *arguments, **options)

    Connection.ask = counting  # type: ignore[method-assign]
    attempt(uri, run_id, 2, 3.0)
    sys.exit(0)


def test_whoever_is_killed_between_any_two_requests_is_finished_by_the_next(uri: str) -> None:
    run_id = with_versions(uri, 2)
    attempt(uri, run_id, 1, 4.0)
    database = Path(uri.removeprefix("sqlite:///"))
    shutil.copy(database, database.with_suffix(".before"))
    ends = set()
    for number in range(100):
        shutil.copy(database.with_suffix(".before"), database)
        # A fork has everything imported, and a client of its own.
        process = multiprocessing.get_context("fork").Process(
            target=_killed_before_request, args=(uri, run_id, number)
        )
        process.start()
        process.join(60)
        promotions = Promotions(uri, NAME)
        steps = promotions.history().steps(ALIAS)
        entered = steps[-1].version == "2"
        ends.add((entered, promotions.aliases()[ALIAS]))
        promotions.settle(ALIAS)
        assert promotions.aliases()[ALIAS] == steps[-1].version
        if not entered:
            assert attempt(uri, run_id, 2, 3.0) == ACCEPTED
        assert [line.entry.version for line in promotions.history().lines if line.entry] == ["1", "2"]
        assert promotions.aliases()[ALIAS] == "2"
        if process.exitcode == 0:
            break
    else:
        pytest.fail("it never came to its end")
    # All that is possible was met: nothing done, the alias lagging, all done.
    assert ends == {(False, "1"), (True, "1"), (True, "2")}


def test_a_late_writer_does_not_leave_the_alias_where_it_was_before(uri: str) -> None:
    run_id = with_versions(uri, 3)
    for version, score in ((1, 4.0), (2, 3.0)):
        attempt(uri, run_id, version, score)
    Registry(uri).point(ALIAS, f"models:/{NAME}/1")  # what a writer does that slept since the first entry
    assert Promotions(uri, NAME).settle(ALIAS) == "1"
    assert Promotions(uri, NAME).aliases() == {ALIAS: "2"}


# -- back -------------------------------------------------------------------------------


def test_of_two_who_roll_back_at_once_one_does(uri: str) -> None:
    run_id = with_versions(uri, 3)
    for version in (1, 2, 3):
        attempt(uri, run_id, version, 5.0 - version)
    with ThreadPoolExecutor(2) as pool:
        ended = sorted(pool.map(lambda _: return_to(uri, run_id, 3, 2), range(2)))
    assert ended == [ACCEPTED, OVERTAKEN]
    assert Promotions(uri, NAME).aliases() == {ALIAS: "2"}


# -- tampered with ----------------------------------------------------------------------


def test_entries_that_were_edited_copied_or_deleted_count_for_nothing_and_are_shown(uri: str) -> None:
    run_id = with_versions(uri, 4)
    for version in (1, 2, 3):
        attempt(uri, run_id, version, 5.0 - version)
    client = MlflowClient(uri, uri)
    log = history_name(NAME)
    text = client.get_model_version(log, "1").tags["entry"]
    client.set_model_version_tag(log, "2", "entry", text.replace("4.0", "0.1"))
    client.delete_model_version(log, "3")
    history = Promotions(uri, NAME).history()
    assert [line.entry is None for line in history.lines] == [False, True]
    assert [step.version for step in history.steps(ALIAS)] == ["1"]
    # A number that was deleted is not given again.
    attempt(uri, run_id, 4, 0.5)
    assert [line.entry is None for line in Promotions(uri, NAME).history().lines] == [
        False,
        True,
        True,
        False,
    ]
    assert Promotions(uri, NAME).aliases() == {ALIAS: "4"}


def test_a_holder_that_was_deleted_does_not_block_the_alias(uri: str) -> None:
    run_id = with_versions(uri, 2)
    attempt(uri, run_id, 1, 4.0)
    MlflowClient(uri, uri).delete_model_version(NAME, "1")
    promotions = Promotions(uri, NAME)
    assert promotions.settle(ALIAS) is None
    assert not promotions.exists("1")
    assert attempt(uri, run_id, 2, 3.0) == ACCEPTED
    assert promotions.aliases() == {ALIAS: "2"}


def test_the_history_is_no_model_to_anybody(uri: str) -> None:
    attempt(uri, with_versions(uri, 1), 1, 4.0)
    registry = Registry(uri)
    assert registry.names() == [NAME]
    with pytest.raises(RegistryError):
        registry.find(f"models:/{history_name(NAME)}/1")
    for name in ("../../x", "a/b", "a b", ""):
        with pytest.raises(RegistryError, match="cannot be the name"):
            Promotions(uri, name)


# -- damage -----------------------------------------------------------------------------


def registered(uri: str, store: Path, model: NVAE) -> Version:
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("nvae", artifact_location=str(store / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    lineage = Lineage("faces", run_id, 100, "d1" * 32, "0.1.0+abc")
    manifest = export(str(store), NAME, model, tiny_config(), lineage, {"validation/bits_per_dim": 4.0})
    return Registry(uri).register(manifest.url, NAME).version


def test_any_file_that_is_not_as_it_was_registered_makes_a_version_unfit(uri: str, tmp_path: Path) -> None:
    version = registered(uri, tmp_path / "store", tiny_model())
    assert verified(version, uri).manifest.sha256 == version.manifest_sha256
    for file in ("model.safetensors", "config.json", "samples.png", "manifest.json"):
        path = Path(version.url, file)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        for content in (None, bytes(changed), whole[:-1]):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(UnfitError, match="models:/nvae-faces/1"):
                verified(version, uri)
            path.write_bytes(whole)
    verified(version, uri)


def test_weights_that_are_not_finite_are_unfit_though_their_hashes_are_right(
    uri: str, tmp_path: Path
) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(UnfitError, match="not finite"):
        verified(registered(uri, tmp_path / "store", model), uri)


def test_a_store_that_does_not_answer_says_nothing_about_a_version(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(uri, tmp_path / "store", tiny_model())
    MlflowClient(uri, uri).set_model_version_tag(NAME, "1", "weights.url", "s3://nobody/model")
    monkeypatch.setattr("pipeline.patience.FIRST_CONTACT_SECONDS", 0.1)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(storage.StoreError, match="cannot be reached"):
        verified(Registry(uri).find(f"models:/{NAME}/1"), uri)
