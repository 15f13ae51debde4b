"""What the proxy counts as injected did change an answer, or delay it, and nothing else is counted."""

import os
import random
from collections.abc import Callable

import boto3
import pytest

from tests.http_faults import Cut, Flip, Reset, Shifted, Stall, Trickle, Whole

SIZE = 300_000
PART = 100_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture
def read(s3, fault_proxy) -> Callable[..., bytes]:
    """Reads CONTENT through the proxy, all of it or a range, by a client that is none of ours."""
    bucket, address = s3.removeprefix("s3://"), "http://{}:{}".format(*fault_proxy.upstream)
    there = {"Bucket": bucket, "Key": "fault-proxy/content"}
    boto3.client("s3", endpoint_url=address).put_object(Body=CONTENT, **there)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])

    def read(begin: int | None = None, end: int = SIZE) -> bytes:
        asked = {} if begin is None else {"Range": f"bytes={begin}-{end - 1}"}
        content: bytes = client.get_object(**there, **asked)["Body"].read()
        return content

    return read


@pytest.mark.parametrize(
    "fault",
    [
        Reset(after=PART),
        Stall(60, after=PART),
        Cut(after=PART),
        Cut(after=PART, lying=True),
        Trickle(PART, 60),
        Flip(at=PART),
        Shifted(by=0),
        Shifted(by=SIZE, honest=True),
    ],
    ids=repr,
)
def test_a_fault_that_changes_nothing_is_not_counted(fault, read, fault_proxy):
    """All strike an answer that ends before, and find no other bytes of this number."""
    rule = fault_proxy.add(fault)
    assert read(0, PART) == CONTENT[:PART]
    assert rule.struck == 1
    assert not fault_proxy.injected


@pytest.mark.parametrize("fault", [Shifted(by=PART), Whole()], ids=repr)
def test_an_answer_that_is_no_range_has_none_to_be_changed(fault, read, fault_proxy):
    rule = fault_proxy.add(fault)
    assert read() == CONTENT
    assert rule.struck == 1
    assert not fault_proxy.injected


@pytest.mark.parametrize(("by", "begin", "found"), [(-PART, 0, PART), (PART, 2 * PART, PART)])
def test_other_bytes_are_those_on_the_other_side_where_the_file_ends_before(
    by, begin, found, read, fault_proxy
):
    fault_proxy.add(Shifted(by))
    assert read(begin, begin + PART) == CONTENT[found : found + PART]
    assert fault_proxy.injected == {"Shifted": 1}
