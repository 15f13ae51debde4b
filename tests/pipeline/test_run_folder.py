"""A run's folder: who may run it, who asked it to stop, what is known of it."""

from pathlib import Path

import pytest

from pipeline import lease, run_folder
from pipeline.record_file import RecordError
from pipeline.run_folder import RunError, RunRecord


def a_record(name: str = "faces", **changes: object) -> RunRecord:
    values = {
        "name": name,
        "created": "2026-01-01T00:00:00+00:00",
        "config": {"train": {"total_images": 64}},
        "data_hash": "0" * 64,
        "tracking_uri": "sqlite:///x.db",
        "mlflow_run_id": "abc",
    }
    return RunRecord(**values | changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    record = a_record(launches=(run_folder.Launch("2026-01-01T00:00:00+00:00", "host", 2),))
    run_folder.write_record(url, record)
    assert run_folder.read_record(url) == record
    assert run_folder.update_record(url, state="finished").state == "finished"
    records, damaged = run_folder.all_records(str(tmp_path))
    assert ([each.name for each in records], damaged) == (["faces"], {})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
def test_a_run_cannot_have_a_name_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="is no name for a run"):
        run_folder.folder(str(tmp_path), name)


def test_an_unknown_run_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    run_folder.write_record(run_folder.folder(str(tmp_path), "faces"), a_record())
    with pytest.raises(RunError, match="Runs there: faces"):
        run_folder.known_record(str(tmp_path), "face")


def test_a_record_of_a_later_release_is_refused(tmp_path: Path) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    run_folder.write_record(url, a_record())
    file = Path(url, "run.json")
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(RecordError, match="format version 2"):
        run_folder.read_record(url)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format_version": 1, "launches": [{}]}'])
def test_a_damaged_record_is_refused_with_its_place(tmp_path: Path, content: bytes) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    Path(url).mkdir(parents=True)
    (Path(url) / "run.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"run\.json is damaged"):
        run_folder.read_record(url)


def test_a_running_run_is_not_deleted(tmp_path: Path) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    run_folder.write_record(url, a_record())
    with lease.held(url), pytest.raises(RunError, match="stop it first"):
        run_folder.delete(url)
    assert run_folder.read_record(url) is not None


def test_a_stop_request_is_there_until_it_is_cleared(tmp_path: Path) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    assert not run_folder.stop_requested(url)
    run_folder.request_stop(url)
    assert run_folder.stop_requested(url)
    run_folder.clear_stop(url)
    assert not run_folder.stop_requested(url)


def test_a_store_that_does_not_answer_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert not run_folder.stop_requested("s3://bucket/runs/faces")


def test_a_deleted_run_leaves_nothing(tmp_path: Path) -> None:
    url = run_folder.folder(str(tmp_path), "faces")
    run_folder.write_record(url, a_record())
    (Path(url) / "checkpoints" / "x").mkdir(parents=True)
    run_folder.delete(url)
    assert run_folder.read_record(url) is None
    assert not Path(url).exists()


def test_a_damaged_record_hides_no_other_run(tmp_path: Path) -> None:
    store = str(tmp_path)
    run_folder.write_record(run_folder.folder(store, "faces"), a_record())
    run_folder.write_record(run_folder.folder(store, "broken"), a_record("broken"))
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    records, damaged = run_folder.all_records(store)
    assert [record.name for record in records] == ["faces"]
    assert "run.json is damaged" in str(damaged["broken"])
    with pytest.raises(RunError, match="Runs there: broken, faces"):
        run_folder.known_record(store, "face")
