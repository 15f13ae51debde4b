"""Damaged and unsuitable images in a build: exact counts, a limit, and no work done twice."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import shards
from pipeline.data.index import TRAIN, ShardError
from tests.pipeline.data.test_images import huge_png
from tests.pipeline.data.test_shards import samples, write_images
from tests.tiny_run import nvae


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def odd_files() -> dict[str, tuple[bytes, bool]]:
    """Content, and whether it can be used, of one of each kind that data sets are known to hold."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole, whole_jpeg = encoded(pixels), encoded(pixels, "JPEG")
    sixteen = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    sixteen.save(buffer, "PNG")
    return {
        "cmyk.jpg": (encoded(pixels, "JPEG", "CMYK"), True),
        "grey.png": (encoded(pixels, mode="L"), True),
        "palette.png": (encoded(pixels, mode="P"), True),
        "clear.png": (encoded(pixels, mode="RGBA"), True),
        "sixteen.png": (buffer.getvalue(), True),
        "turned.jpg": (encoded(pixels, "JPEG", exif=exif), True),
        "bitmap.bmp": (encoded(pixels, "BMP"), True),
        "tiny.png": (encoded(pixels[:1, :1]), False),
        "tall.png": (encoded(pixels[:, :8]), False),
        "huge.png": (huge_png(20_000), False),
        "cut.png": (whole[: len(whole) // 2], False),
        "cut.jpg": (whole_jpeg[: len(whole_jpeg) // 2], False),
        "empty.jpg": (b"", False),
        "page.jpg": (b"<html>Not found</html>", False),
        "zeros.jpg": (bytes(3000), False),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(100), False),
    }


def test_every_odd_image_is_used_or_rejected_with_its_reason(tmp_path):
    source = write_images(tmp_path / "in", 4)
    odd = odd_files()
    for name, (content, _) in odd.items():
        (source / name).write_bytes(content)
    report = shards.build(
        str(source), str(tmp_path / "out"), image_size=16, max_rejected=1, validation_count=0
    )
    unusable = {name for name, (_, usable) in odd.items() if not usable}
    assert {each.name for each in report.rejected} == unusable
    assert report.index.rejected == len(unusable)
    assert report.index.num_samples(TRAIN) == 4 + len(odd) - len(unusable)
    assert shards.verify(report.index.root) == []


@pytest.mark.parametrize("broken", [1, 2])
def test_a_build_stops_above_the_limit_and_only_there(broken, tmp_path):
    source = write_images(tmp_path / "in", 99)
    for number in range(broken):
        (source / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff and no more")
    if broken == 1:
        assert shards.build(str(source), str(tmp_path / "out"), image_size=16).index.rejected == 1
        return
    with pytest.raises(ShardError, match=r"2 of 101 images.*--max-rejected 0\.01.*broken"):
        shards.build(str(source), str(tmp_path / "out"), image_size=16)
    assert not (tmp_path / "out/index.json").exists()


def test_a_build_that_stopped_goes_on_without_doing_anything_twice(tmp_path):
    source, target = write_images(tmp_path / "in", 60), tmp_path / "out"
    for number in range(3):
        (source / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]))
    options = {"image_size": 16, "shard_bytes": 3000}
    with pytest.raises(ShardError, match="it goes on where this one stopped"):
        shards.build(str(source), str(target), max_rejected=0.04, **options)
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert kept
    report = shards.build(str(source), str(target), max_rejected=1, **options)
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == kept
    straight = shards.build(str(source), str(tmp_path / "straight"), max_rejected=1, **options)
    assert report.rejected == straight.rejected
    assert report.index.content_hash == straight.index.content_hash


def test_photos_that_are_not_square_lead_to_the_option_for_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in range(200):
        Image.new("RGB", (20, 16 + number % 2), (number, 0, 0)).save(f"in/{number}.png")
    refused = nvae(capsys, "shards", "build", "in", "out", "--image-size", "16")
    assert refused.code == 2
    assert "not square (--crop center" in refused.err
    assert "of 200 images cannot be used" in refused.err
    assert not Path("out/index.json").exists()
    assert nvae(capsys, "shards", "build", "in", "out", "--image-size", "16", "--crop", "center").code == 0


def test_files_that_are_no_images_are_no_reason_to_stop(tmp_path):
    source = write_images(tmp_path / "in", 10)
    for number in range(200):
        (source / f"{number:03d}.txt").write_text("a caption")
    (source / "image without a name").write_bytes((source / "000.png").read_bytes() + b" ")
    report = shards.build(str(source), str(tmp_path / "out"), image_size=16, validation_count=0)
    assert Counter(each.reason for each in report.rejected) == {"is no image file": 200}
    assert len(samples(report.index, TRAIN)) == 11
