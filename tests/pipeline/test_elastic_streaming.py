"""Real loaders and real trainings see the plan's images, however often and wherever they stop."""

from itertools import accumulate, count
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from, tuples

from pipeline import config_file
from pipeline.config import RunConfig
from pipeline.data import shards
from pipeline.data.index import TRAIN, Index, load_index
from pipeline.data.loader import evaluation_batches, training_batches
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.tracking import NullTracker
from pipeline.training.train import Training, train
from pipeline.training.worker import LocalWorker
from tests.recorded_batches import check_history, planned, recorded, starts
from tests.tiny_run import Home

LANES, WINDOW = 12, 4
SHARD_BYTES = {"one shard": 2**20, "seven shards": 5_700, "as many shards as images": 1}


@pytest.fixture(scope="module", params=SHARD_BYTES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    target = tmp_path_factory.mktemp("data")
    return shards.build(
        "portraits:53", str(target), image_size=8, validation_count=11, shard_bytes=SHARD_BYTES[request.param]
    ).index


def config(batch_size: int) -> RunConfig:
    return config_file.from_mapping(
        {
            "data": {"root": "unused", "shuffle_window": WINDOW, "lanes": LANES, "decode_threads": 1},
            "model": {"image_size": 8},
            "train": {"total_images": 10_000, "batch_size": batch_size},
            "cadence": {"log_images": 1, "evaluate_images": 1, "checkpoint_images": 1},
        }
    )


def test_the_data_sets_are_what_their_names_say(data: Index) -> None:
    assert len(data.shards(TRAIN)) in (1, 7, 42)


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 13, 16])
def test_any_number_of_loaders_takes_equal_steps_and_waits_for_none(data: Index, world_size: int) -> None:
    """Fewer shards than ranks and threads, and the epoch ends within batches."""
    batch_size, start = world_size + 3, 17
    where = {"world_size": world_size, "start": start, "stop": start + 5 * batch_size + 1}
    loaders = [training_batches(config(batch_size), data, rank=rank, **where) for rank in range(world_size)]
    found = [
        (position, key)
        for step in zip(*loaders, strict=True)
        for batch in step
        if batch.weights[0]
        for position, key in zip(batch.positions.tolist(), batch.keys, strict=True)
    ]
    assert sorted(found) == planned(data, lanes=LANES, window=WINDOW, seed=1, stop=where["stop"])[start:]


@pytest.mark.parametrize("world_size", [1, 5, 16])
def test_any_number_of_loaders_evaluates_each_image_once(data: Index, world_size: int) -> None:
    ranks = [
        [
            key
            for batch in evaluation_batches(config(4), data, rank=rank, world_size=world_size, batch_size=2)
            for key in batch.keys
        ]
        for rank in range(world_size)
    ]
    assert len({key for keys in ranks for key in keys}) == sum(map(len, ranks)) == 11
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def train_until(home: Home, url: str, config: RunConfig, batches: float) -> Literal["finished", "stopped"]:
    """One launch, from the newest checkpoint on, asked to stop after `batches` batches."""
    asked = count(1)
    worker = LocalWorker(asked_to_stop=lambda: next(asked) >= batches)
    writer = CheckpointWriter(url, claim_attempt(url), config.checkpoint.keep, before_commit=lambda: None)
    data = load_index(f"{home.store}/data/tiny")
    outcome = train(Training(config, data, worker, NullTracker(), writer), newest(url))
    writer.wait()
    return outcome


@settings(max_examples=3, deadline=None)
@given(lists(tuples(sampled_from((3, 4, 5, 7)), integers(1, 4)), min_size=2, max_size=2))
def test_a_training_that_is_stopped_anywhere_sees_each_image_of_the_epoch_once(
    shared_home: Home, tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, int]]
) -> None:
    """Each launch has another batch size and is stopped after some batches; the last one ends."""
    folder, url = tmp_path_factory.mktemp("records"), str(tmp_path_factory.mktemp("run"))
    rare = ("data.lanes=6", "train.total_images=60", "cadence.evaluate_images=1000", "evaluation.images=1")
    for launch, (batch_size, batches) in enumerate(stops):
        config = shared_home.config(f"train.batch_size={batch_size}", "cadence.log_images=1", *rare)
        with recorded(folder, launch, LocalWorker()):
            assert train_until(shared_home, url, config, batches) == "stopped"
    with recorded(folder, len(stops), LocalWorker()):
        assert train_until(shared_home, url, shared_home.config(*rare), float("inf")) == "finished"
    assert starts(folder) == list(accumulate((size * batches for size, batches in stops), initial=0))
    index = load_index(f"{shared_home.store}/data/tiny")
    check_history(folder, index, lanes=6, window=config.data.shuffle_window, seed=config.train.seed)
