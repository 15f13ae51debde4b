"""A journal read back as curves, starts and events."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.run_report.history import History, read_history
from pipeline.training.journal import Entry, StoredJournal, encode


class Noted:
    """A journal, written line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder / "journal", 1_000
        self.folder.mkdir()

    def line(self, attempt: int, kind: Any, **body: Any) -> None:
        self.clock += 1_000
        with (self.folder / f"{attempt:03d}-00000.jsonl").open("ab") as file:
            file.write(encode(Entry(kind, self.clock, body)))

    def metrics(self, attempt: int, at: int, **values: float) -> None:
        named = {name.replace("__", "/"): value for name, value in values.items()}
        self.line(attempt, "metrics", at=at, values=named)

    def history(self) -> History:
        return read_history(StoredJournal(str(self.folder.parent)))


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path)


def test_of_a_point_that_was_computed_again_the_newer_one_counts(noted: Noted) -> None:
    for at, value in ((10, 4.0), (20, 3.0), (30, 2.9)):
        noted.metrics(1, at, train__bits_per_dim=value)
    for at, value in ((30, 2.5), (40, 2.0)):
        noted.metrics(2, at, train__bits_per_dim=value)
    history = noted.history()
    assert history.curve("train/bits_per_dim") == [(10, 4.0), (20, 3.0), (30, 2.5), (40, 2.0)]
    assert history.images_seen == 40
    assert [(each.number, each.first, each.last) for each in history.attempts] == [(1, 10, 30), (2, 30, 40)]
    assert [each.ended - each.began for each in history.attempts] == [2_000, 1_000]
    assert history.last("train/bits_per_dim") == 2.0
    assert history.last("train/loss") is None


def test_events_have_the_moment_of_their_numbers_and_tell_whether_weights_came_back(noted: Noted) -> None:
    for at, skips, back, words in ((8, 1, 0, "skipped"), (16, 2, 1, "back"), (24, 3, 1, "skipped again")):
        noted.metrics(1, at, stability__skip=skips, stability__roll_back=back)
        noted.line(1, "tag", key="stability.last", value=words)
    noted.line(1, "tag", key="ray.job_id", value="local")
    events = noted.history().events
    assert [(each.images_seen, each.words, each.rolled_back) for each in events] == [
        (8, "skipped", False),
        (16, "back", True),
        (24, "skipped again", False),
    ]


def test_pictures_are_found_by_kind_and_moment_and_files_are_none(noted: Noted) -> None:
    for path in ("pictures/samples-000000000020.png", "pictures/samples-000000000008.png"):
        noted.line(1, "artifact", path=path, folder="pictures")
    noted.line(1, "artifact", path="files/report.html", folder="")
    noted.line(1, "artifact", path="pictures/odd.png", folder="pictures")
    assert noted.history().pictures == {
        "samples": [(8, "pictures/samples-000000000008.png"), (20, "pictures/samples-000000000020.png")]
    }


def test_a_damaged_line_and_an_empty_journal_are_no_obstacle(noted: Noted) -> None:
    assert noted.history().images_seen == 0
    noted.metrics(1, 10, train__loss=1.0)
    with (noted.folder / "001-00000.jsonl").open("ab") as file:
        file.write(b'{"kind":"metrics","time":1,"at":20,"values":{}},"crc":"00000000"}\n')
    noted.metrics(1, 30, train__loss=2.0)
    assert noted.history().curve("train/loss") == [(10, 1.0), (30, 2.0)]
