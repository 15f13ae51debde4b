from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import record_file
from pipeline.models import sample_folder
from pipeline.models.sample_folder import SampleFolderError
from pipeline.models.sampling import Drawing, sample_images
from tests.pipeline.models.tiny import tiny_model

MODEL = tiny_model()
DRAWING = Drawing((0.7,), seed=5)
WANTED = sample_folder.contents("a" * 64, DRAWING, recalibrated=False)


def draw(folder: Path, count: int, batch_size: int = 4) -> list[int]:
    """One attempt, to its end; the numbers that it drew."""
    sample_folder.claim(folder, WANTED)
    missing = sample_folder.missing(folder, count, 8)
    return list(sample_folder.fill(folder, MODEL, DRAWING, missing, batch_size))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def test_a_folder_holds_the_samples_by_their_numbers(tmp_path):
    assert draw(tmp_path / "new" / "folder", 6) == list(range(6))
    drawn = pictures(tmp_path / "new" / "folder").astype(int)
    assert np.abs(drawn - sample_images(MODEL, 6, 0.7, seed=5)).max() <= 1


def test_an_interrupted_folder_is_finished_by_drawing_what_is_missing_or_broken(tmp_path):
    sample_folder.claim(tmp_path, WANTED)
    attempt = sample_folder.fill(tmp_path, MODEL, DRAWING, range(9), batch_size=2)
    for _ in range(6):
        next(attempt)
    attempt.close()
    cut, flipped = sample_folder.path_of(tmp_path, 1), sample_folder.path_of(tmp_path, 3)
    whole = {file: file.read_bytes() for file in tmp_path.glob("*.png")}
    cut.write_bytes(whole[cut][:-20])
    middle = len(whole[flipped]) // 2
    flipped.write_bytes(whole[flipped][:middle] + b"\0\1\2" + whole[flipped][middle + 3 :])
    sample_folder.path_of(tmp_path, 4).write_bytes(b"")
    untouched = sample_folder.path_of(tmp_path, 0).stat().st_mtime_ns
    assert draw(tmp_path, 9) == [1, 3, 4, 6, 7, 8]
    assert sample_folder.path_of(tmp_path, 0).stat().st_mtime_ns == untouched
    assert np.abs(pictures(tmp_path).astype(int) - sample_images(MODEL, 9, 0.7, seed=5)).max() <= 1


def test_a_whole_folder_is_left_alone_and_a_greater_count_extends_it(tmp_path):
    draw(tmp_path, 3)
    assert draw(tmp_path, 3) == []
    assert draw(tmp_path, 5) == [3, 4]


@pytest.mark.parametrize(
    "other",
    [
        {"weights_sha256": "b" * 64},
        {"temperature": [0.7, 0.8]},
        {"seed": 6},
        {"pixels": "sample"},
        {"pixel_temperature": 0.5},
        {"recalibrated": True},
    ],
)
def test_a_folder_of_other_samples_is_refused_with_the_difference(tmp_path, other):
    draw(tmp_path, 2)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SampleFolderError, match=next(iter(other))):
        sample_folder.claim(tmp_path, replace(WANTED, **other))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_of_somebody_else_is_refused_and_a_damaged_record_too(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(SampleFolderError, match="not begun by this command"):
        sample_folder.claim(tmp_path, WANTED)
    (tmp_path / sample_folder.RECORD).write_text("{")
    with pytest.raises(record_file.RecordError, match="damaged"):
        sample_folder.claim(tmp_path, WANTED)
