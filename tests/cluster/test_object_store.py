"""The whole road over a real S3 server: a folder of images to a picture by a registered model."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.portraits import portrait
from pipeline.training.checkpoint import newest
from pipeline.training.journal import StoredJournal
from tests.tiny_run import NVAE, nvae, points

Capture = pytest.CaptureFixture[str]

REPOSITORY = Path(__file__).parents[2]
IMAGES = 24
# The quickstart's road with a model of a few channels.
SMALL = [
    "model.image_size=8",
    "model.groups_per_scale=[1,1]",
    "model.latent_channels=2",
    "model.encoder_channels=4",
    "model.decoder_channels=4",
    "model.preprocess_blocks=1",
    "model.mixture_components=2",
    "optimizer.warmup_images=0",
    "train.batch_size=4",
    "cadence.log_images=8",
    "cadence.evaluate_images=16",
    "cadence.checkpoint_images=16",
    "sampling.count=2",
]


def faces(folder: Path) -> Path:
    """A few images of 256x256: real faces where NVAE_FACES (else shared/data/faces256) has some."""
    folder.mkdir()
    given = Path(os.environ.get("NVAE_FACES") or REPOSITORY.parent / "shared/data/faces256")
    found = sorted(file for file in given.rglob("*") if file.suffix in (".png", ".jpg"))[:IMAGES]
    for file in found:
        shutil.copy(file, folder)
    for seed in range(IMAGES if not found else 0):
        Image.fromarray(portrait(seed, 256)).save(folder / f"{seed:03d}.png")
    return folder


@pytest.fixture(scope="module")
def data_set(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of shards of faces in the bucket, built by the command."""
    source, target = faces(tmp_path_factory.mktemp("faces") / "images"), f"{s3}/road/faces256"
    command = [NVAE, "shards", "build", str(source), target, "--image-size", "256"]
    subprocess.run([*command, "--validation-fraction", "0.25"], check=True, capture_output=True)
    return target


def train(data_set: str, store: str, *more: str) -> list[str]:
    """The command, to be repeated as it is."""
    return ["train", "quickstart", f"data.root={data_set}", *SMALL, "--store", store, *more]


def test_the_road_from_images_to_a_registered_model_over_an_object_store(
    s3: str, data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"{s3}/road/store"
    local = train(data_set, store, "--name", "faces", "--local")

    trained = nvae(capsys, *local, "train.total_images=16")
    assert trained.code == 0, trained.err
    run_url = f"{store}/runs/faces"
    first = newest(run_url)
    assert first is not None
    assert first.url.startswith("s3://")
    assert storage.exists(f"{first.url}/manifest.json")

    continued = nvae(capsys, *local, "train.total_images=32")
    assert continued.code == 0, continued.err
    assert f"Continuing at 16 images from {first.url}" in continued.err
    assert sorted(at for name, at in points(run_url) if name == "train/loss") == [8, 16, 24, 32]

    # MLflow has no server here: it is a database in the working directory.
    assert (tmp_path / "nvae-store" / "mlflow.db").exists()
    [newer, older] = json.loads(nvae(capsys, "registry", "list", "--json", "--store", store).out)
    assert (newer["model"], older["model"]) == ("models:/nvae-faces/2", "models:/nvae-faces/1")
    for name in ("one.png", "two.png"):
        drawn = nvae(capsys, "sample", "models:/nvae-faces@best", name, "--count", "4", "--store", store)
        assert drawn.code == 0, drawn.err
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    [listed] = json.loads(nvae(capsys, "runs", "list", "--json", "--store", store).out)
    assert (listed["state"], listed["images_seen"]) == ("finished", 32)

    # Nothing of the run is on this machine but MLflow's.
    assert {path.name for path in Path("nvae-store").iterdir()} == {
        "mlflow.db",
        "mlflow.db.lock",
        "mlartifacts",
    }


def test_shards_in_a_bucket_are_verified_like_any(data_set: str, capsys: Capture) -> None:
    assert nvae(capsys, "shards", "verify", data_set).code == 0
    shown = json.loads(nvae(capsys, "shards", "show", data_set, "--json").out)
    assert sum(split["samples"] for split in shown["splits"].values()) == IMAGES


@pytest.mark.campaign
def test_two_ray_workers_train_from_a_bucket_into_a_bucket(
    s3: str, data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = f"{s3}/road/ray-store"
    command = [NVAE, *train(data_set, store, "--name", "faces", "--workers", "2", "train.total_images=32")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Finished faces at" in ended.stderr
    last = newest(f"{store}/runs/faces")
    assert last is not None
    assert last.images_seen == 32
    assert StoredJournal(f"{store}/runs/faces").segments() != []
    # Ray's own files went through our view of the bucket, and away again.
    assert storage.list_dir(f"{store}/runs/faces/ray") == []
