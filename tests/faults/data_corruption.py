"""D3, D4: stored bytes that changed. Whatever is delivered is what was stored, or the change is reported."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data import verification
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.indexing import index_tars
from pipeline.data.loader import evaluation_batches
from pipeline.errors import InputError
from tests.faults.injection import Place, Row, Tally
from tests.pipeline.data import test_corruption as skips
from tests.pipeline.data.data_set import build, config
from tests.pipeline.data.foreign_tars import by_shard_writer
from tests.pipeline.data.test_verification import cuts

Delivered = list[tuple[str, bytes]]
"""Key and pixels of each sample that was handed out, in order."""


def deliver(root: str, into: Delivered) -> None:
    """Read both splits whole; what was handed out stays in `into` if that ends in an error."""
    index = load_index(root)
    for split in (TRAIN, VALIDATION):
        batches = evaluation_batches(config(), index, rank=0, world_size=1, split=split, batch_size=8)
        for batch in batches:
            into += [
                (key, image.numpy().tobytes()) for key, image in zip(batch.keys, batch.images, strict=True)
            ]


def data_sets(folder: Path) -> list[Index]:
    """One of ours, and one of tars of others, with bytes between the samples that belong to none."""
    by_shard_writer(folder / "foreign", shards=3, per_shard=8)
    foreign = index_tars([str(folder / "foreign")], validation_fraction=0.3).index
    return [build(folder, str(folder / "ours")), foreign]


# --- one corruption ----------------------------------------------------------------------------

Change = Callable[[random.Random, bytearray, int, int], None]
"""Alters bytes within [start, end) of a file."""


def flip_a_bit(draw: random.Random, data: bytearray, start: int, end: int) -> None:
    data[draw.randrange(start, end)] ^= 1 << draw.randrange(8)


def overwrite(draw: random.Random, data: bytearray, start: int, end: int) -> None:
    place = draw.randrange(start, end)
    length = min(draw.randint(1, 16), end - place)
    data[place : place + length] = draw.randbytes(length)


def zero_a_range(draw: random.Random, data: bytearray, start: int, end: int) -> None:
    place = draw.randrange(start, end)
    length = min(draw.choice((1, 8, 64, 512, 4096)), end - place)
    data[place : place + length] = bytes(length)


def swap_blocks(draw: random.Random, data: bytearray, start: int, end: int) -> None:
    one, other = sorted(512 * draw.randrange(len(data) // 512 or 1) for _ in range(2))
    data[one : one + 512], data[other : other + 512] = data[other : other + 512], data[one : one + 512]


CHANGES: tuple[Change, ...] = (flip_a_bit, overwrite, zero_a_range, swap_blocks)


def regions(index: Index) -> dict[str, list[tuple[Path, int, int]]]:
    """(file, start, end) of every place of each kind."""
    root = Path(index.root)
    size = (root / "index.json").stat().st_size
    found: dict[str, list[tuple[Path, int, int]]] = {"index": [(root / "index.json", 0, size)]}
    for split in (TRAIN, VALIDATION):
        for shard in index.shards(split):
            tar, sidecar = root / shard.name, read_sidecar(index, shard)
            found.setdefault("sidecar", []).append((root / shard.sidecar_name, 0, shard.sidecar_bytes))
            end = 0
            for offset, length in zip(sidecar.offsets.tolist(), sidecar.sizes.tolist(), strict=True):
                if offset > end:
                    found.setdefault("between samples", []).append((tar, end, offset))
                end = offset + length
                found.setdefault("header", []).append((tar, offset, offset + 512))
                found.setdefault("data", []).append((tar, offset + 512, end))
                found.setdefault("padding", []).append((tar, end - 8, end))
            found.setdefault("end of the tar", []).append((tar, end, shard.bytes))
    return found


def at_rest(place: Place) -> Row:
    """D3: a thousand random corruptions of stored data sets, one at a time."""
    tally, by = Tally(), Counter[str]()
    draw, wanted = random.Random(place.seed), 60 if place.short else 1000
    sets = []
    for index in data_sets(place.folder):
        clean: Delivered = []
        deliver(index.root, clean)
        assert verification.verify(index.root) == []
        sets.append((index, regions(index), clean))
    while tally.tried < wanted:
        index, where, clean = draw.choice(sets)
        kind = draw.choice(sorted(where))
        path, start, end = draw.choice(where[kind])
        change = draw.choice(CHANGES)
        whole = path.read_bytes()
        changed = bytearray(whole)
        change(draw, changed, start, end)
        if changed == whole:
            continue
        path.write_bytes(changed)
        with tally.attempt(f"{change.__name__} in {path.name}, {kind}"):
            by[finder(index.root, clean)] += 1
        path.write_bytes(whole)
    return tally.row(
        "D3",
        "random corruptions of shards, sidecars and indexes",
        f"{by['reader']:,} found by the reader, {by['verify']:,} in bytes that it never reads by `verify`; "
        "no image differed",
    )


def finder(root: str, clean: Delivered) -> str:
    """Who finds a corruption: the reader, or else `verify`, which has to find each."""
    found: Delivered = []
    try:
        deliver(root, found)
    except InputError:
        by = "reader"
        assert set(found) <= set(clean), "a changed image was delivered before the report"
    else:
        by = "verify"
        assert found == clean, "a changed image was delivered without a report"
    try:
        problems: object = verification.verify(root)
    except InputError as error:
        problems = error
    assert problems, f"`verify` found nothing ({by})"
    return by


# --- the policy to skip ------------------------------------------------------------------------


def skipping(place: Place) -> Row:
    """D3s: `data.on_corrupt: skip` leaves out exactly the corrupt samples, and not too many."""
    tally, draw, lost_in_all = Tally(), random.Random(place.seed), 0
    index = build(place.folder, str(place.folder / "set"))
    # Four batches of twelve: less than twelve losses leave no batch without an image.
    where, clean = skips.spans(index), skips.read(index, skips.skipping(), stop=48)
    keys = sorted(key for batch in clean for key in batch.keys)
    for number in range(5 if place.short else 50):
        lost = set(draw.sample(keys, draw.randint(1, 11)))
        whole = {where[key][0]: where[key][0].read_bytes() for key in lost}
        for key in lost:
            path, offset, length = where[key]
            skips.flip(path, offset + draw.randrange(length), draw.randrange(8))
        with tally.attempt(f"{len(lost)} corrupt samples, draw {number}"):
            enough = skips.skipping(max_corrupt_fraction=len(lost) / 1000)
            skips.assert_only_these_are_lost(skips.read(index, enough, stop=48), clean, lost)
            ranks = [skips.share(index, rank) for rank in range(3)]
            assert sum(batch.corrupt_samples for rank in ranks for batch in rank) == len(lost)
            lost_in_all += len(lost)
        with tally.attempt(f"one corrupt sample too many, draw {number}"):
            too_little = skips.skipping(max_corrupt_fraction=(len(lost) - 0.5) / 1000)
            with pytest.raises(ShardError, match="max_corrupt_fraction"):
                skips.read(index, too_little, stop=48)
        for path, content in whole.items():
            path.write_bytes(content)
    return tally.row(
        "D3s",
        "data.on_corrupt: skip",
        f"{lost_in_all} corrupt samples: counts exact, weight 0 in their slots alone, no order shifted; "
        "above the fraction it stops",
    )


# --- cuts --------------------------------------------------------------------------------------


def cut_tars(place: Place) -> Row:
    """D4: a tar that ends too early, at each kind of place."""
    tally = Tally()
    for index in data_sets(place.folder):
        shard = index.shards(TRAIN)[0]
        path, sidecar = Path(index.root) / shard.name, read_sidecar(index, shard)
        for what, cut in cuts(index).items():
            whole = path.read_bytes()
            path.write_bytes(whole[:cut])
            lost = {f"{offset:,}" for offset in sidecar.offsets[sidecar.ends > cut].tolist()}
            for who, look in (("reader", read_cut), ("verify", verify_cut), ("preparation", prepare_cut)):
                with tally.attempt(f"cut at {what}, by the {who}"):
                    message = look(index)
                    assert shard.name in message, message
                    places = set(re.findall(r"at byte ([\d,]*\d)", message))
                    assert places <= lost, message
                    assert places or who == "preparation", message
            path.write_bytes(whole)
    return tally.row(
        "D4",
        "tar cut at a member's boundary, in a header, data, padding; empty; 1 byte",
        "two data sets; by the reader and by `verify` with shard and byte, before a run with the shard",
    )


def read_cut(index: Index) -> str:
    with pytest.raises(InputError) as raised:
        deliver(index.root, [])
    return str(raised.value)


def verify_cut(index: Index) -> str:
    return "; ".join(f"{problem.shard} {problem.what}" for problem in verification.verify(index.root))


def prepare_cut(index: Index) -> str:
    return "; ".join(f"{problem.shard} {problem.what}" for problem in verification.missing_shards(index))
