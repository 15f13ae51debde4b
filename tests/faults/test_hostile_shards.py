"""Hostile tars that take long: streamed in bounded memory, whatever they announce."""

import pytest

from tests.pipeline.data.hostile_tars import TAR_PAYLOADS
from tests.pipeline.data.test_hostile_shards import assert_met, meet_payloads

SLOW = [payload for payload in TAR_PAYLOADS if payload.slow]
pytestmark = pytest.mark.campaign


def test_tars_of_gigabytes_and_of_a_million_members_are_read_in_bounded_memory(tmp_path):
    met = meet_payloads(tmp_path, "slow")
    assert set(met) == {payload.name for payload in SLOW}
    for payload in SLOW:
        assert_met(payload, met[payload.name])
