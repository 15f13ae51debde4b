"""Tars as other programs write them, for tests."""

import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def image_file(number: int, size: int = 8, mode: str = "RGB", file_format: str = "PNG", **options) -> bytes:
    """A file of random pixels, different for each number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], **options) -> Path:
    """A tar by Python's tarfile with these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def by_shard_writer(folder: Path, shards: int, per_shard: int, size: int = 8) -> dict[str, bytes]:
    """Image, label and caption for each key, by webdataset itself. Returns the images by key."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    with webdataset.ShardWriter(str(folder / "part-%04d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number in range(shards * per_shard):
            key = f"sample{number:05d}"
            images[key] = image_file(number, size)
            writer.write({"__key__": key, "cls": number % 10, "json": {"n": number}, "png": images[key]})
    return images


def like_img2dataset(folder: Path, shards: int, per_shard: int, size: int = 8) -> dict[str, bytes]:
    """NNNNN.tar of jpg, txt and json per key, with statistics and a table beside each."""
    images = {}
    for shard in range(shards):
        files: dict[str, bytes] = {}
        for number in range(per_shard):
            key = f"{shard:05d}{number:04d}"
            images[key] = image_file(shard * per_shard + number, size, file_format="JPEG", quality=95)
            files[f"{key}.jpg"] = images[key]
            files[f"{key}.txt"] = f"caption {number}".encode()
            files[f"{key}.json"] = json.dumps({"key": key, "status": "success"}).encode()
        write_tar(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 1}')
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 not really PAR1")
    return images


def by_gnu_tar(target: Path, folder: Path, *options: str) -> Path:
    """`tar c .` of a folder, by the program itself."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["tar", *options, "-C", str(folder), "-cf", str(target), "."]
    subprocess.run(command, check=True, capture_output=True)
    return target
