"""`nvae registry promote`, `rollback` and `history` as a user types them, on models that were trained."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.models.promotion import history_name
from pipeline.models.registry import Registry
from tests.tiny_run import Home, Outcome, nvae

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Place:
    """Versions 1 and 2 of a model of the test's own, the second trained longer."""

    home: Home
    name: str
    capsys: Capture

    def promote(self, version: int, *arguments: str) -> tuple[Outcome, dict[str, Any]]:
        asked = ("registry", "promote", f"{self.name}/{version}", "--alias", "champion", "--json")
        ended = nvae(self.capsys, *asked, *arguments)
        return ended, json.loads(ended.out) if ended.out else {}

    def rollback(self) -> Outcome:
        return nvae(self.capsys, "registry", "rollback", self.name, "--alias", "champion")

    def history(self) -> list[dict[str, Any]]:
        shown = nvae(self.capsys, "registry", "history", self.name, "--json")
        found: list[dict[str, Any]] = json.loads(shown.out)
        return found

    def champion(self) -> str:
        client = MlflowClient(self.home.tracking, self.home.tracking)
        return str(client.get_registered_model(self.name).aliases["champion"])

    def folder(self, version: int) -> Path:
        return Path(Registry(self.home.tracking).find(f"models:/{self.name}/{version}").url)

    def evaluated(self, version: int) -> float:
        shown = nvae(self.capsys, "evaluate", f"models:/{self.name}/{version}", "--json")
        return float(json.loads(shown.out)["validation/bits_per_dim"])


@pytest.fixture(scope="module")
def exports(shared_home: Home) -> list[str]:
    """The weights of two trainings."""
    shared_home.train("promoted")
    shared_home.train("promoted-on", "train.total_images=96", "optimizer.learning_rate=3e-3")
    registry = Registry(shared_home.tracking)
    return [registry.find(f"models:/nvae-{name}/1").url for name in ("promoted", "promoted-on")]


@pytest.fixture
def place(home: Home, exports: list[str], tmp_path: Path, capsys: Capture) -> Place:
    name = f"nvae-{tmp_path.name}"
    for number, url in enumerate(exports):
        shutil.copytree(url, tmp_path / str(number))
        Registry(home.tracking).register(str(tmp_path / str(number)), name)
    return Place(home, name, capsys)


def test_the_better_takes_the_alias_and_the_worse_only_by_force_and_back_again(
    place: Place,
) -> None:
    measured = [place.evaluated(version) for version in (1, 2)]
    better, worse = (1, 2) if measured[0] < measured[1] else (2, 1)
    first, facts = place.promote(worse)
    assert (first.code, facts["outcome"], facts["from"]) == (0, "accepted", None)
    assert facts["score"] == measured[worse - 1]
    assert "Evaluating" not in first.err, "what was noted is not evaluated again"
    assert place.promote(better)[1]["holder_score"] == measured[worse - 1]
    assert place.champion() == str(better)
    again, facts = place.promote(better)
    assert (again.code, facts["outcome"]) == (0, "unchanged")
    refused, facts = place.promote(worse)
    assert (refused.code, facts["outcome"]) == (1, "refused")
    assert "is not below" in facts["why"]
    assert place.champion() == str(better)
    for force in (("--force",), ("--force", "--reason", " ")):
        ended, _ = place.promote(worse, *force)
        assert (ended.code, "--reason" in ended.err) == (2, True)
    forced, facts = place.promote(worse, "--force", "--reason", "it draws better hair")
    assert (forced.code, place.champion()) == (0, str(worse))
    assert [place.rollback().code, place.champion()] == [0, str(better)]
    assert [place.rollback().code, place.champion()] == [0, str(worse)]
    nothing = place.rollback()
    assert (nothing.code, "nothing to go back to" in nothing.err) == (2, True)
    found = place.history()
    assert [(row["kind"], row["outcome"], row["to"]) for row in found] == [
        ("promotion", "accepted", str(worse)),
        ("promotion", "accepted", str(better)),
        ("promotion", "refused", str(worse)),
        ("promotion", "accepted", str(worse)),
        ("rollback", "accepted", str(better)),
        ("rollback", "accepted", str(worse)),
    ]
    assert found[3]["reason"] == "it draws better hair"
    assert all("@" in row["who"] and row["when"] and row["code_version"] for row in found)
    assert all(row["data_hash"] and row["draws"] == 1 and row["images"] == 6 for row in found[:4])
    assert (
        "it draws better hair"
        in nvae(place.capsys, "registry", "history", place.name, "--alias", "champion").out
    )


def test_damage_is_refused_whatever_is_said_and_a_damaged_former_holder_is_passed_over(
    place: Place,
) -> None:
    assert place.promote(1, "--limit", "3")[0].code == 0
    assert place.promote(2, "--limit", "3", "--force", "--reason", "x")[0].code == 0
    weights = place.folder(1) / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    ended, facts = place.promote(1, "--limit", "3", "--force", "--reason", "I want it")
    assert (ended.code, facts["outcome"]) == (1, "refused")
    assert "model.safetensors" in facts["why"]
    back = place.rollback()
    assert back.code == 2
    assert "version 1 is passed over" in back.err
    assert place.champion() == "2"
    weights.unlink()
    assert place.promote(1, "--limit", "3")[0].code == 1
    weights.write_bytes(kept)
    assert place.rollback().code == 0
    assert place.champion() == "1"


def test_the_holder_is_measured_as_the_candidate_is_or_they_are_not_compared(
    place: Place,
) -> None:
    assert place.promote(1)[0].code == 0
    _, facts = place.promote(2, "--samples", "2", "--limit", "4", "--seed", "5")
    assert facts["criterion"] == "validation/importance_weighted_bits_per_dim"
    assert (facts["images"], facts["draws"], facts["seed"]) == (4, 2, 5)
    assert facts["holder_score"] is not None
    assert (facts["outcome"] == "accepted") == (facts["score"] < facts["holder_score"])
    # A holder that cannot be read any more has no score: only force takes its place.
    holder, other = (2, 1) if facts["outcome"] == "accepted" else (1, 2)
    shutil.rmtree(place.folder(holder))
    ended, facts = place.promote(other, "--samples", "3")
    assert (ended.code, "is damaged" in facts["why"]) == (1, True)
    assert place.promote(other, "--samples", "3", "--force", "--reason", "it is gone")[0].code == 0
    assert place.champion() == str(other)


def test_what_names_nothing_is_one_message_and_leaves_nothing(place: Place) -> None:
    known = place.name
    wrong = [
        ("../../x", "champion"),
        (f"{known}/../1", "champion"),
        (known, "champion"),
        (f"{history_name(known)}/1", "champion"),
        (f"{known}/1", "../x"),
        (f"{known}/1", "a/b"),
        (f"{known}/1", "latest"),
        (f"{known}/1", "7"),
        (f"{known}/1", "best"),
        (f"{known}/77", "champion"),
        ("nvae-unseen/1", "champion"),
    ]
    for model, alias in wrong:
        ended = nvae(place.capsys, "registry", "promote", model, "--alias", alias)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("Error: ")
    for asked in (
        ("rollback", "../../x", "--alias", "champion"),
        ("history", "nvae-unseen"),
        ("history", "a/b"),
    ):
        assert nvae(place.capsys, "registry", *asked).code == 2
    assert place.history() == []
    client = MlflowClient(place.home.tracking, place.home.tracking)
    assert history_name(known) not in [model.name for model in client.search_registered_models()]
