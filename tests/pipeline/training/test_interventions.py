"""What a training remembers of its trouble: bounded, and enough for every decision."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.artifacts import MANIFEST_BYTES
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.interventions import (
    OTHERS_KEPT,
    ROLLBACKS_KEPT,
    Intervention,
    Kind,
    in_numbers,
    keep,
    to_record,
)


def test_however_much_is_skipped_the_state_stays_small_and_keeps_the_rollbacks() -> None:
    done: list[Intervention] = []
    keys = tuple(f"train-000000/sample-{number:09d}" for number in range(8))
    keep(done, Intervention(Kind.SOFTEN, 1, "", back_to=0))
    for images in range(2, 20_000):
        keep(done, Intervention(Kind.SKIP, images, "the gradient's norm is above its limit", keys=keys))
    assert [each.images_seen for each in done] == [1, *range(20_000 - OTHERS_KEPT, 20_000)]
    for images in range(20_000, 21_000):
        keep(done, Intervention(Kind.ROLL_BACK, images, "", back_to=0))
    assert len(done) == OTHERS_KEPT + ROLLBACKS_KEPT
    assert len(json.dumps([asdict(each) for each in done], indent=2)) < MANIFEST_BYTES / 20


def test_every_intervention_left_an_update_out_and_softening_brings_weights_back() -> None:
    numbers = in_numbers(Counter([Kind.SKIP, Kind.CLIP, Kind.ROLL_BACK, Kind.SOFTEN, Kind.GIVE_UP]))
    assert list(numbers.values()) == [5, 1, 2, 1, 1]


def test_a_record_too_large_to_be_read_fails_its_save_and_deletes_no_other(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), 1, keep=2)
    one = Intervention(Kind.SKIP, 1, "x" * 400)
    for images, count in ((4, 1), (8, 10_000), (12, 10_000)):
        record = {"interventions": to_record([one] * count)}
        writer.save({"model": {"w": torch.zeros(1)}}, record, images, {})
        writer.settle()
    assert writer.failed == 2
    found = newest(str(tmp_path))
    assert found is not None
    assert found.images_seen == 4
