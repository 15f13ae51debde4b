"""Which format should a shard hold, and who should decode it: bytes and images/s at 256x256.

    python -m tests.benchmarks.formats --faces FOLDER

Without --faces it takes the real faces in $NVAE_FACES, if there are any, else procedural portraits.

Each row is one format with one decoder. Decoding ends where a training batch begins: as
(C, H, W) uint8 in a tensor. In each round every row decodes the same images once with one thread
and once with two, so that whatever else the machine does falls on all rows alike; figures are
medians over the rounds, ratios are medians of the rounds' own ratios to Pillow's PNG. Each row is
checked first: a lossless format must give back the pixels, JPEG those that Pillow decodes.

`5-bit` formats hold only the upper five bits of each value, which is what the 5-bit presets see.

Decoders that are not dependencies are measured where they are installed:
`pip install opencv-python-headless simplejpeg pyspng imagecodecs`. What is absent is named below
the table.
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.data import images
from pipeline.data.images import Pixels
from pipeline.data.portraits import portrait

# N images; C = 3 colours; H = W pixels. `Pixels` are (H, W, C).
Encoder = Callable[[Pixels], bytes]
Decoder = Callable[[bytes], Pixels]
"""(C, H, W) pixels, as a view of any memory layout: copying them into the batch is measured too."""

REPOSITORY = Path(__file__).resolve().parents[2]
FACES = Path(os.environ.get("NVAE_FACES") or REPOSITORY.parent / "shared/data/faces256")
SIZE = 256
BASELINE = ("PNG", "Pillow")
THREADS = (1, 2)
# Levels of libwebp's own scale from 0 to 9, as method and quality; `nvae shards build` writes 0.
# Level 9 took 2 s an image and saved no byte.
WEBP_LEVELS = {0: (0, 0), 4: (3, 50), 6: (4, 75)}


@dataclass(frozen=True)
class Format:
    name: str
    encode: Encoder
    decoders: dict[str, Decoder]
    bits: int = 8
    lossless: bool = True


@dataclass
class Row:
    """One format with one decoder, and what was measured of it."""

    format: Format
    decoder: str
    contents: list[bytes]
    seconds: dict[int, list[float]] = field(default_factory=lambda: {threads: [] for threads in THREADS})

    @property
    def name(self) -> tuple[str, str]:
        return self.format.name, self.decoder

    def decode_into(self, batch: Pixels, threads: int, pool: ThreadPoolExecutor) -> None:
        """Decode every image into `batch` (N, C, H, W)."""
        decode = self.format.decoders[self.decoder]

        def part(numbers: range) -> None:
            for number in numbers:
                batch[number] = decode(self.contents[number])

        if threads == 1:
            part(range(len(self.contents)))
        else:
            list(pool.map(part, [range(first, len(self.contents), threads) for first in range(threads)]))


# --- formats ----------------------------------------------------------------------------------


def saved(kind: str, **options: Any) -> Encoder:
    """Written by Pillow."""

    def encode(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


def built_as(form: images.Format) -> Encoder:
    """As `nvae shards build --format` stores pixels."""
    return lambda pixels: images.prepare(pixels, len(pixels), 3, "none", form).data


def webp_lossless(level: int) -> Encoder:
    method, quality = WEBP_LEVELS[level]
    return saved("WEBP", lossless=True, method=method, quality=quality)


def planar(pixels: Pixels) -> bytes:
    return pixels.transpose(2, 0, 1).tobytes()


def bit_planes(pixels: Pixels) -> bytes:
    """The upper five bits of all values, one plane of bits after the other."""
    return b"".join(np.packbits(pixels.transpose(2, 0, 1) >> bit & 1).tobytes() for bit in range(3, 8))


def from_planar(data: bytes) -> Pixels:
    return np.frombuffer(data, np.uint8).reshape(3, SIZE, SIZE)


def from_ppm(data: bytes) -> Pixels:
    return (
        np.frombuffer(data, np.uint8, offset=len(data) - 3 * SIZE * SIZE)
        .reshape(SIZE, SIZE, 3)
        .transpose(2, 0, 1)
    )


def from_bit_planes(data: bytes) -> Pixels:
    planes = np.unpackbits(np.frombuffer(data, np.uint8)).reshape(5, 3, SIZE, SIZE)
    pixels = planes[0] << 3
    for number in range(1, 5):
        pixels |= planes[number] << (3 + number)
    return pixels


def pillow(data: bytes) -> Pixels:
    """What the loader calls."""
    return images.decode(data, SIZE, 3).transpose(2, 0, 1)


def optional_decoders() -> tuple[dict[str, dict[str, Decoder]], list[str]]:
    """Decoders of PNG, WebP and JPEG that happen to be installed; the names of those that are not."""
    found: dict[str, dict[str, Decoder]] = {"PNG": {}, "WebP": {}, "JPEG": {}}
    absent = []
    for name, add in (
        ("cv2", _add_opencv),
        ("simplejpeg", _add_simplejpeg),
        ("pyspng", _add_pyspng),
        ("imagecodecs", _add_imagecodecs),
    ):
        try:
            add(import_module(name), found)
        except ModuleNotFoundError:
            absent.append(name)
    return found, absent


def _add_opencv(cv2: Any, found: dict[str, dict[str, Decoder]]) -> None:
    cv2.setNumThreads(1)

    def decode(data: bytes) -> Pixels:
        # OpenCV's order is blue, green, red; splitting by its own code is faster than by numpy.
        blue, green, red = cv2.split(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
        return np.stack([red, green, blue])

    for decoders in found.values():
        decoders["OpenCV"] = decode


def _add_simplejpeg(simplejpeg: Any, found: dict[str, dict[str, Decoder]]) -> None:
    # Its own defaults are a fast DCT and plain upsampling, which are other pixels.
    found["JPEG"]["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(
        data, "RGB", fastdct=False, fastupsample=False
    ).transpose(2, 0, 1)


def _add_pyspng(pyspng: Any, found: dict[str, dict[str, Decoder]]) -> None:
    found["PNG"]["pyspng"] = lambda data: pyspng.load(data).transpose(2, 0, 1)


def _add_imagecodecs(imagecodecs: Any, found: dict[str, dict[str, Decoder]]) -> None:
    found["PNG"]["imagecodecs"] = lambda data: imagecodecs.png_decode(data).transpose(2, 0, 1)
    found["PNG"]["imagecodecs (spng)"] = lambda data: imagecodecs.spng_decode(data).transpose(2, 0, 1)
    found["WebP"]["imagecodecs"] = lambda data: imagecodecs.webp_decode(data, hasalpha=False).transpose(
        2, 0, 1
    )
    found["JPEG"]["imagecodecs"] = lambda data: imagecodecs.jpeg8_decode(data).transpose(2, 0, 1)


def formats(optional: dict[str, dict[str, Decoder]]) -> list[Format]:
    own: dict[str, Decoder] = {"Pillow": pillow}
    png, webp, jpeg = (own | optional[kind] for kind in ("PNG", "WebP", "JPEG"))
    return [
        Format("PNG", built_as("png"), png),
        Format("PNG, effort 1", saved("PNG", compress_level=1), png),
        Format("PNG, optimized", saved("PNG", optimize=True), png),
        *(Format(f"WebP lossless {level}", webp_lossless(level), webp) for level in WEBP_LEVELS),
        Format("JPEG 95", saved("JPEG", quality=95), jpeg, lossless=False),
        Format("raw (PPM)", built_as("raw"), {"Pillow": pillow, "numpy": from_ppm}),
        Format("raw, planar", planar, {"numpy": from_planar}),
        Format("5-bit PNG", built_as("png"), png, bits=5),
        Format("5-bit WebP lossless 0", webp_lossless(0), webp, bits=5),
        Format("5-bit WebP lossless 6", webp_lossless(6), webp, bits=5),
        Format("5-bit packed", bit_planes, {"numpy": from_bit_planes}, bits=5),
    ]


# --- measuring --------------------------------------------------------------------------------


def measure(pictures: Sequence[Pixels], rounds: int) -> dict[str, Any]:
    """Everything that is printed, by name. Raises ValueError if a decoder's pixels are wrong."""
    optional, absent = optional_decoders()
    rows, encode_seconds = [], {}
    for format in formats(optional):
        kept = [picture & ~np.uint8(2 ** (8 - format.bits) - 1) for picture in pictures]
        encode_seconds[format.name] = []
        contents = []
        for picture in kept:
            started = time.perf_counter()
            contents.append(format.encode(picture))
            encode_seconds[format.name].append(time.perf_counter() - started)
        new = [Row(format, decoder, contents) for decoder in format.decoders]
        for row in new:
            check(row, kept)
        rows += new
    batch: Pixels = torch.zeros((len(pictures), 3, SIZE, SIZE), dtype=torch.uint8).numpy()
    with ThreadPoolExecutor(max(THREADS)) as pool:
        for number in range(rounds + 1):
            for row in rows:
                for threads in THREADS:
                    started = time.perf_counter()
                    row.decode_into(batch, threads, pool)
                    if number:  # The first round warms up.
                        row.seconds[threads].append(time.perf_counter() - started)
    baseline = next(row for row in rows if row.name == BASELINE)
    return {
        "images": len(pictures),
        "rounds": rounds,
        "absent": absent,
        "rows": [summary(row, baseline, encode_seconds[row.format.name]) for row in rows],
    }


def check(row: Row, pictures: Sequence[Pixels]) -> None:
    decode = row.format.decoders[row.decoder]
    for data, picture in zip(row.contents, pictures, strict=True):
        wanted = picture.transpose(2, 0, 1) if row.format.lossless else pillow(data)
        if not np.array_equal(decode(data), wanted):
            raise ValueError(f"{row.format.name}: {row.decoder} decodes other pixels")


def summary(row: Row, baseline: Row, encode_seconds: list[float]) -> dict[str, Any]:
    images_per_second = {
        threads: [len(row.contents) / seconds for seconds in row.seconds[threads]] for threads in THREADS
    }
    ratios = {
        threads: [
            theirs / ours
            for ours, theirs in zip(row.seconds[threads], baseline.seconds[threads], strict=True)
        ]
        for threads in THREADS
    }
    return {
        "format": row.format.name,
        "decoder": row.decoder,
        "bytes": round(statistics.mean(map(len, row.contents))),
        "encode": 1 / statistics.median(encode_seconds),
        **{f"decode_{threads}": quartiles(images_per_second[threads]) for threads in THREADS},
        **{f"ratio_{threads}": quartiles(ratios[threads]) for threads in THREADS},
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def table(found: dict[str, Any]) -> str:
    lines = [
        "| format | decoder | bytes/image | encode, images/s | decode, 1 thread | 2 threads "
        "| to Pillow's PNG, 1 thread | 2 threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [f"{row['bytes']:,}", f"{row['encode']:,.1f}"]
        cells += [f"{row[f'decode_{threads}'][1]:,.0f}" for threads in THREADS]
        for threads in THREADS:
            low, middle, high = row[f"ratio_{threads}"]
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"| {row['format']} | {row['decoder']} | {' | '.join(cells)} |")
    lines += ["", f"{found['images']} {found['source']}, {found['rounds']} rounds: medians (and quartiles)."]
    if found["absent"]:
        lines.append(f"Not installed, so not measured: {', '.join(found['absent'])}.")
    return "\n".join(lines)


def pictures_of(faces: Path | None, count: int) -> list[Pixels]:
    """`count` pictures (256, 256, 3): of the folder, spread evenly over it, or procedural portraits."""
    if faces is None:
        return [portrait(number, SIZE) for number in range(count)]
    files = sorted(file for file in faces.iterdir() if file.suffix.lower() in (".png", ".webp", ".jpg"))
    chosen = [files[number * len(files) // count] for number in range(count)] if len(files) > count else files
    return [images.decode(file.read_bytes(), SIZE, 3) for file in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--faces", type=Path, default=FACES if FACES.is_dir() else None, help="folder of 256x256 images"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    found = measure(pictures_of(arguments.faces, arguments.images), arguments.rounds)
    found["source"] = "real faces" if arguments.faces else "procedural portraits"
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
