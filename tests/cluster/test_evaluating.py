"""`nvae evaluate` as a user types it: what is recorded, and on real Ray workers."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import sharded_evaluation
from pipeline.models.registry import Registry
from pipeline.training.worker import LocalWorker
from tests.tiny_run import Home, nvae

Capture = pytest.CaptureFixture[str]
MODEL = "models:/nvae-seen/1"


@pytest.fixture
def trained(home: Home) -> str:
    home.train("seen")
    return MODEL


def evaluated(capsys: Capture, *arguments: str) -> dict[str, Any]:
    ended = nvae(capsys, "evaluate", *arguments, "--json")
    assert ended.code == 0, ended.err
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


def evaluation_tags(home: Home) -> dict[str, dict[str, Any]]:
    tags = MlflowClient(home.tracking).get_model_version("nvae-seen", "1").tags
    return {key: json.loads(value) for key, value in tags.items() if key.startswith("evaluation/")}


def test_figures_are_noted_at_the_version_beside_those_of_other_draws_and_never_as_its_score(
    home: Home, trained: str, capsys: Capture
) -> None:
    before = Registry(home.tracking).find(trained).metrics
    assert evaluated(capsys, trained, "--no-record")["recorded_at"] is None
    assert evaluation_tags(home) == {}
    first = evaluated(capsys, trained, "--samples", "2", "--limit", "3")
    evaluated(capsys, trained)
    evaluated(capsys, trained)
    tags = evaluation_tags(home)
    assert {(tag["draws"], tag["validation/images"]) for tag in tags.values()} == {(2, 3), (1, 6)}
    assert len(tags) == 2
    assert first["recorded_at"] == trained
    noted = next(tag for tag in tags.values() if tag["draws"] == 2)
    assert noted["validation/importance_weighted_nats"] == first["validation/importance_weighted_nats"]
    assert noted["data_hash"] == first["data_hash"]
    assert Registry(home.tracking).find(trained).metrics == before
    # A folder of weights has no version at which anything could be noted.
    weights = Registry(home.tracking).find(trained).url
    assert evaluated(capsys, weights)["recorded_at"] is None


class Stopped(LocalWorker):
    def stop_requested(self) -> bool:
        return True


def test_an_evaluation_that_was_asked_to_stop_has_no_figures(home: Home, trained: str) -> None:
    version = Registry(home.tracking).find(trained)
    arguments = {"model": version.url, "manifest": version.manifest_sha256, "data": f"{home.store}/data/tiny"}
    arguments |= {"draws": 1, "limit": None, "batch_size": 4, "seed": 0}
    answer = sharded_evaluation.work(arguments, Stopped())
    assert answer["state"] == "stopped"
    assert "scores" not in answer


@pytest.mark.campaign
def test_three_ray_workers_find_the_figures_of_one_to_the_last_bit(
    home: Home, trained: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three pieces of the split. This process may have more threads than Ray's, which rounds otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    built = nvae(
        capsys, "shards", "build", "portraits:160", "store:many", "--image-size", "8",
        "--validation-count", "140",
    )  # fmt: skip
    assert built.code == 0, built.err
    asked = (trained, "--data", "store:many", "--samples", "3", "--no-record")
    one, three = (evaluated(capsys, *asked, "--workers", number) for number in ("1", "3"))
    assert three["validation/images"] == 140 > 2 * sharded_evaluation.PIECE_IMAGES
    assert three == one
    here = evaluated(capsys, *asked)
    figures = [name for name in here if name.startswith("validation/")]
    assert [three[name] for name in figures] == pytest.approx([here[name] for name in figures], rel=1e-6)
    assert not any(Path(home.store, "evaluations").glob("*"))
