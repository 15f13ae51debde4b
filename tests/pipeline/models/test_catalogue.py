"""The catalogue beside what MLflow says when it is asked for everything, whatever happened in between."""

import os
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlflow import MlflowClient

from pipeline.models import catalogue as catalogues
from pipeline.models.catalogue import Catalogue
from pipeline.models.registry import Registry
from pipeline.models.version_cache import cache_path

TAGS = {
    "weights.url": "s3://bucket/models/x",
    "weights.sha256": "a" * 64,
    "manifest.sha256": "b" * 64,
    "images_seen": "100",
    "data.hash": "d1" * 32,
    "validation/bits_per_dim": "3.5",
}


class Place:
    """An MLflow database with the models `a` and `b`, and a cache folder."""

    def __init__(self, folder: Path, empty: Path) -> None:
        database = folder / "mlflow.db"
        shutil.copy(empty, database)
        self.uri = f"sqlite:///{database}"
        self.client = MlflowClient(self.uri, self.uri)
        for name in "ab":
            self.client.create_registered_model(name)

    def add(self, name: str, **tags: str) -> int:
        found = self.client.create_model_version(
            name, "runs:/x/model", tags=TAGS | tags, await_creation_for=0
        )
        return int(found.version)


@pytest.fixture
def place(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place(tmp_path, empty_database)


def listed(
    place: Place, *, refresh: bool = False, remember: bool = True
) -> list[tuple[str, tuple[str, ...], float]]:
    found = Catalogue(place.uri, remember=remember).versions(refresh=refresh)
    return sorted((each.ref, each.aliases, each.score) for each in found)


def test_new_versions_moved_aliases_and_noted_tags_are_seen(place):
    place.add("a")
    assert listed(place) == [("models:/a/1", (), 3.5)]
    place.add("b", **{"validation/bits_per_dim": "2.5"})
    place.client.set_registered_model_alias("a", "best", "1")
    assert listed(place) == [("models:/a/1", ("best",), 3.5), ("models:/b/1", (), 2.5)]
    registry = Registry(place.uri)
    registry.note(registry.find("models:/b/1"), {"validation/bits_per_dim": "2.25"})
    place.client.set_registered_model_alias("b", "champion", "1")
    place.client.delete_registered_model_alias("a", "best")
    assert listed(place) == [("models:/a/1", (), 3.5), ("models:/b/1", ("champion",), 2.25)]


def test_what_was_noted_is_seen_long_after_it_was_registered(place, monkeypatch):
    """That is, without the margin in which everything is read again."""
    monkeypatch.setattr(catalogues, "MARGIN_MILLISECONDS", 0)
    place.add("a")
    place.add("a")
    assert [score for _, _, score in listed(place)] == [3.5, 3.5]
    registry = Registry(place.uri)
    registry.note(registry.find("models:/a/1"), {"validation/bits_per_dim": "1.5"})
    assert [score for _, _, score in listed(place)] == [1.5, 3.5]


def test_what_others_delete_or_edit_by_hand_is_noticed_before_it_is_shown(place, monkeypatch):
    monkeypatch.setattr(catalogues, "MARGIN_MILLISECONDS", 0)
    for _ in range(3):
        place.add("a")
    catalogue = Catalogue(place.uri)
    before = sorted(catalogue.versions(), key=lambda each: each.ref)
    assert catalogue.confirmed(before) == before
    place.client.delete_model_version("a", "2")
    place.client.set_model_version_tag("a", "3", "validation/bits_per_dim", "0.5")
    place.client.set_registered_model_alias("a", "champion", "1")
    first, second, third = catalogue.confirmed(before)
    assert first is not None
    assert (first.ref, first.aliases) == ("models:/a/1", ("champion",))
    assert second is None
    assert third is not None
    assert third.score == 0.5
    assert [ref for ref, *_ in listed(place)] == ["models:/a/1", "models:/a/3"]


def test_a_refresh_sees_whatever_there_is(place, monkeypatch):
    monkeypatch.setattr(catalogues, "MARGIN_MILLISECONDS", 0)
    for _ in range(3):
        place.add("a")
    listed(place)
    place.client.delete_model_version("a", "1")
    place.client.set_model_version_tag("a", "2", "validation/bits_per_dim", "0.5")
    place.add("b")
    assert listed(place, refresh=True) == [
        ("models:/a/2", (), 0.5),
        ("models:/a/3", (), 3.5),
        ("models:/b/1", (), 3.5),
    ]


def test_more_changes_than_a_page_holds_are_read_as_well(place, monkeypatch):
    monkeypatch.setattr(catalogues, "_FIRST_PAGE", 2)
    monkeypatch.setattr(catalogues, "_LARGEST_PAGE", 3)
    monkeypatch.setattr(catalogues, "MARGIN_MILLISECONDS", 0)
    place.add("a")
    assert len(listed(place)) == 1
    for name in "aababbb":
        place.add(name)
    assert len(listed(place)) == 8


def test_a_model_that_is_renamed_or_deleted_is_not_listed_under_its_old_name(place):
    place.add("a")
    place.add("b")
    listed(place)
    place.client.rename_registered_model("a", "c")
    place.client.delete_registered_model("b")
    assert [ref for ref, *_ in listed(place)] == ["models:/c/1"]


def test_versions_of_others_are_left_out(place):
    place.add("a")
    place.client.create_model_version("a", "runs:/x/model", await_creation_for=0)
    place.client.create_registered_model("some one's model")
    assert [ref for ref, *_ in listed(place)] == ["models:/a/1"]


def test_an_unchanged_database_is_not_asked(place, monkeypatch):
    place.add("a")
    expected = Catalogue(place.uri).versions()
    Catalogue(place.uri).confirmed(expected)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "pipeline.models.connection", None)
    again = Catalogue(place.uri)
    assert again.versions() == expected
    assert again.confirmed(expected) == expected


def damage_header(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def damage_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200:] = os.urandom(len(data) - 200)
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_row(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE versions SET tags = 'half a pair'")


def other_layout(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("damage", [damage_header, damage_pages, cut, damage_row, other_layout])
def test_a_damaged_cache_is_made_anew(place, damage):
    place.add("a")
    expected = listed(place)
    damage(cache_path(place.uri))
    assert listed(place) == expected
    assert listed(place) == expected


def test_where_nothing_can_be_written_nothing_is_remembered(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    place.add("a")
    assert [ref for ref, *_ in listed(place)] == ["models:/a/1"]


def test_the_cache_is_for_its_user_alone(place):
    listed(place)
    assert cache_path(place.uri).parent.stat().st_mode & 0o777 == 0o700


class Histories(RuleBasedStateMachine):
    """Whatever we do to a registry, a catalogue that was kept lists what MLflow lists."""

    folder: Path
    empty: Path
    count = 0

    @initialize()
    def begin(self) -> None:
        Histories.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        self.place = Place(folder, self.empty)
        self.numbers: list[tuple[str, int]] = []

    @rule(name=st.sampled_from("ab"))
    def register(self, name: str) -> None:
        self.numbers.append((name, self.place.add(name)))

    @precondition(lambda self: self.numbers)
    @rule(data=st.data(), alias=st.sampled_from(["best", "champion"]))
    def point(self, data: st.DataObject, alias: str) -> None:
        name, number = data.draw(st.sampled_from(self.numbers))
        self.place.client.set_registered_model_alias(name, alias, str(number))

    @precondition(lambda self: self.numbers)
    @rule(data=st.data(), bits=st.integers(1, 9))
    def note(self, data: st.DataObject, bits: int) -> None:
        name, number = data.draw(st.sampled_from(self.numbers))
        registry = Registry(self.place.uri)
        registry.note(registry.find(f"models:/{name}/{number}"), {"validation/bits_per_dim": str(bits)})

    @invariant()
    def lists_what_mlflow_lists(self) -> None:
        assert listed(self.place) == listed(self.place, remember=False)


def test_a_kept_catalogue_lists_what_mlflow_lists(tmp_path, empty_database, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogues, "MARGIN_MILLISECONDS", 0)
    Histories.folder, Histories.empty = tmp_path, empty_database
    few = settings(
        max_examples=6, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Histories, settings=few)
