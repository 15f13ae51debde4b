"""Which numbers of workers share a batch, and that a narrower run needs no more memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.nodes import widest
from pipeline import preparation
from pipeline.training.train import step_settings
from pipeline.width import Workers
from tests.tiny_run import Home

ranges = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: Workers(pair[0], sum(pair)))


@given(workers=ranges, batch_size=st.integers(1, 300), places=st.integers(0, 100))
def test_the_widest_layout_that_shares_the_batch_and_finds_places_is_chosen(
    workers: Workers, batch_size: int, places: int
) -> None:
    possible = [
        width
        for width in range(workers.minimum, workers.maximum + 1)
        if batch_size % width == 0 and width <= places
    ]
    assert widest(workers.widths(batch_size), places) == max(possible, default=0)


@pytest.mark.parametrize(("text", "shown"), [("1", "1"), ("3:3", "3"), ("2:8", "2 to 8")])
def test_a_number_and_a_range_of_workers_are_understood(text: str, shown: str) -> None:
    assert str(Workers.parse(text)) == shown


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "2:", ":2", "3:2", "0:2", "1:2:3", "1.5"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Workers.parse(text)


@settings(max_examples=50, deadline=None)
@given(batch_size=st.integers(1, 48), maximum=st.integers(1, 48))
def test_a_narrower_run_needs_no_more_memory(shared_home: Home, batch_size: int, maximum: int) -> None:
    asked = shared_home.config(f"train.batch_size={batch_size}")
    widths = preparation.widths_of(asked, Workers(1, maximum))
    config = preparation.with_bounded_memory(asked, widths[-1])
    for width in widths:
        share = batch_size // width
        in_memory = -(-share // step_settings(config, share).micro_batches)
        assert in_memory <= batch_size // widths[-1]
