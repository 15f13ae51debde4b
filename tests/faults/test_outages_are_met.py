"""A scenario counts only if its outage was one, and leaves nothing broken to the next."""

from collections.abc import Iterator

import pytest

from tests.faults import tracking_place
from tests.faults.tracking_faults import attempt, main
from tests.faults.tracking_place import Place, places
from tests.http_faults import Fail

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with places(tmp_path_factory.mktemp("place"), seed=0) as place:
        yield place


@pytest.fixture(autouse=True)
def soon_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_place, "LOST_FOR_GOOD", 10.0)


def no_outage(place: Place, name: str) -> None:
    place.train(name)


def an_outage_of_nothing(place: Place, name: str) -> None:
    place.during_fault_of_server(name, lambda: None, lambda: None)


def answers_that_are_not_slow(place: Place, name: str) -> None:
    place.slow_answers(0.0, 10_000, name)


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        (no_outage, "no request met the outage"),
        (an_outage_of_nothing, "in vain for a delivery that meets the fault"),
        (answers_that_are_not_slow, "in vain for 10000 slow answers"),
    ],
)
def test_an_outage_that_nobody_met_is_not_survived(place, scenario, why) -> None:
    counts = attempt(place, scenario)
    assert (counts.tried, counts.survived) == (1, 0)
    assert why in counts.broken[0]


def test_a_server_that_lives_and_a_disk_with_room_are_no_outages(place: Place) -> None:
    with pytest.raises(AssertionError, match="never killed"):
        place.start_server()
    place.fill_disk()
    with pytest.raises(AssertionError, match="not there to be killed"):
        place.server.kill()
        place.kill_server()


def test_what_a_scenario_left_broken_is_mended_for_the_next(place: Place) -> None:
    def broken_off(place: Place, name: str) -> None:
        place.fail(Fail(500))
        place.fill_disk()
        place.server.kill()
        raise RuntimeError("in the middle of an outage")

    def next_one(place: Place, name: str) -> None:
        assert place.server_answers() and not place.proxy.rules and not place.faults
        place.make_room()

    assert "in the middle of an outage" in attempt(place, broken_off).broken[0]
    assert "no request met the outage" in attempt(place, next_one).broken[0]


def test_an_outage_that_is_none_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "away_at_the_start,eclipse"])
    assert ended.value.code == 2
    assert "no outages eclipse" in capsys.readouterr().err
