"""Fifty starts of each kind while the store is in use, and a store in which a tenth of all fails."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import StorageConfig
from tests.fault_proxy import FaultProxy
from tests.http_faults import Cut, Fail, Reset, Stall

pytestmark = pytest.mark.campaign

ROOT = Path(__file__).parents[2]
STARTS = 50
READS = 400


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    storage.configure(StorageConfig())


@pytest.mark.parametrize("how", ["os.fork", "fork", "forkserver", "spawn"])
def test_fifty_processes_started_while_the_store_is_in_use_can_use_it(how, s3):
    command = [sys.executable, "-m", "tests.storage_starts", f"{s3}/starts/{how}", how, str(STARTS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_no_byte_is_lost_where_a_fifth_of_all_requests_fails(s3):
    content = random.Random(0).randbytes(4_000_000)
    url = f"{s3}/faults/fifth"
    storage.write_bytes(url, content)
    storage.configure(StorageConfig(read_timeout_seconds=2))
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.add(Fail(503, "SlowDown"), probability=0.05)
        proxy.add(Fail(500, "InternalError"), probability=0.05)
        proxy.add(Reset(), probability=0.03)
        proxy.add(Reset(after=300_000), probability=0.03)
        proxy.add(Cut(after=200_000), probability=0.03)
        proxy.add(Stall(60, after=100_000), probability=0.01)
        draw = random.Random(1)
        ranges = [sorted(draw.sample(range(len(content)), 2)) for _ in range(READS)]
        before = storage.statistics()
        with ThreadPoolExecutor(4) as pool:
            read = pool.map(lambda bounds: storage.read_bytes(url, *bounds), ranges)
            assert all(data == content[start:end] for data, (start, end) in zip(read, ranges, strict=True))
        retries = storage.statistics().retries - before.retries
        assert retries >= READS / 10
        assert sum(proxy.injected.values()) >= retries
