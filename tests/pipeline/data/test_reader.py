"""What a reader holds in memory, and what it fetches: bounded, whatever is asked ahead."""

import gc
import threading
from collections import deque

import numpy as np
import pytest

from pipeline.data import plan
from pipeline.data.index import TRAIN, Index, ShardError, load_index, read_sidecar
from pipeline.data.pieces import Piece, runs
from pipeline.data.reader import PendingSample, Reader, Span
from pipeline.data.sidecar import make_sidecar
from tests.pipeline.data.data_set import TRAINING, build
from tests.pipeline.data.web_server import serving


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    return build(folder, str(folder / "out"))


def decided(samples: list[PendingSample]) -> None:
    """Wait until all of them have arrived."""
    for sample in samples:
        there = threading.Event()
        sample.when_decided(there.set)
        assert there.wait(30)


@pytest.mark.parametrize(("lanes", "window", "ahead"), [(4, 8, 2), (2, 16, 1), (5, 5, 5)])
def test_a_lane_holds_one_window_and_what_was_asked_ahead_at_most(index, lanes, window, ahead):
    stream = plan.Stream(index.samples_per_shard(TRAIN), lanes=lanes, window=window, seed=3)
    reader, waiting, most = Reader(index, TRAIN), deque[PendingSample](), 0
    # What the rest of the suite has left is none of it.
    gc.freeze()
    for step in range(3 * TRAINING // lanes):
        positions = np.arange(step * lanes, (step + 1) * lanes, dtype=np.int64)
        waiting.extend(reader.request(stream.locate(positions)))
        decided(list(waiting))
        while len(waiting) > ahead * lanes:
            waiting.popleft().take()
        if step % 7 == 0:
            most = max(most, sum(type(thing) is Span for thing in gc.get_objects()))
    gc.unfreeze()
    reader.close()
    assert lanes * window / 2 < most <= lanes * (window + ahead + 1)


def test_each_byte_of_an_epoch_is_fetched_once_besides_the_first_sample_of_each_lane(index):
    lanes = 5
    stream = plan.Stream(index.samples_per_shard(TRAIN), lanes=lanes, window=4, seed=3)
    with serving(index.root) as served:
        reader = Reader(load_index(served.url), TRAIN)
        for sample in reader.request(stream.locate(np.arange(TRAINING, dtype=np.int64))):
            sample.take()
        reader.close()
    sizes = [int(read_sidecar(index, shard).sizes.sum()) for shard in index.shards(TRAIN)]
    largest = max(int(read_sidecar(index, shard).sizes.max()) for shard in index.shards(TRAIN))
    assert sum(end - begin for _, begin, end in served.of_tars()) <= sum(sizes) + lanes * largest
    sidecars = sum(shard.sidecar_bytes for shard in index.shards(TRAIN))
    assert reader.transferred_bytes == sidecars + sum(end - begin for _, begin, end in served.of_tars())


def test_a_sidecar_that_differs_twice_ends_the_reading(index, tmp_path):
    def spoil(name: str, begin: int, data: bytearray) -> None:
        if name.endswith(".idx"):
            data[-1] ^= 1

    with serving(index.root, spoil) as served:
        reader = Reader(load_index(served.url), TRAIN)
        (sample,) = reader.request(plan.locate_in_order(index.samples_per_shard(TRAIN), np.array([0])))
        with pytest.raises(ShardError, match=index.shards(TRAIN)[0].sidecar_name):
            sample.take()
        reader.close()
        assert [name for name, _, _ in served.asked].count(index.shards(TRAIN)[0].sidecar_name) == 2


def test_a_piece_is_parted_where_something_large_belongs_to_no_sample():
    far = 10 * 2**20
    rows = [(0, 1024, 0, "a"), (2048, 1024, 0, "b"), (far, 1024, 0, "c"), (far + 1024, 512, 0, "d")]
    sidecar = make_sidecar(rows)
    assert list(runs(Piece(7, 0, 4), sidecar)) == [Piece(7, 0, 2), Piece(7, 2, 4)]
    assert list(runs(Piece(7, 1, 3), sidecar)) == [Piece(7, 1, 2), Piece(7, 2, 3)]
    assert list(runs(Piece(7, 3, 4), sidecar)) == [Piece(7, 3, 4)]
