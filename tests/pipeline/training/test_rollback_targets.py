"""Where rollbacks land, whatever was saved, deleted and given up before: retention keeps what they need."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.checkpoint import CheckpointError, newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.interventions import Intervention, Kind, left_behind
from pipeline.training.recovery import before

FOLDERS = itertools.count()


class Modelled:
    """A run that is nothing but its checkpoints, and a memory of every one there ever was."""

    def __init__(self, url: Path, keep: int) -> None:
        self.url, self.keep = str(url), keep
        self.images_seen = 0
        self.ever: list[tuple[int, bool]] = []
        self.done: list[Intervention] = []
        self.launch()

    def launch(self) -> None:
        self.writer = CheckpointWriter(self.url, claim_attempt(self.url), self.keep)
        resume = newest(self.url)
        if resume is not None:
            self.writer.continue_from(resume)
            self.images_seen = resume.images_seen

    def save(self, *, sound: bool = True) -> None:
        self.writer.save(
            {"model": {"w": torch.zeros(1)}},
            {},
            self.images_seen,
            {},
            sound=sound,
            left_behind=left_behind(self.done),
        )
        self.writer.wait()
        self.ever.append((self.images_seen, sound))

    def train(self) -> None:
        self.images_seen += 4
        self.save()

    def stopped_amid_trouble(self) -> None:
        self.images_seen += 4
        self.save(sound=False)
        self.launch()

    def diverge(self, later: int) -> None:
        """Trouble from `later` images after the last checkpoint on, and a rollback that is saved."""
        onset = self.images_seen + later
        self.images_seen = onset + 8
        ranges = left_behind(self.done)
        good = [
            seen
            for seen, sound in self.ever
            if sound and seen < onset and not any(seen in images for images in ranges)
        ]
        found = newest(self.url, before(onset, self.done))
        assert (found.images_seen if found else None) == (max(good) if good else None)
        back_to = found.images_seen if found else 0
        self.done.append(Intervention(Kind.ROLL_BACK, self.images_seen, "", back_to=back_to))
        self.save()


@settings(max_examples=20, deadline=None)
@given(
    keep=st.integers(2, 4),
    happens=st.lists(st.sampled_from(["train", "stop", "at once", "later"]), min_size=4, max_size=14),
)
def test_a_rollback_lands_at_the_newest_sound_checkpoint_that_was_ever_saved_before_the_trouble(
    tmp_path_factory: pytest.TempPathFactory, keep: int, happens: list[str]
) -> None:
    run = Modelled(tmp_path_factory.getbasetemp() / f"modelled-{next(FOLDERS)}", keep)
    for what in happens:
        match what:
            case "train":
                run.train()
            case "stop":
                run.stopped_amid_trouble()
            case _:
                run.diverge(later=0 if what == "at once" else 2)


def test_rollbacks_one_after_another_go_back_to_the_same_weights(tmp_path: Path) -> None:
    run = Modelled(tmp_path, keep=2)
    for _ in range(4):
        run.train()
    for _ in range(8):
        run.diverge(later=0)
    assert [each.back_to for each in run.done] == [12] * 8


def test_damage_before_the_trouble_is_no_reason_to_begin_anew_nor_to_delete_anything(tmp_path: Path) -> None:
    run = Modelled(tmp_path, keep=3)
    for _ in range(3):
        run.train()
    for damaged in (4, 8):
        (tmp_path / "checkpoints" / f"{damaged:012d}-001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="000000000008-001, 000000000004-001") as refusal:
        newest(run.url, before(12))
    assert "delete" not in str(refusal.value)
    found = newest(run.url)
    assert found is not None
    assert found.images_seen == 12


def test_a_checkpoint_that_the_resume_found_damaged_pushes_out_none_that_a_rollback_needs(
    tmp_path: Path,
) -> None:
    run = Modelled(tmp_path, keep=2)
    for _ in range(3):
        run.train()
    damaged = tmp_path / "checkpoints" / "000000000012-001"
    (damaged / "model.safetensors").write_bytes(b"")
    run.launch()
    assert run.images_seen == 8
    run.train()
    # The trouble begins at once: at 12 images, whose own checkpoint will not do.
    found = newest(run.url, before(12))
    assert found is not None
    assert (found.images_seen, found.attempt) == (8, 1)
    run.train()
    # For the user to judge.
    assert (damaged / "manifest.json").exists()
