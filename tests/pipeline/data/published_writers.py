"""Writers of the formats in which data sets are published, independent of our readers.

LMDB and parquet are written by their own libraries; TFRecords and the pickles of CIFAR-10 by
hand, from their specifications.
"""

import io
import pickle
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

# --- images -----------------------------------------------------------------------------------


def smooth(count: int, side: int, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) different images whose neighbouring pixels are alike, as in photos."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse]
    )


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- CIFAR-10 ---------------------------------------------------------------------------------


def cifar_pickle(pixels: np.ndarray) -> bytes:
    """A batch as Python 2 pickled it in 2009: protocol 2, byte strings, numpy by name.

    `pixels` are (N, 32, 32, 3).
    """
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)

    def text(value: bytes, memo: int) -> bytes:
        return b"U" + bytes([len(value)]) + value + b"q" + bytes([memo])

    labels = b"]q\x04(" + b"".join(b"K" + bytes([n % 10]) for n in range(len(pixels))) + b"e"
    shape = (
        b"M" + struct.pack("<H", planes.shape[0]) + b"M" + struct.pack("<H", planes.shape[1]) + b"\x86q\x0a"
    )
    dtype = b"cnumpy\ndtype\nq\x0b" + text(b"u1", 12) + b"K\x00K\x01\x87q\x0dRq\x0e(K\x03" + text(b"|", 15)
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b"
    content = b"T" + struct.pack("<i", planes.nbytes) + planes.tobytes() + b"q\x11"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85q\x08"
    array += text(b"b", 9) + b"\x87q\x12Rq\x13(K\x01" + shape + dtype + b"\x89" + content + b"tq\x14b"
    items = text(b"batch_label", 2) + text(b"training batch 1 of 5", 3) + text(b"labels", 21) + labels
    items += text(b"data", 5) + array
    return b"\x80\x02}q\x01(" + items + b"u."


def write_cifar(folder: Path, train: Sequence[np.ndarray], test: np.ndarray) -> Path:
    """`data_batch_1` and so on, `test_batch` and the small file beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(train, start=1):
        (folder / f"data_batch_{number}").write_bytes(cifar_pickle(pixels))
    (folder / "test_batch").write_bytes(cifar_pickle(test))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))
    return folder


def write_cifar_archive(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    return path


# --- LMDB -------------------------------------------------------------------------------------


def write_lmdb(folder: Path, values: Iterable[bytes], keys: Iterable[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=2**26) as database, database.begin(write=True) as writing:
        for number, value in enumerate(values):
            key = str(number) if keys is None else list(keys)[number]
            writing.put(key.encode(), value)
    return folder


# --- TFRecord ---------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Mapping[str, bytes | Sequence[int]], packed: bool = True) -> bytes:
    """A tf.train.Example of byte strings and lists of whole numbers."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = message(1, message(1, value))
        elif packed:
            feature = message(3, message(1, b"".join(map(varint, value))))
        else:
            feature = message(3, b"".join(varint(1 << 3) + varint(number) for number in value))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def raw_example(pixels: np.ndarray, packed: bool = True) -> bytes:
    return example({"data": pixels.tobytes(), "shape": pixels.shape, "label": [3]}, packed)


def write_tfrecord(path: Path, examples: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(record, examples)))
    return path


# --- parquet ----------------------------------------------------------------------------------


def write_parquet(
    path: Path, files: Sequence[bytes | None], rows_in_group: int = 3, flat: bool = False
) -> Path:
    """As `datasets` writes images: a struct of bytes and path, and a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = files if flat else [{"bytes": file, "path": f"{number}.png"} for number, file in enumerate(files)]
    kind = pyarrow.binary() if flat else pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table({"label": list(range(len(rows))), "image": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path
