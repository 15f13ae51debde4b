"""What a run's folder says of it: the newest numbers and interventions, whatever was killed when."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoint import Checkpoint, checkpoints
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.interventions import Intervention, Kind
from pipeline.training.journal import Journal
from pipeline.training.latest import LogLine, newest_line, trouble

SKIP = Intervention(Kind.SKIP, 10, "the loss is not finite")


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def note(run: str, attempt: int, *entries: tuple[str, Mapping[str, Any]]) -> None:
    journal = Journal(run, attempt)
    for kind, body in entries:
        journal.note(kind, **body)  # type: ignore[arg-type]
    journal.close()


def line(at: int, bits: float = 1.0) -> tuple[str, Mapping[str, Any]]:
    return "metrics", {"at": at, "values": {"train/bits_per_dim": bits}}


def done(at: int, skips: int, words: str) -> list[tuple[str, Mapping[str, Any]]]:
    values = {f"stability/{kind}": float(skips * (kind is Kind.SKIP)) for kind in Kind}
    return [
        ("metrics", {"at": at, "values": values}),
        ("tag", {"key": "stability.skip", "value": str(skips)}),
        ("tag", {"key": "stability.last", "value": words}),
    ]


def save(run: str, attempt: int, at: int, interventions: Sequence[Intervention] = ()) -> Checkpoint:
    writer = CheckpointWriter(run, attempt, keep=3)
    counts = Counter(each.kind for each in interventions)
    record = {"interventions": [asdict(i) for i in interventions], "intervention_counts": dict(counts)}
    writer.save({"model": {"w": torch.ones(2)}}, record, at, {})
    writer.wait()
    return checkpoints(run)[0]


def test_a_run_that_noted_nothing_has_no_numbers_and_no_trouble(run: str) -> None:
    assert newest_line(run) == LogLine()
    assert trouble(run, None).counts == dict.fromkeys(Kind, 0)


def test_the_newest_log_line_counts_and_no_other_point(run: str) -> None:
    note(
        run, 1, line(8, 3.0), line(16, 2.0), ("metrics", {"at": 16, "values": {"validation/bits_per_dim": 9}})
    )
    found = newest_line(run)
    assert (found.images_seen, found.numbers) == (16, {"train/bits_per_dim": 2.0})
    assert found.noted is not None
    note(run, 2, ("tag", {"key": "ray.job_id", "value": "local"}))
    assert newest_line(run) == found
    note(run, 3, line(12, 2.5))
    assert newest_line(run).images_seen == 12


def test_interventions_are_those_since_the_newest_checkpoint_else_its_own(run: str) -> None:
    note(run, 1, line(8), *done(10, 1, "first"), line(16))
    assert trouble(run, None).counts[Kind.SKIP] == 1
    saved = save(run, 1, 16, [SKIP])
    assert trouble(run, saved).last == "At 10 images: update skipped: the loss is not finite"
    note(run, 1, *done(18, 2, "second"), line(24), *done(26, 3, "third"))
    found = trouble(run, saved)
    assert (found.counts[Kind.SKIP], found.last) == (3, "third")


def test_what_a_crash_has_undone_is_not_counted(run: str) -> None:
    saved = save(run, 1, 8, [SKIP])
    note(run, 1, line(8), *done(12, 2, "undone"))
    note(run, 2, line(16))
    assert trouble(run, saved).counts[Kind.SKIP] == 1


def test_an_end_by_divergence_is_found_behind_the_scores_of_an_older_checkpoint(run: str) -> None:
    saved = save(run, 1, 8)
    final = ("metrics", {"at": 8, "values": {"final/validation/bits_per_dim": 1.0}})
    note(run, 1, line(8), *done(12, 5, "given up"), final)
    assert trouble(run, saved).last == "given up"


def test_a_long_journal_is_not_read_to_its_beginning(run: str) -> None:
    for _ in range(3):
        note(run, 1, line(8))
    saved = save(run, 1, 8)
    note(run, 1, *done(12, 1, "newest"), line(16))
    first = Path(run) / "journal" / "001-00000.jsonl"
    first.unlink()
    first.mkdir()  # Reading it would fail.
    assert newest_line(run).images_seen == 16
    assert trouble(run, saved).last == "newest"
