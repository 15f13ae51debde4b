"""What an installation holds, and what it can do where there is nothing else."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from nvae.model import NVAE
from pipeline.config_file import from_mapping, load
from pipeline.models.export import export
from pipeline.models.lineage import Lineage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def test_a_wheel_holds_the_packages_and_the_presets_and_nothing_else(wheel):
    installed = ["nvae", "pipeline", "cluster", "configs"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *installed],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_models_are_found_and_sampled_without_what_only_training_needs():
    code = (
        "import sys; sys.modules.update(ray=None, webdataset=None, psutil=None)\n"
        "import cluster.cli, pipeline.config_file, pipeline.models.registry, pipeline.models.sampling"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def exported_model(store: Path) -> str:
    """A model that nothing was trained for, as a training would export it."""
    overrides = ["model.image_size=16", "model.encoder_channels=4", "model.decoder_channels=4"]
    config = load("quickstart", overrides)
    lineage = Lineage("packaging", "", images_seen=0, data_hash="0" * 64, code_version="0")
    return export(str(store), "tiny", NVAE(config.model), config, lineage, {}).url


@pytest.mark.campaign
def test_the_command_works_from_a_wheel_in_an_empty_environment(wheel, tmp_path):
    """Installed without extras, run from an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    commands = tmp_path / "venv" / "bin"
    install = [
        commands / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
    ]
    subprocess.run([*install, wheel], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()

    def nvae(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([commands / "nvae", *arguments], cwd=empty, capture_output=True, text=True)

    assert "Usage: nvae" in nvae("--help").stdout
    shown = nvae("config", "show", "quickstart", "--json").stdout
    assert from_mapping(json.loads(shown)) == load("quickstart")
    nothing_yet = nvae("registry", "list")
    assert nothing_yet.returncode == 0 and nothing_yet.stdout.startswith("MODEL\t")
    model = exported_model(tmp_path / "store")
    assert nvae("sample", model, "there.png", "--count", "2").returncode == 0
    here = Path(sys.executable).with_name("nvae")
    subprocess.run([here, "sample", model, tmp_path / "here.png", "--count", "2"], cwd=ROOT, check=True)
    assert (empty / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    without_ray = subprocess.run([commands / "python", "-c", "import ray"], cwd=empty, capture_output=True)
    assert without_ray.returncode, "ray came along, although no extra was asked for"
