"""`data.on_corrupt: skip`: exactly the corrupt samples are lost, and no order shifts."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import RunConfig
from pipeline.data.corruption import CorruptSampleError, Losses
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.loader import Batch, evaluation_batches, training_batches
from pipeline.data.tars import TarBuilder, read_samples
from pipeline.errors import InputError
from tests.pipeline.data.data_set import TRAINING, build, config
from tests.pipeline.data.web_server import serving


@pytest.fixture
def own(tmp_path: Path) -> Index:
    """A data set that a test may damage."""
    return build(tmp_path, str(tmp_path / "out"))


def skipping(**data) -> RunConfig:
    return config(**({"on_corrupt": "skip", "max_corrupt_fraction": 1.0} | data))


def read(index: Index, settings: RunConfig, stop: int = TRAINING) -> list[Batch]:
    return list(training_batches(settings, index, rank=0, world_size=1, start=0, stop=stop))


def share(index: Index, rank: int, start: int = 0) -> list[Batch]:
    """The batches of one of three ranks; 48 images are four batches of 12."""
    return list(training_batches(skipping(), index, rank=rank, world_size=3, start=start, stop=48))


def spans(index: Index, split: str = TRAIN) -> dict[str, tuple[Path, int, int]]:
    """Where each sample is, by key: file, first byte, bytes."""
    found = {}
    for shard in index.shards(split):
        sidecar = read_sidecar(index, shard)
        for key, offset, size in zip(sidecar.keys, sidecar.offsets, sidecar.sizes, strict=True):
            found[key] = Path(index.root) / shard.name, int(offset), int(size)
    return found


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def assert_only_these_are_lost(found: list[Batch], clean: list[Batch], lost: set[str]) -> None:
    """Keys and positions are the same; lost slots weigh nothing and show a good image of the batch."""
    for got, wanted in zip(found, clean, strict=True):
        assert got.keys == wanted.keys
        assert got.positions.tolist() == wanted.positions.tolist()
        is_lost = [key in lost for key in wanted.keys]
        assert got.weights.tolist() == [0.0 if gone else 1.0 for gone in is_lost]
        assert got.corrupt_samples == sum(is_lost)
        rows = list(zip(got.images, wanted.images, is_lost, strict=True))
        good = {whole.numpy().tobytes() for _, whole, gone in rows if not gone}
        for image, whole, gone in rows:
            assert image.numpy().tobytes() in good if gone else image.equal(whole)


# Where in a sample's span a bit falls over: all that a tar header means, the data, the padding.
PLACES = {
    "name": range(12),
    "mode": range(100, 108),
    "size": range(124, 136),
    "header checksum": range(148, 156),
    "type": range(156, 157),
    "magic": range(257, 265),
    "rest of the header": range(345, 512),
    "data": range(512, 700),
    "padding": range(-8, 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_loses_its_sample_and_no_other(own, place):
    clean, where = read(own, skipping()), spans(own)
    random = np.random.default_rng(len(place))
    lost = set(random.choice(sorted(where), 12, replace=False).tolist())
    for key in lost:
        path, offset, size = where[key]
        byte = int(random.choice(PLACES[place]))
        flip(path, offset + (byte if byte >= 0 else size + byte), int(random.integers(8)))
    assert_only_these_are_lost(read(own, skipping()), clean, lost)


def assert_cut_loses_what_lies_beyond(own: Index, cut: str, url: str) -> None:
    """Cut a shard of `own`, which is read through `url`."""
    clean, where = read(own, skipping()), spans(own)
    shard = own.shards(TRAIN)[1]
    sidecar = read_sidecar(own, shard)
    third, size = int(sidecar.offsets[3]), int(sidecar.sizes[3])
    places = {
        "member boundary": third,
        "header": third + 100,
        "data": third + 600,
        "padding": third + size - 1,
        "empty": 0,
        "one byte": 1,
    }
    path = Path(own.root) / shard.name
    path.write_bytes(path.read_bytes()[: places[cut]])
    ends = {key: offset + size for key, (file, offset, size) in where.items() if file == path}
    lost = {key for key, end in ends.items() if end > places[cut]}
    assert len(lost) == len(sidecar.keys) - (0 if places[cut] < 2 else 3)
    index = load_index(url)
    assert_only_these_are_lost(read(index, skipping()), clean, lost)
    with pytest.raises(CorruptSampleError, match="ends before its end") as caught:
        read(index, config())
    told = re.search(rf"{shard.name}: sample '(\w+)' at byte ([\d,]+)", str(caught.value))
    assert told is not None
    assert told[1] in lost
    assert int(told[2].replace(",", "")) == where[told[1]][1]


@pytest.mark.parametrize("cut", ["member boundary", "header", "data", "padding", "empty", "one byte"])
def test_a_cut_shard_loses_what_lies_beyond_the_cut(own, cut):
    assert_cut_loses_what_lies_beyond(own, cut, own.root)


@pytest.mark.parametrize("cut", ["member boundary", "empty"])
def test_a_cut_shard_behind_a_web_server_loses_the_same(own, cut):
    with serving(own.root) as served:
        assert_cut_loses_what_lies_beyond(own, cut, served.url)


def test_a_file_that_was_stored_broken_is_one_lost_sample(own):
    clean = read(own, skipping())
    root, shard = Path(own.root), own.shards(TRAIN)[0]
    tar, broken = TarBuilder(), ""
    for number, sample in enumerate(read_samples((root / shard.name).read_bytes(), shard.name)):
        if number == 1:
            broken = sample.key
        tar.add(sample.key, "png", sample.image[: 20 if number == 1 else None])
    finished = tar.finish(shard.name)
    (root / shard.name).write_bytes(finished.data)
    (root / shard.sidecar_name).write_bytes(finished.sidecar)
    rows = (finished.shard, *own.shards(TRAIN)[1:])
    changed = replace(own, splits={**own.splits, TRAIN: rows})
    (root / "index.json").write_bytes(changed.to_json())
    changed = load_index(own.root)
    assert_only_these_are_lost(read(changed, skipping()), clean, {broken})
    with pytest.raises(CorruptSampleError, match=f"{broken!r}.*its checksum is right"):
        read(changed, config())


def test_each_rank_fills_its_slots_from_its_own_share_and_resumes_alike(own):
    clean = [share(own, rank) for rank in range(3)]
    where = spans(own)
    lost = set(sorted(where)[::5])
    for key in lost:
        flip(where[key][0], where[key][1] + 600, 0)
    found = [share(own, rank) for rank in range(3)]
    for got, wanted in zip(found, clean, strict=True):
        assert_only_these_are_lost(got, wanted, lost)
    for again, before in zip(share(own, 1, start=24), found[1][2:], strict=True):
        assert again.images.equal(before.images)


def test_a_share_without_any_good_image_is_grey_and_weighs_nothing(own):
    for shard in own.shards(TRAIN):
        path = Path(own.root) / shard.name
        path.write_bytes(bytes(len(path.read_bytes())))
    for batch in read(own, skipping()):
        assert not batch.weights.any()
        assert (batch.images == 128).all()


def test_an_evaluation_leaves_corrupt_images_out(own):
    where = spans(own, VALIDATION)
    lost = set(sorted(where)[1:8:3])
    for key in lost:
        flip(where[key][0], where[key][1] + 600, 3)
    batches = list(evaluation_batches(skipping(), own, rank=0, world_size=1, batch_size=4))
    weights = {key: float(weight) for b in batches for key, weight in zip(b.keys, b.weights, strict=True)}
    assert weights == {key: 0.0 if key in lost else 1.0 for key in where}
    assert sum(batch.corrupt_samples for batch in batches) == len(lost)


@pytest.mark.parametrize("damage", ["shard missing", "sidecar missing", "sidecar changed"])
def test_what_is_no_matter_of_single_samples_ends_the_run_whatever_the_policy(own, damage):
    shard = own.shards(TRAIN)[1]
    if damage == "sidecar changed":
        flip(Path(own.root) / shard.sidecar_name, 40, 0)
    else:
        (Path(own.root) / (shard.name if damage == "shard missing" else shard.sidecar_name)).unlink()
    with pytest.raises(InputError, match=shard.name.removesuffix(".tar")):
        read(own, skipping())


def test_skipping_ends_with_the_batch_in_which_too_many_were_lost(own, caplog):
    where = spans(own)
    key = min(where)
    flip(where[key][0], where[key][1] + 600, 0)
    # 0.3% of 1000 is 3: the fourth loss, in the fourth epoch, is one too many.
    lost_in = [batch.corrupt_samples for batch in read(own, skipping(), stop=6 * TRAINING)]
    fourth = next(n for n, lost in enumerate(itertools.accumulate(lost_in)) if lost == 4)
    caplog.clear()
    batches = training_batches(
        skipping(max_corrupt_fraction=0.003), own, rank=0, world_size=1, start=0, stop=6 * TRAINING
    )
    passed = 0
    with pytest.raises(ShardError, match=r"4 of the .* samples .*max_corrupt_fraction = 0\.003.*verify"):
        for _ in batches:
            passed += 1
    assert passed == fourth
    assert [key in record.message for record in caplog.records] == [True]


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 5)), max_size=20), limit=st.floats(0, 0.02)
)
def test_the_limit_is_a_share_of_all_asked_for_but_of_a_thousand_at_least(counts, limit):
    some = Index("root", 8, 3, "", None, {}, 0, 0, {})
    error = CorruptSampleError(some, _ANY_SHARD, "key", 0, "is damaged")
    losses = Losses(skipping(max_corrupt_fraction=limit).data)
    asked = lost = 0
    for count, bad in counts:
        asked, lost = asked + count, lost + min(bad, count)
        if lost > limit * max(asked, 1000):
            with pytest.raises(ShardError, match="max_corrupt_fraction"):
                losses.count(count, [error] * min(bad, count))
            return
        losses.count(count, [error] * min(bad, count))


def test_a_flood_of_corrupt_samples_does_not_flood_the_log(caplog):
    some = Index("root", 8, 3, "", None, {}, 0, 0, {})
    losses = Losses(skipping().data)
    for number in range(60):
        losses.count(1, [CorruptSampleError(some, _ANY_SHARD, str(number), 0, "is damaged")])
    assert len(caplog.records) == 21
    assert "no longer named" in caplog.records[-1].message


_ANY_SHARD = TarBuilder().finish("any.tar").shard
