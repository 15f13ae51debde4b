"""`nvae import` and `nvae export` as a user types them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import importing
from pipeline.models.export import load_directory
from pipeline.models.registry import Registry, load
from tests.pipeline.test_importing import checkpoint, imported
from tests.tiny_run import Home, nvae

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is empty."""
    monkeypatch.setenv("NVAE_STORE", home.store)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answered(capsys: Capture, *arguments: str) -> dict[str, Any]:
    ended = nvae(capsys, *arguments, "--json")
    assert ended.code == 0, ended.err
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


def refused(capsys: Capture, *arguments: str) -> str:
    """The one message that a command ends with, having shown nothing."""
    ended = nvae(capsys, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    return ended.err


def test_a_checkpoint_is_imported_measured_and_exported_again(
    home: Home, folder: Path, capsys: Capture
) -> None:
    source = checkpoint(folder)
    asked = ("import", source, "sampling.count=2", "--register", "exchanged", "--data", "store:tiny")
    found = answered(capsys, *asked, "--samples", "2")
    assert found["model"] == "models:/exchanged/1"
    assert found["validation/images"] == 6
    assert "is the best" in found["verdict"]
    # Without a registry, and from the same file.
    written = answered(capsys, "import", source, "sampling.count=2", "--output", "model")
    assert written["sha256"] == found["sha256"]
    assert load_directory("model").model.config == load("models:/exchanged@best", home.tracking).model.config
    copied = answered(capsys, "export", "models:/exchanged@best", "copy")
    version = Registry(home.tracking).find("models:/exchanged@best")
    assert copied["manifest_sha256"] == version.manifest_sha256
    assert load_directory("copy").config == load("models:/exchanged@best", home.tracking).config
    files = {file.name: file.read_bytes() for file in Path("copy").iterdir()}
    assert files == {file.name: file.read_bytes() for file in Path(version.url).iterdir()}
    # A folder is a model like any other.
    again = answered(capsys, "export", "copy", "copy-of-copy")
    assert again["manifest_sha256"] == version.manifest_sha256


def test_what_was_asked_for_wrongly_is_said_before_anything_is_opened(folder: Path, capsys: Capture) -> None:
    assert "--register NAME, or --output FOLDER" in refused(capsys, "import", "nothing.pt")
    assert "name a data set" in refused(capsys, "import", "nothing.pt", "--output", "x", "--samples", "2")
    assert "cannot be the name" in refused(capsys, "import", "nothing.pt", "--register", "../x")
    taken = folder / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert "taken: is there already" in refused(capsys, "import", "nothing.pt", "--output", "taken")
    assert "index.json is missing" in refused(
        capsys, "import", "nothing.pt", "--output", "x", "--data", "data"
    )
    assert "neither a file nor" in refused(capsys, "import", "nothing.pt", "--output", "x", "--preset", "y")
    assert "nothing.pt: cannot be read: No such file" in refused(
        capsys, "import", "nothing.pt", "--output", "x"
    )
    assert not Path("x").exists()


def test_a_preset_that_is_another_model_is_refused_and_nothing_is_registered(
    home: Home, folder: Path, capsys: Capture
) -> None:
    said = refused(capsys, "import", checkpoint(folder), "--preset", "cifar10", "--register", "never")
    assert "model.latent_channels: 20 in cifar10, 2 in the checkpoint" in said
    assert not Path(home.store, "models", "never").exists()


def test_a_training_checkpoint_is_exported_with_its_averaged_weights(home: Home, capsys: Capture) -> None:
    home.train("exported")
    (newest, *_) = sorted(Path(home.run_url("exported"), "checkpoints").glob("0*"))
    answered(capsys, "export", str(newest), "copy")
    expected = load_directory(str(newest)).model.state_dict()
    for name, value in load_directory("copy").model.state_dict().items():
        assert value.equal(expected[name])


def test_an_export_is_whole_or_not_there(folder: Path, capsys: Capture) -> None:
    importing.write(imported(checkpoint(folder)), "model")
    Path("mine").mkdir()
    Path("mine", "file").write_text("mine")
    assert "mine: is there already" in refused(capsys, "export", "model", "mine")
    assert "mine: is there already" in refused(capsys, "export", "model", "mine", "--pyfunc")
    assert "name a folder on this machine" in refused(capsys, "export", "model", "s3://bucket/x", "--pyfunc")
    shutil.copytree("model", "damaged")
    samples = Path("damaged", "samples.png")
    samples.write_bytes(samples.read_bytes()[:-1] + b"?")
    assert "damaged or replaced" in refused(capsys, "export", "damaged", "copy")
    assert not Path("copy").exists()
    assert [path.name for path in folder.glob(".*copy*")] == []


def test_an_mlflow_model_is_made_of_code_and_safetensors(folder: Path, capsys: Capture) -> None:
    importing.write(imported(checkpoint(folder)), "model")
    assert answered(capsys, "export", "model", "served", "--pyfunc")["format"] == "pyfunc"
    assert Path("served", "MLmodel").is_file()
    assert [path for path in Path("served").rglob("*") if path.suffix in {".pkl", ".pt"}] == []
    assert load_directory(str(next(Path("served").rglob("manifest.json")).parent)).model is not None
