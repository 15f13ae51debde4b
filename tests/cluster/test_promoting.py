"""`nvae registry promote`, `rollback` and `history` as a user types them, on models that were trained."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from nvae.model import NVAE
from pipeline.models.export import export
from pipeline.models.lineage import Lineage
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


def registered(place: Place, spoil: bool = False, data_hash: str = "", **model: Any) -> int:
    """One more version, which nobody trained; the number that it got."""
    config = place.home.config(*(f"model.{key}={value}" for key, value in model.items()))
    root = f"{place.home.store}/data/tiny"
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    torch.manual_seed(len(data_hash))
    made = NVAE(config.model).eval()
    if spoil:
        with torch.no_grad():
            next(made.parameters()).view(-1)[0] = torch.nan
    first = Registry(place.home.tracking).find(f"models:/{place.name}/1")
    lineage = Lineage("made", first.run_id, 1, data_hash or first.data_hash, "1")
    url = export(str(place.folder(1).parent), place.name, made, config, lineage, {}).url
    return int(Registry(place.home.tracking).register(url, place.name).version.version)


def test_not_a_number_is_never_forced_and_other_pixels_or_other_data_only(place: Place) -> None:
    assert place.promote(1)[0].code == 0
    force = ("--force", "--reason", "to see")
    nan, shallow = registered(place, spoil=True), registered(place, pixel_bits=5)
    other = registered(place, data_hash="d1" * 32)
    for version, asked, why in [
        (nan, (), "not finite"),
        (nan, force, "not finite"),
        (shallow, (), "cannot be compared"),
        (other, (), "another data set"),
    ]:
        ended, facts = place.promote(version, *asked)
        assert (ended.code, facts["outcome"]) == (1, "refused")
        assert why in facts["why"]
        assert place.champion() == "1"
    # On a data set that is named both are measured, whatever they were trained on.
    _, facts = place.promote(other, "--data", "store:tiny")
    assert (facts["outcome"], facts["holder_score"] is None) == ("refused", False)
    ended, facts = place.promote(shallow, *force)
    assert (ended.code, place.champion()) == (0, str(shallow))
    assert facts["why"].startswith("forced: ")


def test_an_alias_that_was_moved_by_hand_is_put_back_with_a_line(place: Place) -> None:
    assert place.promote(1)[0].code == 0
    assert place.promote(2, "--force", "--reason", "x")[0].code == 0
    Registry(place.home.tracking).point("champion", f"models:/{place.name}/1")
    shown = nvae(place.capsys, "registry", "history", place.name)
    assert "champion is at version 1, its history at version 2" in shown.out + shown.err
    ended, _ = place.promote(2)
    assert "was at 1, past its history" in ended.out + ended.err
    assert place.champion() == "2"


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
