"""`nvae registry` as a user types it, and pipeline.registry, on models that were trained."""

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline import registry
from pipeline.models.fields import FieldError
from pipeline.models.names import MissingDatabaseError, RegistryError
from pipeline.models.query import QueryError
from pipeline.models.registry import Registry
from tests.tiny_run import Home, nvae

Capture = pytest.CaptureFixture[str]
FIRST, CHILD = "models:/nvae-looked-up/1", "models:/nvae-looked-up-child/1"


@pytest.fixture(scope="module")
def trained(shared_home: Home) -> None:
    """A model, and one that began with its weights and has another spectral coefficient."""
    shared_home.train("looked-up")
    shared_home.train("looked-up-child", "objective.spectral_coefficient=0.5", parent=FIRST)


@pytest.fixture
def place(home: Home, trained: None) -> Home:
    return home


def answer(capsys: Capture, *arguments: str) -> Any:
    shown = nvae(capsys, "registry", *arguments, "--json")
    assert (shown.code, shown.err) == (0, "")
    return json.loads(shown.out)


def test_models_are_found_by_their_settings_data_and_metrics(place, capsys):
    of_ours = "model ~ looked-up and data=tiny"
    assert {each["model"] for each in answer(capsys, "find", of_ours)} == {FIRST, CHILD}
    high = f"{of_ours} and objective.spectral_coefficient > 0.1"
    assert [each["model"] for each in answer(capsys, "find", high)] == [CHILD]
    assert answer(capsys, "find", f"{of_ours} and validation.bits_per_dim < 0") == []
    scores = [each["bits_per_dim"] for each in answer(capsys, "find", of_ours)]
    assert scores == sorted(scores)
    assert len(answer(capsys, "find", of_ours, "--limit", "1")) == 1
    [newest, *_] = answer(capsys, "find", of_ours, "--sort", "created", "--descending")
    assert newest["model"] == CHILD
    table = nvae(capsys, "registry", "find", high).out.splitlines()
    assert table[0].split("\t")[-1] == "OBJECTIVE.SPECTRAL_COEFFICIENT"
    assert table[1].split("\t")[-1] == "0.5"


def test_a_notebook_finds_the_same_and_loads_it(place):
    [best, other] = registry.find("model ~ looked-up")
    assert {best.ref, other.ref} == {FIRST, CHILD}
    assert best.score <= other.score
    assert registry.version("models:/nvae-looked-up@best").ref == FIRST
    loaded = registry.load(CHILD)
    assert loaded.config.objective.spectral_coefficient == 0.5
    assert not loaded.model.training
    assert registry.compare(FIRST, CHILD).settings[0].name == "objective.spectral_coefficient"
    with pytest.raises(QueryError):
        registry.find("model ~")
    with pytest.raises(FieldError):
        registry.find("", sort="nothing")
    with pytest.raises(RegistryError, match="Did you mean nvae-looked-up"):
        registry.version("models:/nvae-looked-upp/1")
    with pytest.raises(MissingDatabaseError):
        registry.find("", tracking="sqlite:////no/where.db")


def test_a_version_knows_its_whole_origin(place, capsys):
    shown = answer(capsys, "show", CHILD)
    assert shown["parent"] == FIRST
    assert (shown["world_size"], shown["ray_job"]) == (1, "local")
    assert shown["journal"] == f"{place.run_url('looked-up-child')}/journal"
    assert shown["settings"]["objective.spectral_coefficient"] == 0.5
    assert shown["files"].keys() == {"model.safetensors", "config.json", "samples.png", "card.md"}
    assert shown["validation/images"] == 6
    text = nvae(capsys, "registry", "show", CHILD).out
    assert "objective.spectral_coefficient" not in text
    assert "objective.spectral_coefficient" in nvae(capsys, "registry", "show", CHILD, "--settings").out
    card = nvae(capsys, "registry", "show", CHILD, "--card").out
    assert card.startswith("# nvae-looked-up-child\n")
    assert f"It began with the weights of `{FIRST}`" in card


def test_an_evaluation_is_found_by_what_it_measured(place, capsys):
    nvae(capsys, "evaluate", FIRST, "--samples", "3")
    query = (
        "model=nvae-looked-up and evaluation.draws = 3 and evaluation.importance_weighted_bits_per_dim > 0"
    )
    assert [each["model"] for each in answer(capsys, "find", query)] == [FIRST]
    [evaluation] = answer(capsys, "show", FIRST)["evaluations"]
    assert (evaluation["draws"], evaluation["images"]) == (3, 6)


def test_lineage_is_drawn_from_the_data_to_the_children(place, capsys):
    facts = answer(capsys, "lineage", FIRST)
    assert [child["model"] for child in facts["children"]] == [CHILD]
    assert [each["model"] for each in answer(capsys, "lineage", CHILD)["ancestors"]] == [FIRST]
    lines = nvae(capsys, "registry", "lineage", FIRST).out.splitlines()
    assert lines[0].startswith(f"{place.store}/data/tiny (content ")
    assert re.match(
        r"└─ models:/nvae-looked-up/1 \[best\]: run looked-up, 48 images, .*  <- this one", lines[1]
    )
    assert lines[2].startswith(f"   └─ {CHILD} [best]: run looked-up-child")


def test_two_versions_are_compared_as_a_table_and_as_a_page(place, capsys, tmp_path):
    rows = answer(capsys, "compare", FIRST, CHILD)["rows"]
    assert [row["name"] for row in rows if row["part"] == "settings"] == ["objective.spectral_coefficient"]
    assert {row["name"] for row in rows if row["part"] == "kl_per_group"} == {
        "validation/kl_nats/group_00",
        "validation/kl_nats/group_01",
    }
    page = tmp_path / "both.html"
    assert nvae(capsys, "registry", "compare", FIRST, CHILD, "--output", str(page)).code == 0
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 2
    assert "<svg" in text
    assert "objective.spectral_coefficient" in text


def test_a_download_is_whole_private_and_a_model_of_its_own(place, capsys, tmp_path):
    folder = tmp_path / "faces"
    assert nvae(capsys, "registry", "download", "models:/nvae-looked-up@best", str(folder)).code == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {"model.safetensors", "config.json", "samples.png", "card.md", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    expected = registry.load(FIRST).model.state_dict()
    found = registry.load(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = nvae(capsys, "registry", "download", FIRST, str(folder))
    assert (again.code, "new or empty" in again.err) == (2, True)


def test_a_download_of_changed_files_is_refused_and_leaves_nothing(place, capsys, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(Registry(place.tracking).find(FIRST).url, copy)
    name = "nvae-changed"
    Registry(place.tracking).register(str(copy), name)
    with (copy / "samples.png").open("r+b") as file:
        file.write(b"changed")
    refused = nvae(capsys, "registry", "download", f"models:/{name}/1", str(tmp_path / "target"))
    assert refused.code == 2
    assert "samples.png" in refused.err
    assert not (tmp_path / "target").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find", "validation.bits_per_dim <"], "expected a value"),
        (["find", "x=1"], "nothing that models are looked up by"),
        (["find", "", "--sort", "bits"], "nothing that models are looked up by"),
        (["show", "models:/../../etc/passwd"], "names no model"),
        (["show", "models:/nvae-looked-up@champ"], "has no alias 'champ'"),
        (["lineage", "models:/nvae-looked-up/99"], "has no version 99"),
        (["compare", FIRST, "nothing"], "names no model"),
        (["list", "../x"], "cannot be the name of a model"),
        (["list", "nvae-looked-upp"], "Did you mean nvae-looked-up"),
        (["download", "models:/nvae-looked-up/99", "somewhere"], "has no version 99"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_to_do(place, capsys, arguments, message):
    ended = nvae(capsys, "registry", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert not Path("somewhere").exists()


def test_tags_that_anybody_may_edit_never_reach_a_terminal_as_commands(place, capsys):
    client = MlflowClient(place.tracking)
    before = client.get_model_version("nvae-looked-up", "1").tags["data.root"]
    client.set_model_version_tag("nvae-looked-up", "1", "data.root", "\x1b]0;owned\x07\x1b[2J\nnext\tone")
    try:
        for arguments in (
            ["list", "--refresh"],
            ["show", FIRST],
            ["lineage", FIRST],
            ["compare", FIRST, CHILD],
        ):
            shown = nvae(capsys, "registry", *arguments)
            assert shown.code == 0
            assert "\x1b" not in shown.out + shown.err
            assert "owned" in shown.out
        rows = nvae(capsys, "registry", "list").out.splitlines()
        assert len({row.count("\t") for row in rows}) == 1
    finally:
        client.set_model_version_tag("nvae-looked-up", "1", "data.root", before)


def test_a_place_whose_name_no_disk_can_hold_is_refused(place, capsys):
    for arguments in (["registry", "download", FIRST], ["export", FIRST]):
        shown = nvae(capsys, *arguments, "x" * 300)
        assert (shown.code, "File name too long" in shown.err) == (2, True)


def test_what_was_never_measured_is_no_number(place, capsys):
    client = MlflowClient(place.tracking)
    client.create_registered_model("nvae-unmeasured")
    measured = client.get_model_version("nvae-looked-up", "1")
    tags = {key: value for key, value in measured.tags.items() if not key.startswith("validation/")}
    assert len(tags) < len(measured.tags)
    client.create_model_version("nvae-unmeasured", measured.source, measured.run_id, tags)
    try:
        [_, row] = nvae(capsys, "registry", "list", "nvae-unmeasured").out.splitlines()
        assert row.split("\t")[:3] == ["models:/nvae-unmeasured/1", "-", "-"]
        assert [each["bits_per_dim"] for each in answer(capsys, "list", "nvae-unmeasured")] == [None]
    finally:
        client.delete_registered_model("nvae-unmeasured")
