"""Which images are for validation: no image is on both sides, and nothing is decided silently."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import DrawFn, booleans, composite, floats, integers, lists, sampled_from
from PIL import Image

from pipeline.data import shards
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.sources import Source, SourceImage
from pipeline.data.splits import ValidationChoice
from pipeline.data.survey import Survey, survey_source
from pipeline.errors import InputError


def survey(contents: list[str], choice: ValidationChoice, splits: list[str] | None = None) -> Survey:
    """Of a source with these contents, each named by its number."""
    images = [
        SourceImage(f"{number}.png", content.encode, splits[number] if splits else None)
        for number, content in enumerate(contents)
    ]
    return survey_source(Source(images), choice, 2, lambda what, done, total: None)


def names(found: Survey, split: str) -> list[str]:
    return [entry.image.name for entry in found.entries[split]]


@composite
def sources_with_copies(draw: DrawFn) -> tuple[list[str], ValidationChoice, list[str] | None]:
    contents = draw(lists(sampled_from("abcdefghij"), min_size=2, max_size=30))
    kind = draw(sampled_from(["fraction", "count", "list", "own"]))
    if kind == "fraction":
        return contents, ValidationChoice(fraction=draw(floats(0, 0.99))), None
    if kind == "count":
        return contents, ValidationChoice(count=draw(integers(0, len(contents) - 1))), None
    chosen = [draw(booleans()) for _ in contents]
    if kind == "list" and any(chosen):
        listed = tuple(f"{number}.png" for number, is_chosen in enumerate(chosen) if is_chosen)
        return contents, ValidationChoice(names=listed), None
    return contents, ValidationChoice(), [VALIDATION if is_chosen else TRAIN for is_chosen in chosen]


@given(sources_with_copies())
def test_no_content_is_in_both_splits_and_every_image_is_accounted_for(drawn):
    contents, choice, splits = drawn
    found = survey(contents, choice, splits)
    digests = {split: {entry.digest for entry in found.entries[split]} for split in (TRAIN, VALIDATION)}
    assert digests[TRAIN].isdisjoint(digests[VALIDATION])
    everywhere = names(found, TRAIN) + names(found, VALIDATION) + [each.name for each in found.rejected]
    assert sorted(everywhere) == sorted(f"{number}.png" for number in range(len(contents)))
    if splits is not None or choice.names is not None:
        wanted = (
            [f"{n}.png" for n, split in enumerate(splits) if split == VALIDATION] if splits else choice.names
        )
        assert sorted(names(found, VALIDATION)) == sorted(wanted)
        assert all(each.by_rule for each in found.rejected)


@given(sources_with_copies())
def test_a_drawn_split_has_the_wanted_size_up_to_copies(drawn):
    contents, choice, splits = drawn
    if splits is not None or choice.names is not None:
        return
    there = len(survey(contents, choice).entries[VALIDATION])
    wanted = choice.count if choice.count is not None else max(round(choice.fraction * len(contents)), 1)
    if choice.fraction == 0:
        wanted = 0
    wanted = min(wanted, len(contents) - 1)
    most = max(contents.count(content) for content in contents)
    assert wanted <= there <= wanted + most - 1 or there == wanted


# --- folders ----------------------------------------------------------------------------------


def write(root: Path, *files: str) -> Path:
    """An image, different from all others, at each name that ends like one; else a note."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ""):
            random = np.random.default_rng([*name.encode()])
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, "PNG")
        else:
            path.write_text("a note")
    return root


def built(source: Path, target: Path, **options) -> shards.BuildReport:
    return shards.build(str(source), str(target), image_size=16, shard_bytes=4000, **options)


def keys(index: Index, split: str) -> set[str]:
    return {key for shard in index.shards(split) for key in read_sidecar(index, shard).keys}


SPLIT = ("train/a/0.png", "train/1.png", "train/2.png", "validation/b/c/3.png")


@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    "notes",
    [
        (),
        ("README.md", "LICENSE.txt", ".DS_Store", "train/0.txt"),
        ("._1.png", "__MACOSX/train/1.png", "validation/.cache/9.png"),
    ],
)
def test_folders_for_the_splits_hold_whatever_notes_lie_beside_them(notes, form, tmp_path):
    source = write(tmp_path / "in", *SPLIT, *notes)
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for path in sorted(source.rglob("*.*")):
                if path.is_file():
                    archive.write(path, path.relative_to(source))
        source = tmp_path / "in.zip"
    if form == "tar":
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            tar.add(source, ".")
        source = tmp_path / "in.tar"
    report = built(source, tmp_path / "out")
    assert keys(report.index, TRAIN) == {"train/a/0", "train/1", "train/2"}
    assert keys(report.index, VALIDATION) == {"validation/b/c/3"}
    assert sorted(each.name for each in report.rejected) == sorted(notes)
    assert all(each.by_rule for each in report.rejected)
    assert "source's own" in report.remarks[-1]


@pytest.mark.parametrize("stray", ["stray.png", "test/w.png", "stray"])
def test_an_image_beside_the_folders_for_the_splits_stops_the_build(stray, tmp_path):
    source = write(tmp_path / "in", *SPLIT, stray)
    with pytest.raises(ShardError, match=rf"1 other images: {stray}. Move"):
        built(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_val_means_validation(tmp_path):
    report = built(write(tmp_path / "in", "train/0.png", "train/1.png", "val/2.png"), tmp_path / "out")
    assert keys(report.index, VALIDATION) == {"val/2"}


def test_images_that_are_named_like_the_splits_make_none(tmp_path):
    report = built(write(tmp_path / "in", "train", "validation", "x.png"), tmp_path / "out")
    assert "drawn" in report.remarks[-1]


def test_copies_of_validation_images_are_left_out_of_training(tmp_path):
    source = write(tmp_path / "in", *SPLIT)
    (source / "train/copy.png").write_bytes((source / "validation/b/c/3.png").read_bytes())
    report = built(source, tmp_path / "out")
    assert [each.name for each in report.rejected] == ["train/copy.png"]
    assert keys(report.index, VALIDATION) == {"validation/b/c/3"}


# --- what the user says -----------------------------------------------------------------------


def test_a_count_is_exact_and_recorded(tmp_path):
    index = built(
        write(tmp_path / "in", *(f"{n}.png" for n in range(9))), tmp_path / "out", validation_count=4
    ).index
    assert (index.num_samples(TRAIN), index.num_samples(VALIDATION)) == (5, 4)
    assert load_index(index.root).arguments["validation_count"] == 4


def test_a_list_decides_and_another_list_is_another_data_set(tmp_path):
    source = write(tmp_path / "in", "a/0.png", "a/1.png", "b/0.png", "b/2.png")
    listed = tmp_path / "list.txt"
    listed.write_text("a/0.png\n\n  2\na/1\n")
    options = {"validation_list": str(listed)}
    assert keys(built(source, tmp_path / "out", **options).index, VALIDATION) == {"a/0", "b/2", "a/1"}
    assert built(source, tmp_path / "out", **options).already_there
    listed.write_text("2\n")
    with pytest.raises(ShardError, match=r"holds another data set.*validation_list"):
        built(source, tmp_path / "out", **options)


def test_names_that_are_unknown_or_ambiguous_are_all_listed(tmp_path):
    source = write(tmp_path / "in", "a/0.png", "b/0.png", "b/2.png")
    (tmp_path / "list.txt").write_text("0\nnowhere\n0.png\nb/2\nelse/where.png\n")
    with pytest.raises(
        ShardError, match=r"2 names are of no image: nowhere, else/where.png; 2 .*: 0, 0\.png"
    ):
        built(source, tmp_path / "out", validation_list=str(tmp_path / "list.txt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"validation_count": 1, "validation_fraction": 0.1}, "Give one of"),
        ({"validation_count": 3}, "leave none to train on"),
        ({"validation_count": -1}, "negative"),
        ({"validation_list": "nowhere.txt"}, "nowhere.txt"),
        ({"validation_list": "empty.txt"}, "names no image"),
        ({"validation_list": "binary.txt"}, "not a UTF-8 text"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("in"), "0.png", "1.png", "2.png")
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError, match=says):
        built(Path("in"), Path("out"), **options)
    assert not Path("out").exists()


@pytest.mark.parametrize("options", [{"validation_count": 1}, {"validation_fraction": 0.0}])
def test_a_source_with_a_split_of_its_own_takes_no_other(options, tmp_path):
    with pytest.raises(ShardError, match="split of its own"):
        built(write(tmp_path / "in", *SPLIT), tmp_path / "out", **options)
