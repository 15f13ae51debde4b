"""Batches: the same on any number of workers, from any store; nothing unverified in them."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from pipeline.config import RunConfig
from pipeline.data import plan, shards
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.loader import Batch, check_fits, evaluation_batches, training_batches
from pipeline.errors import InputError
from tests.pipeline.data.data_set import SIZE, TRAINING, VALIDATED, build, config
from tests.pipeline.data.web_server import serving


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    return build(folder, str(folder / "out"))


@pytest.fixture
def own(tmp_path: Path) -> Index:
    """A data set that a test may damage."""
    return build(tmp_path, str(tmp_path / "out"))


def global_batches(
    settings: RunConfig, index: Index, world_size: int, start: int, stop: int
) -> list[dict[int, tuple[str, bytes]]]:
    """What all ranks together got in each step: position -> (key, pixels)."""
    ranks = [
        list(training_batches(settings, index, rank=rank, world_size=world_size, start=start, stop=stop))
        for rank in range(world_size)
    ]
    steps = []
    for shares in zip(*ranks, strict=True):
        step: dict[int, tuple[str, bytes]] = {}
        for share in shares:
            assert share.global_size == shares[0].global_size
            for row, position in enumerate(share.positions.tolist()):
                if share.weights[row]:
                    assert position not in step
                    step[position] = (share.keys[row], share.images[row].numpy().tobytes())
        assert len(step) == shares[0].global_size
        steps.append(step)
    return steps


def first(batches: Iterator[Batch]) -> Batch:
    batch = next(batches)
    batches.close()
    return batch


def loading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("fetch", "decode", "plan"))]


def assert_threads_end() -> None:
    deadline = time.monotonic() + 10
    while loading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loading_threads() == []


# --- order ------------------------------------------------------------------------------------


def test_the_stream_is_the_plan(index):
    settings = config()
    counts = index.samples_per_shard(TRAIN)
    assert len(counts) > 3
    stream = plan.Stream(counts, lanes=12, window=4, seed=1)
    sidecars = [read_sidecar(index, shard) for shard in index.shards(TRAIN)]
    for step in global_batches(settings, index, 1, 0, 130):
        places = stream.locate(np.array(sorted(step)))
        planned = [sidecars[s].keys[n] for s, n in zip(places.shards, places.samples, strict=True)]
        assert [step[position][0] for position in sorted(step)] == planned


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 12])
def test_any_number_of_workers_gets_the_same_global_batches(index, world_size):
    settings = config(decode_threads=1 + world_size % 3)
    assert global_batches(settings, index, world_size, 7, 90) == global_batches(settings, index, 1, 7, 90)


@pytest.mark.parametrize(("batch_size", "world_size"), [(12, 3), (6, 2), (5, 4), (24, 1)])
def test_a_run_goes_on_at_any_place_with_any_batch_and_any_workers(index, batch_size, world_size):
    whole: dict[int, tuple[str, bytes]] = {}
    for step in global_batches(config(lanes=12), index, 1, 0, 120):
        whole |= step
    rest: dict[int, tuple[str, bytes]] = {}
    for step in global_batches(config(lanes=12, batch_size=batch_size), index, world_size, 41, 120):
        rest |= step
    assert rest == {position: whole[position] for position in range(41, 120)}


def test_each_epoch_holds_every_image_once(index):
    (step,) = global_batches(config(batch_size=TRAINING), index, 1, TRAINING, 2 * TRAINING)
    assert len({key for key, _ in step.values()}) == TRAINING


def test_the_last_batch_ends_at_the_stop_and_an_idle_rank_gets_an_image_without_weight(index):
    batches = [
        list(training_batches(config(), index, rank=rank, world_size=4, start=0, stop=26))
        for rank in range(4)
    ]
    assert {tuple(batch.global_size for batch in rank) for rank in batches} == {(12, 12, 2)}
    last = [rank[-1] for rank in batches]
    assert sum(float(batch.weights.sum()) for batch in last) == 2
    assert all(len(batch.images) >= 1 for batch in last)


def test_evaluation_sees_every_image_once_in_order_whatever_the_number_of_workers(index):
    def positions(world_size: int, limit: int | None = None) -> list[int]:
        return [
            position
            for rank in range(world_size)
            for batch in evaluation_batches(
                config(), index, rank=rank, world_size=world_size, batch_size=3, limit=limit
            )
            for position in batch.positions.tolist()
        ]

    for world_size in (1, 2, 3, 12, 20):
        assert positions(world_size) == list(range(VALIDATED))
        assert positions(world_size, limit=5) == list(range(5))
    keys = [
        key
        for batch in evaluation_batches(config(), index, rank=0, world_size=1, batch_size=4, split=VALIDATION)
        for key in batch.keys
    ]
    sidecars = [read_sidecar(index, shard) for shard in index.shards(VALIDATION)]
    assert keys == [key for sidecar in sidecars for key in sidecar.keys]


def test_batches_from_a_bucket_equal_those_from_a_folder(index, s3, tmp_path):
    root = f"{s3}/{tmp_path.name}/data"
    for path in Path(index.root).iterdir():
        shards.storage.write_bytes(f"{root}/{path.name}", path.read_bytes())
    remote = load_index(root)
    assert remote.content_hash == index.content_hash
    for world_size in (1, 2):
        assert global_batches(config(), remote, world_size, 3, 75) == global_batches(
            config(), index, 1, 3, 75
        )


# --- pixels -----------------------------------------------------------------------------------


def test_images_are_what_was_stored(index, tmp_path_factory):
    batch = first(training_batches(config(), index, rank=0, world_size=1, start=0, stop=12))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (12, 3, SIZE, SIZE)
    source = Path(index.root).parent / "images"
    for key, image in zip(batch.keys, batch.images, strict=True):
        with Image.open(source / f"{key}.png") as stored:
            assert (image.permute(1, 2, 0).numpy() == np.asarray(stored)).all()


def test_images_are_averaged_over_squares_and_framed_by_zeros(index):
    full = first(training_batches(config(), index, rank=0, world_size=1, start=0, stop=12)).images
    framed = {"image_size": 6, "border_pixels": 1}
    small = first(
        training_batches(config(model=framed), index, rank=0, world_size=1, start=0, stop=12)
    ).images
    squares = full.view(12, 3, 4, 2, 4, 2).sum((3, 5), dtype=torch.int64)
    assert small.shape == (12, 3, 6, 6)
    assert_close(small[:, :, 1:5, 1:5].long(), (squares + 2) // 4)
    small[:, :, 1:5, 1:5] = 0
    assert not small.any()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"image_size": 12}, "--image-size 12"),
        ({"image_size": 16}, "the model sees 16x16"),
        ({"image_channels": 1, "likelihood": "bernoulli"}, "--channels 1"),
    ],
)
def test_a_model_that_the_data_do_not_fit_is_refused_with_a_remedy(model, says, index):
    with pytest.raises(ShardError, match=says):
        check_fits(config(model=model), index)
    with pytest.raises(ShardError, match=says):
        training_batches(config(model=model), index, rank=0, world_size=1, start=0, stop=1)


def test_flips_depend_on_the_position_and_the_seed_alone(index):
    def flips(seed: int, start: int, world_size: int = 1) -> dict[int, bool]:
        settings = config(seed=seed, horizontal_flip=True)
        found = {}
        for rank in range(world_size):
            for batch in training_batches(
                settings, index, rank=rank, world_size=world_size, start=start, stop=600
            ):
                found |= dict(zip(batch.positions.tolist(), batch.flip.tolist(), strict=True))
        return found

    whole = flips(1, 0)
    assert 220 < sum(whole.values()) < 380
    assert flips(1, 300, world_size=3) == {position: whole[position] for position in range(300, 600)}
    assert flips(2, 0) != whole
    unflipped = first(training_batches(config(), index, rank=0, world_size=1, start=0, stop=12))
    assert not unflipped.flip.any()


def test_binary_images_are_drawn_by_position_and_anew_in_each_epoch(tmp_path):
    grey = build(tmp_path, str(tmp_path / "out"), channels=1)
    model = {"likelihood": "bernoulli", "image_channels": 1}

    def drawn(seed: int, start: int, world_size: int) -> dict[int, tuple[str, bytes]]:
        steps = global_batches(config(model=model, seed=seed), grey, world_size, start, 6000)
        return dict(itertools.chain.from_iterable(step.items() for step in steps))

    one = drawn(1, 0, 1)
    assert drawn(1, 5900, 2) == {position: one[position] for position in range(5900, 6000)}
    sums: dict[str, np.ndarray] = {}
    for key, pixels in one.values():
        binary = np.frombuffer(pixels, np.uint8).astype(int)
        assert set(binary) <= {0, 1}
        sums[key] = sums.get(key, 0) + binary
    for key, count in sums.items():
        with Image.open(tmp_path / f"images/{key}.png") as image:
            probability = np.asarray(image).ravel() / 255
        # 120 epochs; five standard deviations.
        assert (np.abs(count / 120 - probability) <= 5 * np.sqrt(probability * (1 - probability) / 120)).all()


def test_validation_images_are_binarized_alike_in_every_run(tmp_path):
    grey = build(tmp_path, str(tmp_path / "out"), channels=1)
    model = {"likelihood": "bernoulli", "image_channels": 1}
    drawn = [
        torch.cat(
            [
                batch.images
                for rank in range(world_size)
                for batch in evaluation_batches(
                    config(model=model, seed=seed), grey, rank=rank, world_size=world_size, batch_size=4
                )
            ]
        )
        for seed, world_size in [(1, 1), (2, 3)]
    ]
    assert_close(drawn[0], drawn[1])


# --- faults -----------------------------------------------------------------------------------


def read_all(index: Index) -> None:
    for _ in training_batches(config(), index, rank=0, world_size=1, start=0, stop=TRAINING):
        pass


def test_a_damaged_sample_ends_the_run_with_shard_sample_place_and_remedy(own):
    shard = own.shards(TRAIN)[1]
    sidecar = read_sidecar(own, shard)
    path = Path(own.root) / shard.name
    data = bytearray(path.read_bytes())
    data[int(sidecar.offsets[2]) + 600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError) as caught:
        read_all(own)
    message = str(caught.value)
    assert shard.name in message
    assert repr(sidecar.keys[2]) in message
    assert f"at byte {int(sidecar.offsets[2]):,}" in message
    assert "nvae shards verify" in message
    assert_threads_end()


def test_no_flipped_bit_is_ever_delivered(own):
    random = np.random.default_rng(0)
    clean = global_batches(config(), own, 1, 0, TRAINING)
    shard = own.shards(TRAIN)[0]
    path = Path(own.root) / shard.name
    whole, used = path.read_bytes(), int(read_sidecar(own, shard).sizes.sum())
    for place in random.integers(0, used, 40):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << random.integers(8))]) + whole[place + 1 :]
        )
        with pytest.raises(ShardError):
            read_all(own)
    path.write_bytes(whole)
    assert global_batches(config(), own, 1, 0, TRAINING) == clean


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "missing", "sidecar missing", "sidecar changed", "swapped"]
)
def test_a_shard_that_is_not_the_indexed_one_ends_the_run_with_its_name(own, damage):
    one, other = own.shards(TRAIN)[:2]
    path, sidecar = Path(own.root) / one.name, Path(own.root) / one.sidecar_name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: one.bytes // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "sidecar missing":
        sidecar.unlink()
    elif damage == "sidecar changed":
        sidecar.write_bytes((Path(own.root) / other.sidecar_name).read_bytes())
    else:
        path.write_bytes((Path(own.root) / other.name).read_bytes())
    with pytest.raises(InputError, match=one.name.removesuffix(".tar")):
        read_all(own)
    assert_threads_end()


def test_what_a_transfer_spoilt_is_fetched_again(index):
    answered: set[tuple[str, int, int]] = set()

    def spoil_the_first_answer(name: str, begin: int, data: bytearray) -> None:
        request = (name, begin, len(data))
        if name.endswith((".tar", ".idx")) and request not in answered:
            answered.add(request)
            data[len(data) // 2] ^= 1

    with serving(index.root, spoil_the_first_answer) as served:
        remote = load_index(served.url)
        assert global_batches(config(), remote, 1, 0, TRAINING) == global_batches(
            config(), index, 1, 0, TRAINING
        )
    assert {name for name, _, _ in answered} == {
        name for shard in index.shards(TRAIN) for name in (shard.name, shard.sidecar_name)
    }


def test_threads_end_when_the_batches_are_closed_or_read_to_the_end(index):
    batches = training_batches(config(), index, rank=0, world_size=1, start=0, stop=10**6)
    next(batches)
    assert loading_threads()
    batches.close()
    assert_threads_end()
    read_all(index)
    assert_threads_end()


def test_closing_does_not_wait_for_a_stalled_transfer_and_its_thread_ends_with_it(index):
    stalled, released = threading.Event(), threading.Event()
    one = index.shards(TRAIN)[
        plan.Stream(index.samples_per_shard(TRAIN), lanes=1, window=4, seed=1).locate(np.array([0])).shards[0]
    ]

    def stall(name: str, begin: int, data: bytearray) -> None:
        if name.endswith(".tar") and name != one.name:
            stalled.set()
            released.wait()

    with serving(index.root, stall) as served:
        settings = config(batch_size=1, lanes=1, prefetch_batches=1)
        batches = training_batches(
            settings, load_index(served.url), rank=0, world_size=1, start=0, stop=10**6
        )
        next(batches)
        assert stalled.wait(30)
        batches.close()
        assert all(name.startswith("fetch") for name in loading_threads())
        released.set()
        assert_threads_end()


def test_the_first_batch_waits_for_its_own_images_alone(index):
    largest = max(int(read_sidecar(index, shard).sizes.max()) for shard in index.shards(TRAIN))
    released = threading.Event()

    def withhold_pieces(name: str, begin: int, data: bytearray) -> None:
        if name.endswith(".tar") and len(data) > largest:
            released.wait()

    settings = config(shuffle_window=16)
    with serving(index.root, withhold_pieces) as served:
        arguments = {"rank": 0, "world_size": 1, "start": 9, "stop": 10**6}
        batches = training_batches(settings, load_index(served.url), **arguments)
        arrived = next(batches)
        released.set()
        batches.close()
        assert_threads_end()
        assert any(end - begin > largest for _, begin, end in served.of_tars())
    assert_close(arrived.images, first(training_batches(settings, index, **arguments)).images)


def test_an_error_reaches_the_caller_once(own):
    (Path(own.root) / own.shards(TRAIN)[1].name).unlink()
    batches = training_batches(config(), own, rank=0, world_size=1, start=0, stop=10**6)
    with pytest.raises(InputError, match=own.shards(TRAIN)[1].name):
        list(batches)
    assert list(batches) == []
    assert_threads_end()


def test_the_time_that_the_caller_waited_is_measured(index):
    batches = training_batches(config(), index, rank=0, world_size=1, start=0, stop=10**6)
    waits = []
    for batch in itertools.islice(batches, 6):
        waits.append(batch.wait_seconds)
        time.sleep(0.05)
    batches.close()
    assert all(wait >= 0 for wait in waits)
    # While the caller computes, the next batches are made.
    assert min(waits[1:]) < 0.05


def test_a_data_set_without_training_images_or_with_too_many_workers_is_refused(index):
    with pytest.raises(ShardError, match="13 workers"):
        training_batches(config(), index, rank=0, world_size=13, start=0, stop=100)
    empty = Index(**{**vars(index), "splits": {}})
    with pytest.raises(ShardError, match="no training images"):
        training_batches(config(), empty, rank=0, world_size=1, start=0, stop=100)
    assert list(evaluation_batches(config(), empty, rank=0, world_size=1, batch_size=4)) == []


def test_a_batch_that_is_kept_is_never_written_to_again(index):
    """Its memory is used anew only when nobody has the batch, or a view of it, any more."""
    kept = []
    for number, batch in enumerate(
        training_batches(config(batch_size=4), index, rank=0, world_size=1, start=0, stop=400)
    ):
        view = {0: batch.images, 1: batch.images[1:, 0], 2: batch.images.numpy()[::2]}.get(number % 5)
        if view is not None:
            kept.append((view, np.asarray(view).copy()))
    assert len(kept) == 60
    assert all(np.array_equal(view, before) for view, before in kept)
