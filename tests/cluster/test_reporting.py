"""`nvae report` of runs and models, and the page that a training leaves."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import run_folder
from pipeline.run_report.writing import report_on
from pipeline.search import ledger as ledgers
from pipeline.search.ledger import SearchRecord
from pipeline.training.journal import Entry, encode
from pipeline.training.tracking import NullTracker
from pipeline.training.worker import LocalWorker
from tests.tiny_run import Home, nvae

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def trained(home: Home) -> str:
    home.train("seen")
    return home.run_url("seen")


class Page(HTMLParser):
    """Its text, and whatever it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.loads = "", []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("data:"):
                self.loads.append(value)


def test_a_training_leaves_its_page_in_its_folder_and_in_mlflow(
    home: Home, trained: str, tmp_path: Path
) -> None:
    page = Path(trained, "files", "report.html").read_text()
    assert "<script" not in page
    found = Page(page)
    assert found.loads == []
    version = "models:/nvae-seen@best"
    for part in (
        "Run seen",
        "finished",
        version,
        "48 of 48",
        "nothing was necessary",
        "6 images",
        "data hash",
    ):
        assert part in found.words
    assert page.count("<svg") > 15
    assert page.count("data:image/png") == 5  # samples, twice; reconstructions; the map and its scale
    record = run_folder.known_record(home.store, "seen")
    client = MlflowClient(home.tracking)
    assert "report.html" in [each.path for each in client.list_artifacts(record.mlflow_run_id)]


def test_a_report_can_be_made_again_of_a_run_and_of_the_model_that_it_trained(
    home: Home, trained: str, capsys: Capture, tmp_path: Path
) -> None:
    Path(trained, "files", "report.html").unlink()
    copy = tmp_path / "page.html"
    ended = nvae(capsys, "report", "seen", "--output", str(copy))
    assert ended.code == 0, ended.err
    assert ended.out == f"Report: {copy}\n"
    assert copy.read_bytes() == Path(trained, "files", "report.html").read_bytes()
    assert "worker-hours" in Page(copy.read_text()).words
    asked = nvae(capsys, "report", "models:/nvae-seen@best", "--json")
    assert json.loads(asked.out)["report"] == f"{trained}/files/report.html"
    words = Page(Path(trained, "files", "report.html").read_text()).words
    assert "models:/nvae-seen/1" in words
    assert "<- this one" in words


def test_mistakes_end_in_one_message(home: Home, trained: str, capsys: Capture, tmp_path: Path) -> None:
    for arguments, message in (
        (["nowhere"], "There is no run 'nowhere'"),
        (["../seen"], "is no name for a run"),
        (["models:/nvae-seen/7"], "no version 7"),
        (["seen", "--output", str(tmp_path / "no" / "page.html")], "cannot be written"),
    ):
        ended = nvae(capsys, "report", *arguments)
        assert ended.code == 2
        assert message in ended.err
        assert "Traceback" not in ended.err


def test_a_run_with_the_name_of_a_search_is_asked_for_by_a_flag(
    home: Home, trained: str, capsys: Capture
) -> None:
    url = ledgers.folder(home.store, "seen")
    ledgers.write_search(url, SearchRecord("seen", "now", {}, "d" * 64, "sqlite:///x", "", 1, 1))
    try:
        ended = nvae(capsys, "report", "seen")
        assert (ended.code, "add --run for the run" in ended.err) == (2, True)
        assert nvae(capsys, "report", "seen", "--run").code == 0
    finally:
        shutil.rmtree(url)


def test_a_stopped_run_has_a_page_and_one_that_cannot_be_made_is_a_warning(
    home: Home, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    class Stopped(LocalWorker):
        def stop_requested(self) -> bool:
            return True

        def stop_wanted(self) -> bool:
            return True

    assert home.train("halted", worker=Stopped())["state"] == "stopped"
    page = Path(home.run_url("halted"), "files", "report.html")
    assert "stopped" in Page(page.read_text()).words
    # The folder of the page is a file now.
    shutil.rmtree(page.parent)
    page.parent.write_text("")
    assert home.train("halted")["state"] == "finished"
    assert "files/report.html cannot be written" in caplog.text
    report_on(NullTracker(), home.run_url("nowhere"), {"state": "finished", "reason": ""})
    assert "there is no report of this run (RunError" in caplog.text


def test_names_and_reasons_from_outside_are_text(home: Home, trained: str, capsys: Capture) -> None:
    evil = "<img src=x onerror=alert(1)> https://user:secret@host/x"
    run_folder.update_record(trained, state="failed", reason=evil)
    assert nvae(capsys, "report", "seen").code == 0
    page = Path(trained, "files", "report.html").read_text()
    assert "<img src=x" not in page
    assert "secret" not in page


def test_what_was_done_against_divergence_is_marked_and_told(home: Home, capsys: Capture) -> None:
    home.train("rough")
    journal = Path(home.run_url("rough"), "journal", "009-00000.jsonl")
    lines = []
    for at, skips, back, words in ((20, 1, 0, "left out"), (28, 2, 1, "<b>weights</b> came back")):
        values = {"stability/skip": float(skips), "stability/roll_back": float(back)}
        lines.append(Entry("metrics", 10**12 + at, {"at": at, "values": values}))
        lines.append(Entry("tag", 10**12 + at, {"key": "stability.last", "value": words}))
    journal.write_bytes(b"".join(map(encode, lines)))
    assert nvae(capsys, "report", "rough").code == 0
    page = Path(home.run_url("rough"), "files", "report.html").read_text()
    words = Page(page).words
    assert "2 updates left out, 1 rollback" in words
    assert "what was done, and why" in words
    assert "&lt;b&gt;weights&lt;/b&gt; came back</title>" in page
    assert "<b>" not in page
