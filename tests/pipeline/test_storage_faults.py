"""The store on a bad day: a real S3 server behind a proxy that harms what passes through it."""

import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
import trustme

from pipeline import patience, storage
from pipeline.config import StorageConfig
from pipeline.s3 import PART_BYTES
from pipeline.storage import MissingError, StoreError
from tests import s3_server
from tests.fault_proxy import FaultProxy
from tests.http_faults import Cut, Fail, Flip, Request, Reset, Shifted, Stall, Trickle, Whole

MB = 1_000_000
CONTENT = random.Random(0).randbytes(3 * MB)
# Whoever is busy with other work may take a while to answer, but not for ever.
PATIENT = StorageConfig(
    connect_timeout_seconds=2, read_timeout_seconds=0.6, retry_seconds=30, longest_pause_seconds=0.1
)
# The same time-outs: so the client is the same.
IMPATIENT = PATIENT.model_copy(update={"retry_seconds": 0.5})


@pytest.fixture(autouse=True)
def patient() -> Iterator[None]:
    storage.configure(PATIENT)
    yield
    storage.configure(StorageConfig())


@pytest.fixture(scope="module")
def stored(s3: str) -> str:
    """CONTENT in the bucket."""
    url = f"{s3}/faults/content"
    storage.write_bytes(url, CONTENT)
    return url


def gets(request: Request) -> bool:
    return request.method == "GET"


HEALING = [
    Fail(500, "InternalError"),
    Fail(502),
    Fail(503, "SlowDown"),
    Fail(504),
    Fail(429, "TooManyRequests"),
    Fail(400, "RequestTimeout"),
    Reset(),
    Reset(after=MB),
    Stall(60),
    Stall(60, after=MB),
    Cut(after=MB),
    Cut(after=MB, lying=True),
    Shifted(by=100_000, honest=True),
    Whole(),
    Trickle(bytes=100, seconds=0.2),
]


@pytest.mark.parametrize("fault", HEALING, ids=repr)
def test_a_read_survives_every_kind_of_fault_byte_for_byte(fault, stored, fault_proxy):
    fault_proxy.add(fault, gets, times=1)
    assert storage.read_bytes(stored, 500_000, 2_900_000) == CONTENT[500_000:2_900_000]
    assert fault_proxy.injected == {fault.name: 1}


@pytest.mark.parametrize("fault", [Fail(503, "SlowDown"), Reset(after=MB), Cut(after=MB)], ids=repr)
def test_a_whole_file_is_read_in_spite_of_faults(fault, stored, fault_proxy):
    fault_proxy.add(fault, gets, every=2)
    for _ in range(2):
        assert storage.read_bytes(stored) == CONTENT
    assert fault_proxy.injected[fault.name] >= 2


def test_wrong_bytes_under_a_right_name_are_left_to_the_checksums_of_the_samples(stored, fault_proxy):
    for fault in (Flip(at=10), Shifted(by=100_000)):
        fault_proxy.add(fault, gets, times=1)
        read = storage.read_bytes(stored, 0, MB)
        assert len(read) == MB
        assert read != CONTENT[:MB]
        assert storage.read_bytes(stored, 0, MB) == CONTENT[:MB]


def test_a_long_read_that_is_broken_every_five_megabytes_ends_and_reads_next_to_nothing_twice(
    s3, fault_proxy
):
    content = random.Random(1).randbytes(32 * MB)
    storage.write_bytes(f"{s3}/faults/long", content)
    fault_proxy.reset()
    fault_proxy.add(Reset(after=5 * MB), gets)
    # Progress moves the deadline: the whole may take longer than one fault may last.
    storage.configure(IMPATIENT)
    assert storage.read_bytes(f"{s3}/faults/long") == content
    breaks = fault_proxy.injected["Reset"]
    assert breaks >= 6
    # What a client had taken from its connection and not yet handed on.
    assert fault_proxy.sent_bytes - len(content) <= breaks * MB


def test_a_file_that_is_replaced_in_the_middle_is_read_from_the_beginning_once(s3, fault_proxy):
    url, new = f"{s3}/faults/replaced", random.Random(2).randbytes(3 * MB)
    storage.write_bytes(url, CONTENT)
    server = boto3.client("s3", endpoint_url="http://{}:{}".format(*fault_proxy.upstream))

    def replaces(content: bytes) -> Callable[[Request], bool]:
        def replace(request: Request) -> bool:
            if gets(request):
                server.put_object(
                    Bucket=storage.normalize(s3).split("//")[1], Key="faults/replaced", Body=content
                )
            return False

        return replace

    fault_proxy.add(Cut(after=MB), gets, times=1)
    fault_proxy.add(Cut(after=MB), replaces(new))
    before = storage.statistics()
    assert storage.read_bytes(url) == new
    assert storage.statistics().reread_bytes - before.reread_bytes == MB

    fault_proxy.reset()
    versions = iter(range(100))
    fault_proxy.add(Cut(after=MB), lambda request: replaces(CONTENT + bytes([next(versions)]))(request))
    fault_proxy.add(Cut(after=MB), gets)
    with pytest.raises(StoreError, match="was replaced while it was read"):
        storage.read_bytes(url)


# --- when patience ends -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fail(503, "SlowDown"), "keeps answering 503 SlowDown"),
        (Fail(500, "InternalError"), "keeps answering 500 InternalError"),
        (Reset(), "cannot be reached|connection"),
        (Stall(60), "does not answer in time"),
        (Cut(after=1000, lying=True), "do not fit what is asked"),
    ],
    ids=repr,
)
def test_a_fault_that_stays_ends_in_its_own_words_within_the_limit(fault, says, stored, fault_proxy):
    assert storage.size(stored) == len(CONTENT)
    storage.configure(IMPATIENT)
    fault_proxy.add(fault)
    with pytest.raises(StoreError, match=says) as caught:
        storage.read_bytes(stored, 0, MB)
    assert not isinstance(caught.value, MissingError)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_a_definite_answer_is_not_asked_for_twice(stored, fault_proxy):
    assert storage.size(stored) == len(CONTENT)
    fault_proxy.reset()
    with pytest.raises(MissingError):
        storage.read_bytes(f"{stored}-not")
    fault_proxy.add(Fail(403, "AccessDenied"))
    with pytest.raises(StoreError, match="access is denied"):
        storage.read_bytes(stored)
    assert len(fault_proxy.requests) == 2


def test_a_store_that_names_a_pause_gets_it(stored, fault_proxy):
    fault_proxy.add(Fail(503, "SlowDown", (("retry-after", "1"),)), gets, times=1)
    before = storage.statistics()
    assert storage.read_bytes(stored, 0, 10) == CONTENT[:10]
    after = storage.statistics()
    assert after.retries - before.retries == 1
    assert after.paused_seconds >= before.paused_seconds + 1  # their difference would be rounded once more


@pytest.mark.campaign
def test_a_store_known_to_others_is_waited_for_and_one_never_seen_is_not(s3, monkeypatch):
    """A worker that starts while the store is down must not take its address for misspelt."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.add(Fail(503, "SlowDown"))
        storage.configure(PATIENT.model_copy(update={"retry_seconds": 5.5}), reached=[s3])
        threading.Timer(4.5, proxy.clear).start()
        assert storage.list_dir(f"{s3}/nothing-here") == []


# --- listing, writing, deleting ---------------------------------------------------------------


def test_everything_but_reading_survives_faults_too(s3, fault_proxy, tmp_path):
    folder = f"{s3}/faults/folder"
    fault_proxy.add(Fail(503, "SlowDown"), every=3)
    fault_proxy.add(Reset(), every=3)
    for number in range(4):
        storage.write_bytes(f"{folder}/{number}", CONTENT[: number * 1000])
    assert storage.list_sizes(folder) == {str(number): number * 1000 for number in range(4)}
    assert storage.exists(folder)
    assert storage.size(f"{folder}/3") == 3000
    storage.delete(folder, recursive=True)
    assert storage.list_dir(folder) == []
    assert len(fault_proxy.injected) == 2


def test_an_upload_in_parts_survives_the_loss_of_parts_and_of_the_last_answer(s3, fault_proxy):
    content = random.Random(3).randbytes(2 * PART_BYTES + 12345)
    fault_proxy.add(Fail(503, "SlowDown"), lambda request: "partNumber=2" in request.query, times=1)
    fault_proxy.add(Reset(), lambda request: "partNumber=3" in request.query, times=1)
    last = fault_proxy.add(
        Reset(after=0), lambda request: request.method == "POST" and "uploadId" in request.query, times=1
    )
    storage.write_bytes(f"{s3}/faults/large", content)
    assert last.struck == 1
    assert fault_proxy.injected == {"Fail 503": 1, "Reset": 2}
    assert storage.read_bytes(f"{s3}/faults/large") == content


def test_an_upload_that_cannot_end_leaves_no_parts_behind(s3, fault_proxy):
    fault_proxy.add(Fail(403, "AccessDenied"), lambda request: "partNumber=3" in request.query)
    with pytest.raises(StoreError, match="access is denied"):
        storage.write_bytes(f"{s3}/faults/never", bytes(2 * PART_BYTES + 1))
    bucket = s3.removeprefix("s3://")
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=bucket)
    assert not storage.exists(f"{s3}/faults/never")


# --- credentials that expire --------------------------------------------------------------------


@pytest.fixture
def issue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which key a `credential_process` gives from now on: the only source of credentials."""
    issued = tmp_path / "issued.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {issued}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)

    def issue(access_key: str, **more: str) -> None:
        key = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": s3_server.SECRET_KEY, **more}
        issued.with_suffix(".new").write_text(json.dumps(key))
        issued.with_suffix(".new").replace(issued)

    return issue


def test_credentials_that_expire_in_the_middle_are_looked_up_anew(
    stored, fault_proxy, issue, monkeypatch, caplog
):
    monkeypatch.setattr(patience, "_renewing", patience.Line("Looking credentials up anew"))
    issue(s3_server.ACCESS_KEY)
    assert storage.read_bytes(stored, 0, 10) == CONTENT[:10]
    fault_proxy.add(Fail(400, "ExpiredToken"), lambda request: request.access_key == s3_server.ACCESS_KEY)
    # The new key comes a little late, as it does in life.
    threading.Timer(1.0, issue, [s3_server.SECOND_ACCESS_KEY]).start()
    before = storage.statistics()
    # The answer to HEAD cannot say why it refuses.
    assert storage.size(stored) == len(CONTENT)
    assert storage.read_bytes(stored) == CONTENT
    assert storage.statistics().renewals > before.renewals
    assert ["Looking credentials up anew (1" in record.message for record in caplog.records] == [True]
    assert s3_server.SECRET_KEY not in caplog.text
    assert fault_proxy.requests[-1].access_key == s3_server.SECOND_ACCESS_KEY


def test_credentials_that_stay_expired_end_in_a_message_that_says_so(stored, fault_proxy, issue):
    issue(s3_server.ACCESS_KEY)
    assert storage.read_bytes(stored, 0, 10) == CONTENT[:10]
    storage.configure(IMPATIENT)
    fault_proxy.add(Fail(400, "ExpiredToken"))
    with pytest.raises(StoreError, match=r"the credentials have expired.*AWS_ACCESS_KEY_ID"):
        storage.read_bytes(stored)


def test_credentials_that_announce_their_end_are_refreshed_before_it(stored, fault_proxy, issue):
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    issue(s3_server.ACCESS_KEY, Expiration=soon)
    assert storage.read_bytes(stored, 0, 10) == CONTENT[:10]
    issue(s3_server.SECOND_ACCESS_KEY, Expiration=soon)
    before = storage.statistics()
    assert storage.read_bytes(stored, 0, 10) == CONTENT[:10]
    assert storage.statistics() == before
    used = [request.access_key for request in fault_proxy.requests]
    assert used == [s3_server.ACCESS_KEY, s3_server.SECOND_ACCESS_KEY]


# --- a certificate authority of one's own ------------------------------------------------------


def test_a_private_authority_is_trusted_if_it_is_named_and_else_its_variable_is(
    stored, monkeypatch, tmp_path
):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"], tls=tls) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with pytest.raises(StoreError, match=r"certificate is not trusted.*AWS_CA_BUNDLE"):
            storage.read_bytes(stored)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        proxy.add(Reset(after=MB), gets, times=1)
        assert storage.read_bytes(stored) == CONTENT


def test_who_no_longer_wants_an_answer_does_not_wait_for_a_store_that_is_down(fault_proxy, stored):
    storage.configure(PATIENT.model_copy(update={"retry_seconds": 3600, "longest_pause_seconds": 600}))
    storage.read_bytes(stored, 0, 10)
    fault_proxy.add(Fail(503, "SlowDown"))
    unwanted = threading.Event()
    ends: list[Exception] = []

    def read() -> None:
        storage.give_up_when(unwanted)
        try:
            storage.read_bytes(stored, 0, 10)
        except StoreError as error:
            ends.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    while fault_proxy.injected["Fail 503"] < 2:
        time.sleep(0.01)
    assert reading.is_alive()
    unwanted.set()
    reading.join(5)
    assert not reading.is_alive()
    assert "overloaded" in str(ends[0])
