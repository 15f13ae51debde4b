import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.health import Reading
from nvae.step import Coefficients, StepResult
from pipeline import limits
from pipeline.training.machine import Machine
from pipeline.training.metrics import NAMES, Metrics
from pipeline.training.worker import LocalWorker

CONFIG = NVAEConfig(image_size=8, groups_per_scale=(2,), preprocess_blocks=1)
COEFFICIENTS = Coefficients(learning_rate=0.01, kl=0.5, spectral=0.1)
CPU = torch.device("cpu")


def step(
    images: float = 4.0,
    reconstruction: float = 100.0,
    kl: tuple[float, ...] = (1.0, 2.0),
    loss: float = 30.0,
    made: bool = True,
) -> StepResult:
    """An update whose `reconstruction` and `kl` are sums over `images` images."""
    return StepResult(
        images=torch.tensor(images),
        reconstruction=torch.tensor(reconstruction),
        kl_per_channel=torch.tensor(kl)[:, None],
        loss=torch.tensor(loss),
        spectral=torch.tensor(5.0),
        batch_norm_scale=torch.tensor(6.0),
        gradient_norm=torch.tensor(7.0),
        reading=Reading(loss=0.0, gradient_norm=0.0, made=made),
    )


def ticking(seconds: float = 1.0) -> Iterator[float]:
    return (seconds * ticks for ticks in count())


def local(clock: Iterator[float] | None = None) -> Metrics:
    return Metrics(LocalWorker(CPU), CONFIG, Machine(CPU, {}), clock=(clock or ticking()).__next__)


class ThreadWorker(LocalWorker):
    """One of two ranks, each a thread, whose sums meet in a list."""

    world_size = 2

    def __init__(self, rank: int, shared: list[Tensor], meeting: threading.Barrier) -> None:
        super().__init__(CPU)
        self.rank, self._shared, self._meeting = rank, shared, meeting
        self.all_reduces = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.all_reduces += 1
        self._shared[self.rank] = tensor.clone()
        self._meeting.wait()
        total = self._shared[0] + self._shared[1]
        self._meeting.wait()
        return tensor.copy_(total)


def on_two_ranks(per_rank: list[list[StepResult]], slower_seconds: float = 0.0) -> list[dict[str, float]]:
    """What each of two ranks is told; updates of rank 1 take `slower_seconds` longer."""
    shared, meeting = [torch.empty(0)] * 2, threading.Barrier(2)
    workers = [ThreadWorker(rank, shared, meeting) for rank in range(2)]
    results: list[dict[str, float]] = [{}, {}]

    def run(worker: ThreadWorker) -> None:
        metrics = Metrics(worker, CONFIG, Machine(CPU, {}), clock=ticking().__next__)
        for result in per_rank[worker.rank]:
            reading = {"corrupt_samples": 1 + worker.rank, "transferred_bytes": 10, "cached_bytes": 30}
            with metrics.timed():
                time.sleep(slower_seconds * worker.rank)
            metrics.add(result, COEFFICIENTS, wait_seconds=0.25 + 0.5 * (1 - worker.rank), **reading)
        results[worker.rank] = metrics.reduce()

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.all_reduces for worker in workers] == [1, 1]
    return results


def test_every_number_of_an_interval_is_what_was_put_in() -> None:
    metrics = local()
    metrics.add(step(images=4, reconstruction=100, kl=(1, 2), loss=30), COEFFICIENTS, wait_seconds=0.25)
    metrics.add(step(images=6, reconstruction=200, kl=(3, 4), loss=40), COEFFICIENTS, wait_seconds=0.25)
    found = metrics.reduce()
    assert found == pytest.approx(
        {
            "train/reconstruction_nats": 30.0,
            "train/kl_nats": 1.0,
            "train/kl_nats/group_00": 0.4,
            "train/kl_nats/group_01": 0.6,
            "train/nelbo_nats": 31.0,
            "train/bits_per_dim": 31.0 / math.log(2) / (3 * 8 * 8),
            "train/active_channels": 2.0,
            "train/active_channels/group_00": 1.0,
            "train/active_channels/group_01": 1.0,
            "train/loss": 35.0,
            "train/spectral_penalty": 5.0,
            "train/batch_norm_penalty": 6.0,
            "train/gradient_norm": 7.0,
            "train/skipped_updates": 0.0,
            "train/skipped_fraction": 0.0,
            "schedule/learning_rate": 0.01,
            "schedule/kl_coefficient": 0.5,
            "schedule/spectral_coefficient": 0.1,
            "speed/images_per_second": 10.0,
            "speed/seconds_per_step": 0.5,
            "data/wait_seconds": 0.5,
            "data/wait_seconds/max": 0.5,
            "data/wait_fraction": 0.5,
            "data/corrupt_samples": 0.0,
            "data/store_retries": 0.0,
            "data/cached_fraction": 0.0,
        }
    )


updates = st.builds(
    step,
    images=st.floats(0, 9),
    reconstruction=st.floats(-50, 900),
    kl=st.tuples(st.floats(0, 9), st.floats(0, 9)),
    loss=st.floats(0, 99),
)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(updates, updates), min_size=1, max_size=4))
def test_means_are_over_the_images_of_all_ranks_however_these_are_shared(
    pairs: list[tuple[StepResult, StepResult]],
) -> None:
    both = [result for pair in pairs for result in pair]
    images = sum(float(result.images) for result in both)
    assume(images > 0.1)
    found, same = on_two_ranks([[first for first, _ in pairs], [second for _, second in pairs]])
    assert found == same, "all ranks decide by these numbers"
    assert found["train/nelbo_nats"] == pytest.approx(sum(float(r.nelbo) for r in both) / images, rel=1e-5)
    assert found["train/loss"] == pytest.approx(sum(float(r.loss) for r in both) / len(both), rel=1e-5)


def test_speed_counts_the_images_of_all_ranks_and_the_seconds_of_one() -> None:
    found = on_two_ranks([[step(images=4)] * 2, [step(images=6)] * 2])[0]
    assert found["speed/images_per_second"] == pytest.approx(20.0)
    assert found["speed/seconds_per_step"] == pytest.approx(0.5)
    # One waited 2 x 0.75 s, the other 2 x 0.25 s.
    assert found["data/wait_seconds"] == pytest.approx(1.0)
    assert found["data/wait_seconds/max"] == pytest.approx(1.5)
    assert found["data/wait_fraction"] == pytest.approx(1.0)


def test_the_slowest_rank_is_found_behind_the_mean() -> None:
    found, same = on_two_ranks([[step()] * 3, [step()] * 3], slower_seconds=0.05)
    assert found == same
    mean, slowest = (found[f"speed/work_seconds_per_step{end}"] for end in ("", "/max"))
    assert slowest >= 0.05
    assert mean < slowest
    assert found["speed/slowest_rank"] == 1
    assert found["speed/communication_fraction"] == found["speed/communication_fraction/min"] == 0


def test_active_channels_are_those_of_a_slow_loop_over_images() -> None:
    """Two ranks, three updates each, two groups of five channels whose KL lies around 0.1 nats."""
    generator = torch.Generator().manual_seed(0)
    counts = [[2, 3, 1], [4, 1, 2]]
    # Larger by image, so that a mean over updates or ranks would not do; some below 0, as with flows.
    kl = [
        [torch.randn(n, 2, 5, generator=generator) * 0.2 + torch.linspace(0, 0.2, 5) for n in of_rank]
        for of_rank in counts
    ]
    images = [image for of_rank in kl for update in of_rank for image in update]
    expected = [0, 0]
    for group in range(2):
        for channel in range(5):
            expected[group] += sum(float(image[group, channel]) for image in images) / len(images) > 0.1

    def result(kl_BGZ: Tensor) -> StepResult:
        return replace(step(images=len(kl_BGZ)), kl_per_channel=kl_BGZ.sum(0))

    found = on_two_ranks([[result(update) for update in of_rank] for of_rank in kl])[0]
    assert [found[f"train/active_channels/group_{group:02d}"] for group in range(2)] == expected
    assert found["train/active_channels"] == sum(expected)
    assert 0 < sum(expected) < 10, "nothing is told apart"


def test_corrupt_samples_and_cached_bytes_are_those_of_all_ranks() -> None:
    found = on_two_ranks([[step()] * 2, [step()] * 2])[0]
    assert found["data/corrupt_samples"] == 2 * (1 + 2)
    assert found["data/cached_fraction"] == 0.75


def test_numbers_of_the_host_keep_all_their_digits() -> None:
    metrics = local(clock=(0.0001 + 16_777_217 * tick for tick in count()))
    reading = {"transferred_bytes": 10**12, "cached_bytes": 1}
    metrics.add(step(), COEFFICIENTS, wait_seconds=16_777_217.0, corrupt_samples=16_777_217, **reading)
    found = metrics.reduce()
    assert found["data/corrupt_samples"] == found["data/wait_seconds/max"] == 16_777_217
    assert found["data/cached_fraction"] == pytest.approx(1e-12)
    assert found["speed/seconds_per_step"] == pytest.approx(16_777_217, rel=1e-12)


def test_requests_made_again_count_for_the_interval_in_which_they_were() -> None:
    limits.count(retries=5)
    metrics = local()
    found = []
    for retries in (3, 0, 2):
        metrics.add(step(), COEFFICIENTS, wait_seconds=0.25)
        limits.count(retries=retries)
        found.append(metrics.reduce()["data/store_retries"])
    assert found == [3, 0, 2]


def test_a_skipped_update_is_counted_and_does_not_spoil_the_means() -> None:
    metrics = local()
    metrics.add(step(), COEFFICIENTS, 0.0)
    bad = math.nan
    metrics.add(step(reconstruction=bad, kl=(bad, math.inf), loss=bad, made=False), COEFFICIENTS, 0.0)
    found = metrics.reduce()
    assert found["train/skipped_updates"] == 1
    assert found["train/skipped_fraction"] == 0.5
    assert found["train/nelbo_nats"] == pytest.approx(25.75)
    assert found["speed/images_per_second"] == pytest.approx(8.0)


def test_an_interval_of_skipped_updates_alone_is_nan_and_says_so() -> None:
    metrics = local()
    metrics.add(step(made=False), COEFFICIENTS, 0.0)
    found = metrics.reduce()
    assert found["train/skipped_fraction"] == 1.0
    assert math.isnan(found["train/nelbo_nats"])
    assert math.isnan(found["train/active_channels"])
    assert found["speed/images_per_second"] == pytest.approx(4.0)


def test_an_interval_begins_where_the_one_before_was_reduced() -> None:
    metrics = local()
    metrics.add(step(reconstruction=4_000_000), COEFFICIENTS, 9.0)
    metrics.reduce()
    metrics.add(step(), COEFFICIENTS, 0.5)
    found = metrics.reduce()
    assert found["train/reconstruction_nats"] == pytest.approx(25.0)
    assert found["data/wait_seconds"] == pytest.approx(0.5)


def test_an_evaluation_does_not_count_as_training_time() -> None:
    metrics = local()  # The clock moves by one second whenever it is asked.
    metrics.add(step(), COEFFICIENTS, 0.0)
    with metrics.paused():
        pass
    assert metrics.reduce()["speed/seconds_per_step"] == pytest.approx(3 - 1)


def test_small_terms_survive_in_a_long_interval() -> None:
    metrics = local()
    for _ in range(2000):
        metrics.add(step(images=1, reconstruction=20_000.25), COEFFICIENTS, 0.0)
    assert metrics.reduce()["train/reconstruction_nats"] == pytest.approx(20_000.25, abs=1e-9)


def test_every_name_is_described_and_mlflow_allows_it(tmp_path: Path) -> None:
    folders = dict.fromkeys(("store", "cache", "temporary"), tmp_path)
    with Machine(CPU, folders, sample_seconds=0.01) as machine:
        deadline = time.monotonic() + 30
        while not machine.read() and time.monotonic() < deadline:
            pass
        metrics = Metrics(LocalWorker(CPU), CONFIG, machine)
        with metrics.timed():
            pass
        metrics.add(step(), COEFFICIENTS, 0.0)
        found = {re.sub(r"group_\d\d$", "group_00", name) for name in metrics.reduce()}
    of_gpus = {name for name in NAMES if "gpu" in name or "CUDA" in NAMES[name]} | {"memory/reserved_gib/max"}
    of_the_loop = {name for name in NAMES if name.startswith(("stability/", "checkpoint/"))}
    of_the_loop.add("train/largest_singular_value")
    assert found == set(NAMES) - of_gpus - of_the_loop
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in NAMES)


def test_nothing_but_the_reduction_reads_from_the_device() -> None:
    # A meta tensor has no value: reading one raises.
    on_meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in vars(step()).items()
    }
    metrics = local()
    metrics.add(StepResult(**on_meta), COEFFICIENTS, 0.0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics.reduce()
