"""`nvae evaluate` as a user types it: what is recorded, and on real Ray workers."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline import sharded_evaluation
from pipeline.data.index import load_index
from pipeline.data.loader import evaluation_batches
from pipeline.models.registry import Registry, load
from pipeline.models.sampling import sample_images
from pipeline.training.worker import LocalWorker
from tests.pipeline.models.narrow_inception import narrow
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


# -- FID, precision and recall ---------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """What a user has: a pickle of tensors, with the classes that nobody needs here."""
    path = tmp_path / "narrow.pth"
    torch.save(narrow().state_dict() | {"fc.bias": torch.zeros(1008)}, path)
    return str(path)


def quality(capsys: Capture, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = evaluated(capsys, "--fid-samples", "9", *arguments)["sample_quality"]
    return answer


def test_samples_are_measured_beside_images_noted_and_looked_up(
    home: Home, trained: str, weights: str, capsys: Capture
) -> None:
    sha256 = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    asked = (trained, "--inception", weights, "--temperature", "0.7,1")
    first = quality(capsys, *asked)
    assert (first["samples"], first["reference_images"], first["temperature"]) == (9, 9, [0.7, 1.0])
    assert first["inception_sha256"] == sha256
    assert "9 samples" in first["comparable"]
    assert quality(capsys, *asked, "--inception-sha256", sha256[:8]) == first
    other = quality(capsys, trained, "--inception", weights, "--fid-reference", "validation", "--no-record")
    assert (other["reference_images"], other["fid"]) != (6, first["fid"])
    version = Registry(home.tracking).find(trained)
    (noted,) = version.sample_quality
    assert {name: getattr(noted, name) for name in ("fid", "precision", "recall")} == {
        name: first[name] for name in ("fid", "precision", "recall")
    }
    found = nvae(capsys, "registry", "find", f"fid <= {first['fid'] + 1} and recall >= 0", "--json")
    assert [row["fid"] for row in json.loads(found.out)] == [first["fid"]]
    shown = nvae(capsys, "registry", "show", trained, "--json")
    assert json.loads(shown.out)["sample_quality"][0]["inception_sha256"] == sha256


def test_what_is_measured_is_the_distance_of_these_features(
    home: Home, trained: str, weights: str, capsys: Capture
) -> None:
    """Beside pictures drawn and features taken one by one, and numpy's covariance."""
    answer = quality(capsys, trained, "--inception", weights, "--fid-reference", "validation", "--no-record")
    loaded = load(trained, home.tracking)
    drawn = sample_images(loaded.model, 9, 1.0, seed=0, pixels="sample", batch_size=1)
    index = load_index(f"{home.store}/data/tiny")
    batches = evaluation_batches(loaded.config, index, rank=0, world_size=1, batch_size=1)
    images = torch.cat([batch.images[batch.weights > 0] for batch in batches]).float() / 255
    network = narrow()
    features = [
        torch.cat([network(each[None]) for each in pictures]).double().numpy()
        for pictures in (images, torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255)
    ]
    means, covariances = [each.mean(0) for each in features], [np.cov(each.T) for each in features]
    overlap = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    fid = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * overlap
    # Features are rounded to 2^-12; what they are rounded from depends on the batch.
    assert answer["fid"] == pytest.approx(fid, rel=1e-3)
    assert answer["precision_recall_images"] == [6, 9]


def test_features_of_a_data_set_are_kept_and_taken_anew_if_they_were_damaged(
    home: Home, trained: str, weights: str, capsys: Capture
) -> None:
    asked = (trained, "--inception", weights, "--no-record")
    shutil.rmtree(Path(home.store, "features"), ignore_errors=True)
    first = quality(capsys, *asked)
    (kept,) = Path(home.store, "features").glob("*/features.safetensors")
    before = kept.stat().st_mtime_ns
    assert quality(capsys, *asked) == first
    assert kept.stat().st_mtime_ns == before
    data = kept.read_bytes()
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert quality(capsys, *asked) == first
    assert kept.read_bytes() == data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inception", "nowhere.pth"], "nowhere.pth"),
        (["--inception", "WEIGHTS", "--inception-sha256", "00000000"], "not 00000000: it is another file"),
        (["--inception", "WEIGHTS", "--inception-sha256", "12"], "'12' is no SHA-256"),
        (["--inception", "CODE"], "would run code from the file"),
        (["--inception", "SHORT"], "SHORT"),
        (["--inception", "WEIGHTS", "--temperature", "1,2,3"], "3 temperatures are given"),
    ],
)
def test_wrong_weights_end_before_the_first_image_with_one_message(
    home: Home,
    trained: str,
    weights: str,
    arguments: list[str],
    message: str,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    before = evaluation_tags(home)
    code, short = tmp_path / "code.pth", tmp_path / "SHORT"
    torch.save({"a": os.system}, code)
    short.write_bytes(Path(weights).read_bytes()[:1000])
    places = {"WEIGHTS": weights, "CODE": str(code), "SHORT": str(short)}
    ended = nvae(capsys, "evaluate", trained, *(places.get(each, each) for each in arguments))
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert evaluation_tags(home) == before
    assert not Path(home.store, "evaluations").exists()


@pytest.mark.campaign
def test_three_ray_workers_find_the_figures_of_one_to_the_last_bit(
    home: Home, trained: str, weights: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three pieces of the split. This process may have more threads than Ray's, which rounds otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    built = nvae(
        capsys, "shards", "build", "portraits:160", "store:many", "--image-size", "8",
        "--validation-count", "140",
    )  # fmt: skip
    assert built.code == 0, built.err
    asked = (trained, "--data", "store:many", "--samples", "3", "--no-record")
    asked += ("--inception", weights, "--fid-samples", "140", "--fid-reference", "validation")
    features = Path(home.store, "features")
    one = evaluated(capsys, *asked, "--workers", "1")
    # Nor do the features of the images come from the first.
    shutil.rmtree(features)
    three = evaluated(capsys, *asked, "--workers", "3")
    assert three["sample_quality"]["reference_images"] == 140
    assert three["validation/images"] == 140 > 2 * sharded_evaluation.PIECE_IMAGES
    assert three == one
    here = evaluated(capsys, *asked)
    figures = [name for name in here if name.startswith("validation/")]
    assert [three[name] for name in figures] == pytest.approx([here[name] for name in figures], rel=1e-6)
    assert not any(Path(home.store, "evaluations").glob("*"))
