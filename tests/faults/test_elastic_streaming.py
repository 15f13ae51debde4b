"""A worker is killed in mid-epoch and other numbers of workers go on: no image lost, none twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import failures
from cluster.launch import launch
from cluster.nodes import ray_connection
from pipeline.data import shards
from pipeline.data.index import TRAIN
from pipeline.errors import FailedError
from pipeline.training.checkpoint import images_saved
from tests.recorded_batches import check_history, launches, learned, starts
from tests.tiny_run import Home

pytestmark = pytest.mark.campaign

IMAGES = 61
TOTAL = 180
WORKERS_AND_BATCH = ((2, 8), (3, 6), (1, 5))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_connection(workers=3):
            yield


def test_workers_killed_in_mid_epoch_are_replaced_by_more_and_by_fewer(
    home: Home, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 workers, of which one is killed; then 3, of which one is killed; then 1 to the end."""
    # The launch is not to start the same number of workers again by itself.
    monkeypatch.setattr(failures, "MAX_LOSSES", 0)
    data = shards.build(
        f"portraits:{IMAGES + 6}",
        f"{home.store}/data/elastic",
        image_size=8,
        validation_count=6,
        shard_bytes=10_240,
    ).index
    for number, (workers, batch_size) in enumerate(WORKERS_AND_BATCH):
        spec = home.begin(
            "elastic-streaming",
            "data.root=store:elastic",
            f"train.total_images={TOTAL}",
            f"train.batch_size={batch_size}",
            "cadence.checkpoint_images=10",
            "cadence.evaluate_images=1000",
            workers=workers,
        )
        (tmp_path / "run").write_text(spec.url)
        last = number == len(WORKERS_AND_BATCH) - 1
        arguments = {
            "spec": vars(spec),
            "records": str(tmp_path),
            "launch": number,
            "kill_after": None if last else 40,
        }
        end = {}
        try:
            end = launch(
                "tests.recorded_batches:work",
                arguments,
                widths=(workers,),
                run_url=spec.url,
                say=print,
                progress=lambda url=spec.url: images_saved(url),
            )
        except FailedError:
            assert not last
        assert end.get("state") == ("finished" if last else None)

    began = starts(tmp_path)
    assert began[0] == 0
    assert len(began) == len(WORKERS_AND_BATCH)
    assert all(start % data.num_samples(TRAIN) for start in began[1:]), "it resumed between two epochs"
    # Work was really lost: more was read than what led to the final weights.
    read = sum(len(line["keys"]) for lines in launches(tmp_path) for line in lines)
    assert read > len(learned(tmp_path)) >= TOTAL
    check_history(tmp_path, data, lanes=8, window=4, seed=1)
