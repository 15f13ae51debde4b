"""What a user is told of a store that falters; with a real S3 server behind a proxy."""

import threading
from collections.abc import Iterator

import pytest

from pipeline import patience, storage
from pipeline.config import StorageConfig
from tests.http_faults import Fail, Request

CONTENT = b"0123456789"


@pytest.fixture(autouse=True)
def patient() -> Iterator[None]:
    storage.configure(StorageConfig(read_timeout_seconds=0.6, longest_pause_seconds=0.1))
    yield
    storage.configure(StorageConfig())


@pytest.fixture
def stored(s3: str) -> str:
    """CONTENT in the bucket."""
    storage.write_bytes(f"{s3}/patience/content", CONTENT)
    return f"{s3}/patience/content"


def gets(request: Request) -> bool:
    return request.method == "GET"


def test_a_store_that_falters_is_a_warning_every_half_minute_and_a_number(
    stored, fault_proxy, monkeypatch, caplog
):
    seconds = 1000.0
    monkeypatch.setattr(patience, "_trying_again", patience.Line("Trying again", clock=lambda: seconds))
    for passed in (0, 29, 31):
        seconds = 1000.0 + passed
        fault_proxy.add(Fail(503, "SlowDown"), gets, times=3)
        assert storage.read_bytes(stored) == CONTENT
    assert len(caplog.records) == 2
    for record, times in zip(caplog.records, (1, 6), strict=True):
        assert record.levelname == "WARNING"
        assert f"Trying again ({times} since" in record.message
        assert stored in record.message
        assert "503 SlowDown" in record.message


def test_all_threads_of_a_process_share_one_warning(stored, fault_proxy, monkeypatch, caplog):
    monkeypatch.setattr(patience, "_trying_again", patience.Line("Trying again"))
    storage.read_bytes(stored)
    # No reset: on a connection that was idle the client's own library tries once more, and says nothing.
    fault_proxy.add(Fail(503, "SlowDown"), gets, times=8)
    threads = [threading.Thread(target=storage.read_bytes, args=(stored,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["Trying again (1 since" in record.message for record in caplog.records] == [True]
