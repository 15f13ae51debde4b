import hashlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline import config_file, storage
from pipeline.artifacts import Manifest, sealed, tensors_to_bytes
from pipeline.models.evaluation_record import evaluation_tag
from pipeline.models.export import export, load_directory
from pipeline.models.lineage import Lineage
from pipeline.models.names import RegistryError
from pipeline.models.registry import Registration, Registry, load
from pipeline.models.sampling import sample_images
from pipeline.models.versions import Version, best_of, judge
from pipeline.training.checkpoint_writer import CheckpointWriter
from tests.pipeline.models.tiny import tiny_config, tiny_model

BITS = "validation/bits_per_dim"


class Place:
    """A store and an MLflow of a test's own."""

    def __init__(self, store: str, uri: str, artifacts: Path | None = None) -> None:
        self.store, self.uri = store, uri
        self.client = MlflowClient(uri, uri)
        location = None if artifacts is None else str(artifacts)
        experiment = self.client.create_experiment("nvae", artifact_location=location)
        self.run_id = self.client.create_run(experiment).info.run_id

    def export(
        self,
        seed: int = 0,
        bits: float = 4.0,
        data_hash: str = "d1" * 32,
        diverged: bool = False,
        **more: Any,
    ) -> Manifest:
        lineage = Lineage("faces", self.run_id, 100, data_hash, "0.1.0+abc", diverged=diverged, **more)
        metrics = {BITS: bits, "validation/images": 7.0}
        return export(self.store, "nvae-faces", tiny_model(seed), tiny_config(), lineage, metrics)

    def register(self, *arguments: Any, **settings: Any) -> Registration:
        return Registry(self.uri).register(self.export(*arguments, **settings).url, "nvae-faces")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Place:
    """One registered version, for tests that only look."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copy(empty_database, folder / "mlflow.db")
    place = Place(str(folder / "store"), f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
    place.register()
    return place


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> Place:
    database = tmp_path / "mlflow.db"
    shutil.copy(empty_database, database)
    return Place(str(tmp_path / "store"), f"sqlite:///{database}", tmp_path / "artifacts")


# -- there and back ---------------------------------------------------------------------


def check_round_trip(place: Place) -> None:
    registered = place.register()
    expected = sample_images(tiny_model(0), 3, 0.7, seed=1)
    for ref in ["models:/nvae-faces@best", "models:/nvae-faces/1", registered.version.url]:
        loaded = load(ref, place.uri)
        assert loaded.config == tiny_config()
        assert not loaded.model.training
        assert np.array_equal(sample_images(loaded.model, 3, 0.7, seed=1), expected)


def test_a_registered_model_draws_the_same_pictures_after_loading(place):
    check_round_trip(place)


def test_the_same_works_with_weights_in_an_object_store(place, s3):
    place.store = storage.join(s3, "registry")
    check_round_trip(place)


def test_the_same_works_with_an_mlflow_server(mlflow_server, tmp_path):
    place = Place(str(tmp_path), mlflow_server)
    check_round_trip(place)
    assert place.register().version.version == "1"
    assert not place.register(1, 4.5).is_best
    assert place.register(2, 3.5).version.aliases == ("best",)
    with pytest.raises(RegistryError, match="Did you mean nvae-faces"):
        load("models:/nvae-face/1", mlflow_server)
    with pytest.raises(RegistryError, match="no version 77; the newest: 3, 2, 1"):
        load("models:/nvae-faces/77", mlflow_server)
    files = place.client.list_artifacts(place.run_id, "model")
    assert [file.path for file in files] == [
        "model/card.md",
        "model/config.json",
        "model/manifest.json",
        "model/samples.png",
    ]


def test_the_same_weights_measured_on_other_data_are_another_version(place):
    unmeasured = place.register(bits=math.nan, data_hash="not-measured")
    measured = place.register(bits=4.0)
    assert [each.version.version for each in (unmeasured, measured, place.register())] == ["1", "2", "2"]
    assert place.register(bits=math.nan, data_hash="not-measured").version.version == "1"
    assert measured.is_best
    assert measured.version.url != unmeasured.version.url
    assert measured.version.weights_sha256 == unmeasured.version.weights_sha256


def test_a_version_knows_what_it_was_trained_on_and_how_good_it_is(place):
    manifest = place.export(bits=3.25)
    version = Registry(place.uri).register(manifest.url, "nvae-faces").version
    assert version.name == "nvae-faces"
    assert version.version == "1"
    assert version.aliases == ("best",)
    assert version.metrics == {BITS: 3.25, "validation/images": 7.0}
    assert (version.run_id, version.run_name, version.images_seen) == (place.run_id, "faces", 100)
    assert (version.data_hash, version.data_root) == ("d1" * 32, "/no/data")
    assert version.weights_sha256 == manifest.files["model.safetensors"].sha256
    assert version == Registry(place.uri).find("models:/nvae-faces@best")


def test_a_version_knows_its_settings_its_files_and_where_it_was_trained(place):
    origin = {
        "data_licence": "CC BY 4.0",
        "trial": "groups/7",
        "world_size": 8,
        "ray_job": "02000000",
        "journal": "s3://b/runs/faces/journal",
    }
    manifest = place.export(**origin)
    version = Registry(place.uri).register(manifest.url, "nvae-faces").version
    assert version.settings == config_file.leaves(tiny_config())
    assert version.files == {name: entry.sha256 for name, entry in manifest.files.items()}
    assert {name: getattr(version, name) for name in origin} == origin
    description = place.client.get_model_version("nvae-faces", "1").description
    assert description == (Path(manifest.url) / "card.md").read_text()


def test_evaluations_are_parts_of_a_version_and_damaged_ones_are_not(place):
    version = place.register().version
    answer = {"data_hash": "d2" * 32, "draws": 5, "seed": 0, "unused_groups": []}
    scores = {"validation/images": 7.0, "validation/bits_per_dim": 3.5, "validation/psnr_db": math.inf}
    Registry(place.uri).note(version, dict([evaluation_tag({**answer, "scores": scores})]))
    for name, value in {"a": "{", "b": "[]", "c": '{"data_hash": "x"}', "d": '{"draws": "1e999"}'}.items():
        Registry(place.uri).note(version, {f"evaluation/{name}": value})
    (evaluation,) = Registry(place.uri).find(version.ref).evaluations
    assert (evaluation.data_hash, evaluation.draws, evaluation.images) == ("d2" * 32, 5, 7)
    assert evaluation.metrics["validation/bits_per_dim"] == 3.5
    assert math.isnan(evaluation.metrics["validation/psnr_db"])


def test_a_version_of_an_earlier_release_knows_less_and_is_still_one(place):
    version = place.register().version
    for tag in [
        "settings",
        "files",
        "run.journal",
        "run.trial",
        "run.world_size",
        "run.ray_job",
        "data.licence",
    ]:
        place.client.delete_model_version_tag("nvae-faces", "1", tag)
    old = Registry(place.uri).find(version.ref)
    assert (old.settings, old.files, old.world_size, old.trial) == ({}, {}, None, "")
    assert load(version.ref, place.uri).config == tiny_config()


def test_a_model_of_a_run_that_diverged_says_so(place):
    place.register(0, 4.0)
    place.register(1, 3.0, diverged=True)
    versions = Registry(place.uri).versions("nvae-faces")
    assert [(version.run_ended, version.aliases) for version in versions] == [
        ("diverged", ("best",)),
        ("finished", ()),
    ]


def test_the_small_files_are_artifacts_of_the_run_and_the_weights_are_not(place):
    place.register()
    files = {Path(file.path).name for file in place.client.list_artifacts(place.run_id, "model")}
    assert files == {"card.md", "config.json", "manifest.json", "samples.png"}
    assert place.client.get_model_version("nvae-faces", "1").source == f"runs:/{place.run_id}/model"


def test_the_same_weights_are_exported_and_registered_once(place):
    first, again = place.register(), place.register(bits=1.0)
    assert first.version == again.version
    assert again.is_best
    assert len(Registry(place.uri).versions("nvae-faces")) == 1
    assert len(storage.list_dir(storage.join(place.store, "models/nvae-faces"))) == 1


def test_an_export_that_was_cut_short_is_written_anew(place):
    url = place.export().url
    Path(url, "samples.png").write_bytes(b"")
    Path(url, "manifest.json").unlink()
    assert place.export().url == url
    assert load_directory(url).model is not None
    Path(url, "model.safetensors").unlink()
    place.export()
    assert load_directory(url).model is not None


def test_a_training_checkpoint_is_loaded_with_its_averaged_weights(tmp_path):
    writer = CheckpointWriter(str(tmp_path), attempt=1, keep=1)
    averaged, trained = tiny_model(1), tiny_model(2)
    files = {"model": trained.state_dict(), "ema": averaged.state_dict()}
    record = {"config": tiny_config().model_dump(mode="json")}
    writer.save(files, record, images_seen=64, metrics={})
    writer.wait()
    (name,) = [name for name in storage.list_dir(str(tmp_path / "checkpoints")) if name.startswith("0")]
    loaded = load(str(tmp_path / "checkpoints" / name), "sqlite:////never/asked.db")
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, averaged.state_dict()[key])


def test_listing_shows_every_version_with_its_aliases(place):
    for seed, bits in [(0, 4.0), (1, 3.0), (2, 5.0)]:
        place.register(seed, bits)
    place.client.set_registered_model_alias("nvae-faces", "shown", "3")
    registry = Registry(place.uri)
    assert registry.names() == ["nvae-faces"]
    listed = [
        (version.version, version.aliases, version.score) for version in registry.versions("nvae-faces")
    ]
    assert listed == [("3", ("shown",), 5.0), ("2", ("best",), 3.0), ("1", (), 4.0)]


# -- the gate ---------------------------------------------------------------------------


def version(number: str, bits: float, data_hash: str = "a") -> Version:
    return Version("m", number, (), "", "", "", "", "", "", 0, data_hash, "", "", "", "", {BITS: bits})


@pytest.mark.parametrize(
    ("bits", "holder", "passes"),
    [
        (3.0, None, True),
        (3.0, version("1", 3.1), True),
        (3.0, version("1", 3.0), False),
        (3.0, version("1", 2.9), False),
        (3.0, version("1", 3.1, "b"), False),
        (3.0, version("1", math.nan), True),
        (math.nan, None, False),
        (math.inf, None, False),
        (-math.inf, version("1", 3.0), False),
    ],
)
def test_best_moves_only_to_a_finite_lower_score_on_the_same_data(bits, holder, passes):
    assert judge(version("2", bits), holder)[0] is passes


def test_a_version_that_was_never_evaluated_is_not_the_best():
    unmeasured = Version("m", "2", (), "", "", "", "", "", "", 0, "a", "", "", "", "", {})
    assert judge(unmeasured, None) == (False, f"its {BITS} is missing or not finite")
    assert best_of([unmeasured]) is None


def test_best_follows_the_gate_and_says_why_it_did_not_move(place):
    assert place.register(0, 4.0).is_best
    worse = place.register(1, 4.5)
    assert not worse.is_best
    assert "4.5000 is not below the 4.0000 of version 1" in worse.verdict
    broken = place.register(2, math.nan)
    assert "not finite" in broken.verdict
    elsewhere = place.register(3, 1.0, data_hash="e2" * 32)
    assert "another data set" in elsewhere.verdict
    assert place.register(4, 3.5).is_best
    assert Registry(place.uri).find("models:/nvae-faces@best").version == "5"


def test_best_is_taken_from_a_version_that_something_else_registered(place):
    place.client.create_registered_model("nvae-faces")
    place.client.create_model_version("nvae-faces", f"runs:/{place.run_id}/x", place.run_id)
    place.client.set_registered_model_alias("nvae-faces", "best", "1")
    assert place.register().is_best
    assert Registry(place.uri).find("models:/nvae-faces@best").version == "2"


def test_of_racing_registrations_the_best_one_holds_the_alias(place):
    scores = [3.0 + 0.1 * ((7 * seed) % 8) for seed in range(8)]
    urls = [place.export(seed, bits).url for seed, bits in enumerate(scores)]
    registry = Registry(place.uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda url: registry.register(url, "nvae-faces"), urls))
    assert registry.find("models:/nvae-faces@best").score == min(scores)
    assert len(registry.versions("nvae-faces")) == 8


def test_an_export_with_a_missing_file_is_not_registered(place):
    url = place.export().url
    Path(url, "model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"model\.safetensors is gone"):
        Registry(place.uri).register(url, "nvae-faces")
    assert Registry(place.uri).names() == []


# -- what is refused --------------------------------------------------------------------


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    (folder / "manifest.json").write_bytes(sealed(record))


def pretend(folder: Path, name: str, data: bytes) -> None:
    """Puts another file in place, with a manifest that vouches for it."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(folder, lambda record: record["files"].update({name: entry}))


class Opened:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def other_weights(folder: Path) -> None:
    pretend(folder, "model.safetensors", tensors_to_bytes(tiny_model(9, latent_channels=3).state_dict()))


def other_config(**model: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        settings["model"] |= model
        pretend(folder, "config.json", json.dumps(settings).encode())

    return change


HEADER_BOMB = struct.pack("<Q", 2**63 - 1) + b"{" * 64
LONG_HEADER = struct.pack("<Q", 32 << 20) + b" " * (33 << 20)
OUTSIDE = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**12]}}).encode()

TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip_a_bit, "SHA-256 is"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 99), "has 99 bytes, the manifest says"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "is gone"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "there is no manifest.json"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 50), "not valid JSON"),
    "manifest too deep": (lambda f: (f / "manifest.json").write_text("[" * 10**5), "not valid JSON"),
    "manifest too large": (lambda f: (f / "manifest.json").write_bytes(b" " * (5 << 20)), "larger than"),
    "another format": (
        lambda f: rewrite_manifest(f, lambda r: r.update(format="zip")),
        "the format is 'zip'",
    ),
    "later release": (lambda f: rewrite_manifest(f, lambda r: r.update(format_version=2)), "version 2"),
    "file outside": (
        lambda f: rewrite_manifest(f, lambda r: r["files"].update({"../x": r["files"]["config.json"]})),
        "'../x'",
    ),
    "no weights listed": (
        lambda f: rewrite_manifest(f, lambda r: r["files"].pop("model.safetensors")),
        "has no file model.safetensors",
    ),
    "huge header": (lambda f: pretend(f, "model.safetensors", HEADER_BOMB), "not a safetensors file"),
    "long header": (lambda f: pretend(f, "model.safetensors", LONG_HEADER), "not a safetensors file"),
    "empty weights": (lambda f: pretend(f, "model.safetensors", b""), "not a safetensors file"),
    "data outside": (
        lambda f: pretend(f, "model.safetensors", struct.pack("<Q", len(OUTSIDE)) + OUTSIDE),
        "not a valid safetensors file",
    ),
    "other weights": (other_weights, "do not fit the configuration"),
    "other config": (other_config(latent_channels=3), "do not fit the configuration"),
    "endless config": (other_config(groups_per_scale=[1, 10**9]), "1000000001 latent groups"),
    "impossible config": (other_config(image_size=7), "image_size"),
    "code in config": (lambda f: pretend(f, "config.json", b"!!python/object:os.system x"), "not valid JSON"),
    "config no mapping": (lambda f: pretend(f, "config.json", b"[1]"), "holds no configuration"),
}


@pytest.fixture(scope="module")
def good_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = str(tmp_path_factory.mktemp("store"))
    lineage = Lineage("faces", "0" * 32, 100, "d1" * 32, "0.1.0")
    return Path(export(store, "nvae-faces", tiny_model(), tiny_config(), lineage, {BITS: 4.0}).url)


@pytest.mark.parametrize("kind", TAMPERING)
def test_an_export_that_was_tampered_with_is_refused(kind, good_export, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(good_export, folder)
    tamper, message = TAMPERING[kind]
    tamper(folder)
    with pytest.raises(RegistryError) as refused:
        load_directory(str(folder))
    assert message in str(refused.value)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_is_called_safetensors_is_refused_and_never_run(save, good_export, tmp_path):
    folder, mark = tmp_path / "copy", tmp_path / "was-run"
    shutil.copytree(good_export, folder)
    save({"weight": Opened(mark)}, folder / "pickle")
    pretend(folder, "model.safetensors", (folder / "pickle").read_bytes())
    with pytest.raises(RegistryError, match="safetensors"):
        load_directory(str(folder))
    assert not mark.exists()


def test_a_registered_version_refuses_other_files_even_with_a_manifest_that_fits_them(place):
    other, registered = place.export(1), place.register(0)
    shutil.copytree(other.url, registered.version.url, dirs_exist_ok=True)
    assert load_directory(registered.version.url).model is not None
    with pytest.raises(RegistryError, match="not the one that was registered"):
        load("models:/nvae-faces@best", place.uri)


def test_a_changed_tag_of_the_weights_is_noticed(place):
    place.register()
    place.client.set_model_version_tag("nvae-faces", "1", "weights.sha256", "0" * 64)
    with pytest.raises(RegistryError, match=r"weights\.sha256"):
        load("models:/nvae-faces/1", place.uri)


def test_a_version_that_points_to_a_forbidden_place_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place.register()
    for url in ["pipe:touch marker", "http://169.254.169.254/latest", "memory://x"]:
        place.client.set_model_version_tag("nvae-faces", "1", "weights.url", url)
        with pytest.raises(RegistryError):
            load("models:/nvae-faces/1", place.uri)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "ref",
    [
        "models:/../secrets/1",
        "models:/nvae-faces/../1",
        "models:/nvae-faces",
        "models:/nvae-faces/latest",
        "models:/nvae-faces/Production",
        "models:/nvae-faces@../x",
        "models:/nvae-faces@file:///etc",
        "models://host/nvae-faces/1",
        "models:/file:x/1",
        "models:/a' or name = 'b/1",
        "models:/.hidden/1",
        "models:/nvae-faces/1\n",
    ],
)
def test_a_reference_that_is_no_plain_name_is_refused(registered, ref):
    with pytest.raises(RegistryError):
        load(ref, registered.uri)


@pytest.mark.parametrize("name", ["../x", "/x", "s3://b", "", ".x", "a b", "x" * 101, "x\n"])
def test_a_model_cannot_get_a_name_that_is_no_plain_name(name, tmp_path):
    lineage = Lineage("faces", "0" * 32, 100, "d1" * 32, "0.1.0")
    with pytest.raises(RegistryError, match="cannot be the name"):
        export(str(tmp_path), name, tiny_model(), tiny_config(), lineage, {})
    assert not any(tmp_path.iterdir())


# -- what is said when something is not there -------------------------------------------


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("models:/nvae-face/1", "Models there: nvae-faces. Did you mean nvae-faces?"),
        ("models:/nvae-faces@bets", "its aliases: best. Did you mean best?"),
        ("models:/nvae-faces/77", "no version 77; the newest: 1."),
        ("/no/such/folder", "there is no manifest.json"),
    ],
)
def test_what_is_there_instead_is_said(registered, ref, message):
    with pytest.raises(RegistryError) as refused:
        load(ref, registered.uri)
    assert message in str(refused.value)


def test_a_version_that_something_else_registered_is_not_taken_for_ours(place):
    place.client.create_registered_model("other")
    place.client.create_model_version("other", f"runs:/{place.run_id}/x", place.run_id)
    assert Registry(place.uri).versions("other") == []
    with pytest.raises(RegistryError, match="was not registered by nvae"):
        load("models:/other/1", place.uri)


def test_a_server_that_is_down_is_named_without_its_password_and_soon(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError) as refused:
        load("models:/x/1", "http://user:secret@127.0.0.1:9")
    assert "127.0.0.1:9" in str(refused.value)
    assert "--tracking" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_looking_for_a_model_creates_no_database(tmp_path):
    with pytest.raises(RegistryError, match="no MLflow database"):
        load("models:/x/1", f"sqlite:///{tmp_path}/mlflow.db")
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_database_is_said_to_be_none(tmp_path):
    (tmp_path / "mlflow.db").write_text("hello")
    with pytest.raises(RegistryError, match="not a database"):
        load("models:/x/1", f"sqlite:///{tmp_path}/mlflow.db")
