"""Stores that do not take checkpoints: a bucket that is slow, refuses or is silent, a disk that is full.

A training has to go on meanwhile, to say in its log that nothing is saved, to keep the
checkpoints that it has, and to save again once the store takes it.
"""

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from pipeline.training.checkpoint import images_saved, newest
from tests import s3_server
from tests.fault_proxy import FaultProxy
from tests.faults.data_resources import mounted, why_no_mounts
from tests.faults.injection import Tally
from tests.faults.training_kills import WORKER_SECONDS, judged
from tests.faults.training_runs import (
    BATCH,
    CHECKPOINT_UPDATES,
    Place,
    Training,
    TrainingRow,
    kill,
    small_updates,
    wait_until,
)
from tests.http_faults import Fail, Fault, Request, Stall

SLOW = Stall(0.3)
"""Before each write."""
LEFT_OUT = "the one before is still being written"
FAILED = "was not written, the older ones are kept"
# The training is stopped when all has been tried. A save gives up before.
SETTINGS = (*small_updates(1_000_000), "storage.read_timeout_seconds=2", "storage.retry_seconds=3")
DISK_BYTES = 32 << 20
_CHECKPOINT = re.compile(r"/checkpoints/(\d{12}-\d{3})/")


def uploads(place: Place) -> TrainingRow:
    """A bucket that takes its time, refuses or says nothing whenever it is written to."""
    rounds = 1 if place.short else 4
    failing: dict[str, Fault] = {"refused": Fail(503, "SlowDown"), "without an answer": Stall(60)}
    tally, recoveries = Tally(), []
    with bucket(place) as (store, proxy):
        broken = Training(place, "broken", *SETTINGS, store=store)
        broken.start()
        for number in range(rounds):
            with tally.attempt(f"each write {SLOW.seconds} s slower, {number}"):
                _saves_slowly(broken, harmed(proxy, SLOW))
            for name, fault in failing.items():
                with tally.attempt(f"uploads {name}, {number}"):
                    _goes_on_without_saves(broken, harmed(proxy, fault))
            with tally.attempt(f"a worker killed amid a slow upload, {number}"):
                recoveries.append(_killed_amid_an_upload(broken, proxy))
        broken.stop()
        with tally.attempt("one writer at a time"):
            assert not (twice := _written_again(proxy)), f"written again after others were begun: {twice}"
        what = f"writes to a bucket {SLOW.seconds} s slower, refused, not answered"
        row = judged(tally, "C3", what, broken, recoveries, WORKER_SECONDS)
    return row.with_more(_alarms(broken))


def disks(place: Place) -> TrainingRow:
    """A disk that others fill to its last byte, again and again. Only who may mount one can try it."""
    fault = "a disk that gets full"
    if why := why_no_mounts(place.folder):
        return TrainingRow("C5", fault, 0, 0, "", untried=why)
    tally, disk = Tally(), place.folder / "disk"
    disk.mkdir()
    with mounted(disk, DISK_BYTES):
        broken = Training(place, "broken", *SETTINGS, store=f"{disk}/store")
        broken.start()
        for number in range(2 if place.short else 10):
            with tally.attempt(f"a full disk, {number}"):
                _goes_on_without_saves(broken, _full(disk))
        broken.stop()
        row = judged(tally, "C5", fault, broken, [], WORKER_SECONDS)
    return row.with_more(_alarms(broken))


def _goes_on_without_saves(training: Training, fault: AbstractContextManager[None]) -> None:
    """Waits, amid the fault, for the alarm and more updates; after it for a new checkpoint."""
    training.wait_for(lambda: images_saved(training.run_url) > 0, "the first checkpoint")
    before = _said(training, FAILED)
    with fault:
        training.wait_for(lambda: _said(training, FAILED) > before, f"the line {FAILED!r}")
        images = training.notes.read().images_seen()
        training.wait_for_images(images + 2 * CHECKPOINT_UPDATES * BATCH)
        assert newest(training.run_url) is not None
    training.wait_for(lambda: images_saved(training.run_url) > images, "a checkpoint after the fault")


def _saves_slowly(training: Training, fault: AbstractContextManager[None]) -> None:
    """Waits, amid the fault, for more updates and for a checkpoint of them."""
    training.wait_for(lambda: images_saved(training.run_url) > 0, "the first checkpoint")
    with fault:
        images = training.notes.read().images_seen()
        training.wait_for_images(images + 2 * CHECKPOINT_UPDATES * BATCH)
        training.wait_for(lambda: images_saved(training.run_url) > images, "a checkpoint by a slow store")


def _said(training: Training, alarm: str) -> int:
    return training.output.read_text(errors="replace").count(alarm)


def _alarms(training: Training) -> str:
    return f"{_said(training, LEFT_OUT)} saves left out, {_said(training, FAILED)} given up, in the log"


# -- a bucket -----------------------------------------------------------------------------


@contextmanager
def bucket(place: Place) -> Iterator[tuple[str, FaultProxy]]:
    """An empty bucket of a real S3 server; the environment leads to the proxy in front of it."""
    with (
        s3_server.serving(place.folder / "s3") as server,
        FaultProxy(server.client["AWS_ENDPOINT_URL_S3"], place.seed) as proxy,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name, value in {**server.client, "AWS_ENDPOINT_URL_S3": proxy.url}.items():
            environment.setenv(name, value)
        s3_server.make_bucket("faults")
        yield "s3://faults/store", proxy


@contextmanager
def harmed(proxy: FaultProxy, fault: Fault) -> Iterator[None]:
    """Raises, in the end, if nobody wrote meanwhile: the fault was none then."""
    rule = proxy.add(fault, is_a_write)
    try:
        yield
        assert rule.struck, f"nobody wrote to the bucket that was to meet {fault}"
    finally:
        proxy.clear()


def is_a_write(request: Request) -> bool:
    return request.method in ("PUT", "POST")


def _killed_amid_an_upload(training: Training, proxy: FaultProxy) -> float:
    """Rank 0 killed while the bucket takes its time with a checkpoint; seconds to the next update."""
    rule = proxy.add(SLOW, lambda request: is_a_write(request) and bool(_CHECKPOINT.search(request.path)))
    wait_until(lambda: rule.struck > 0, "a checkpoint to be uploaded", 60)
    victim = training.notes.read().newest()[0]
    moment = time.monotonic()
    kill(victim.pid)
    seconds = training.wait_for_update(moment, victim.launch)
    proxy.clear()
    return seconds


def _written_again(proxy: FaultProxy) -> list[str]:
    """Checkpoints of which a file was written after a file of another had been, and one of theirs before."""
    written = [_CHECKPOINT.search(request.path) for request in proxy.requests if request.method == "PUT"]
    turns = [name for name, _ in groupby(match[1] for match in written if match)]
    return sorted({name for name in turns if turns.count(name) > 1})


# -- a disk -------------------------------------------------------------------------------


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    """Others have filled it to its last byte."""
    filler = disk / "others"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 20))
    try:
        yield
    finally:
        filler.unlink()
