"""The `nvae` command: what a user sees, of answers and of mistakes."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from cluster import training
from cluster.cli import cli
from pipeline import config_file, lease, run_folder
from pipeline.models.registry import Registry
from pipeline.training.interventions import Kind
from pipeline.training.journal import Journal
from tests.tiny_run import NVAE, Home, Outcome, nvae, points

RUN = "by-hand"
MODEL = f"models:/nvae-{RUN}@best"

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(shared_home: Home) -> str:
    """The reference of a model that was trained."""
    shared_home.train(RUN)
    return MODEL


def files(home: Home) -> set[Path]:
    return set(home.folder.rglob("*"))


def assert_refused(outcome: Outcome, *expected: str) -> None:
    """Exit code 2 and one message that says all of this, without a traceback."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.count("Error: ") == 1
    for text in expected:
        assert text in outcome.err


# -- help -------------------------------------------------------------------------------


def commands(command: click.Command = cli, path: str = "nvae") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{path} {name}")


@pytest.mark.parametrize("path", dict(commands()))
def test_every_command_and_every_option_is_explained(path: str) -> None:
    command = dict(commands())[path]
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_version_is_that_of_the_package(capsys: Capture) -> None:
    shown = nvae(capsys, "--version")
    assert (shown.code, shown.out) == (0, f"nvae, version {metadata.version('nvae-cluster')}\n")


def test_help_ends_well(capsys: Capture) -> None:
    shown = nvae(capsys, "train", "--help")
    assert shown.code == 0
    assert "--dry-run" in shown.out


# -- mistakes ---------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such preset": (
        ["train", "quickstrat"],
        ["neither a file nor one of the presets", "did you mean quickstart?"],
    ),
    "no override": (["train", "tiny.yaml", "batch"], ["'batch' sets nothing", "KEY=VALUE"]),
    "several at once": (
        [
            "train",
            "tiny.yaml",
            "train.batchsize=3",
            "model.image_size=7",
            "objective.spectral_coefficient=-1",
        ],
        [
            "3 problems",
            "did you mean train.batch_size?",
            "model.image_size",
            "objective.spectral_coefficient=-1: must be",
        ],
    ),
    "no data set": (["train", "tiny.yaml", "data.root=store:none", "--local"], ["data/none"]),
    "no such place": (["train", "tiny.yaml", "--store", "ftp://host/x"], ["ftp:", "s3://"]),
    "no such MLflow": (["train", "tiny.yaml", "--local", "--tracking", "mlflow"], ["'mlflow' is no address"]),
    "workers in one process": (["train", "tiny.yaml", "--local", "--workers", "2"], ["--local"]),
    "workers that cannot share": (
        ["train", "tiny.yaml", "--workers", "3", "--dry-run"],
        ["cannot be shared equally by 3 workers"],
    ),
    "no name": (["train", "tiny.yaml", "--name", "../evil", "--dry-run"], ["'../evil' is no name for a run"]),
    "no such option": (["train", "tiny.yaml", "--epochs", "3"], ["--epochs"]),
    "no such run to show": (["runs", "show", "by-hnad"], ["no run 'by-hnad'", RUN]),
    "no such run to stop": (["runs", "stop", "nobody"], ["no run 'nobody'"]),
    "no such run to delete": (["runs", "delete", "nobody"], ["no run 'nobody'"]),
    "no such model": (["evaluate", "models:/nvae-by-hnad@best"], [f"Did you mean nvae-{RUN}?"]),
    "no such alias": (["sample", f"models:/nvae-{RUN}@worst", "x.png"], ["its aliases: best"]),
    "no such checkpoint": (["sample", "runs/none", "x.png"], ["runs/none cannot be loaded"]),
    "nowhere to write": (["sample", MODEL, "none/x.png"], ["none/x.png cannot be written", "no folder"]),
    "a folder to write": (["sample", MODEL, "."], ["directory"]),
    "no picture to write": (["sample", MODEL, "x.jpg"], ["x.jpg cannot be written", "end in .png"]),
    "no images": (["sample", MODEL, "x.png", "--count", "0"], ["--count"]),
    "no such shards": (["shards", "verify", "store:none"], ["data/none"]),
    "an empty folder": (["shards", "build", ".", "store:empty"], ["nothing in it"]),
    "no such setting": (["config", "explain", "train.batchsize"], ["train.batch_size"]),
    "no such MLflow database": (
        ["registry", "list", "--tracking", "sqlite:///none.db"],
        ["no MLflow database"],
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_message_and_leaves_nothing(
    home: Home, trained: str, capsys: Capture, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = MISTAKES[what]
    monkeypatch.setenv("NVAE_STORE", home.store)
    if arguments[0] == "shards":
        monkeypatch.chdir(tmp_path)
    before = files(home)
    assert_refused(nvae(capsys, *arguments), *expected)
    assert files(home) == before


def test_wrong_credentials_are_the_users_to_mend(
    home: Home, s3: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = nvae(capsys, "train", "tiny.yaml", "--local", "--store", f"{s3}/x")
    assert_refused(refused, "AWS_SECRET_ACCESS_KEY")


def test_a_bucket_that_does_not_exist_is_named(home: Home, s3: str, capsys: Capture) -> None:
    refused = nvae(capsys, "shards", "build", "portraits:4", "s3://nobodys-bucket/x", "--image-size", "16")
    assert_refused(refused, "s3://nobodys-bucket")


def test_verbose_shows_where_an_error_comes_from(home: Home) -> None:
    run = subprocess.run([NVAE, "-v", "runs", "show", "none"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "Traceback" in run.stderr
    assert "known_record" in run.stderr
    assert run.stderr.rstrip().splitlines()[-1].startswith("Error: There is no run 'none'")


def test_a_reader_that_has_seen_enough_is_no_error(home: Home) -> None:
    command = f"{NVAE} config schema | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("{\n", "")


# -- training ---------------------------------------------------------------------------


def test_a_dry_run_tells_everything_and_writes_nothing(
    home: Home, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = nvae(capsys, "train", "ffhq256", "--dry-run", "--workers", "2", "train.micro_batch_size=1")
    assert shown.code == 0
    assert "parameters   330," in shown.out
    assert "latents      4 groups of 20x8x8, 4 groups of 20x16x16, 4 groups of 20x32x32" in shown.out
    assert "in micro-batches of 1" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_whole_configuration(home: Home, capsys: Capture) -> None:
    shown = nvae(capsys, "train", "tiny.yaml", "train.batch_size=8", "--dry-run", "--local")
    printed = home.folder / "printed.yaml"
    printed.write_text(shown.out.partition("\n\n")[0])
    assert config_file.load(str(printed)) == home.config("train.batch_size=8")


def test_training_ends_with_where_everything_is_and_what_to_try(home: Home, capsys: Capture) -> None:
    shown = nvae(capsys, "train", "tiny.yaml", "--local", "--name", "whereabouts")
    assert shown.code == 0
    url = home.run_url("whereabouts")
    for place in (f"{url}/checkpoints", f"{home.store}/models/nvae-whereabouts", home.tracking):
        assert place in shown.err
    command = next(line for line in shown.err.splitlines() if line.startswith("  nvae sample"))
    assert nvae(capsys, *command.split()[1:]).code == 0
    assert Path("samples.png").exists()


def test_a_run_whose_best_checkpoint_came_before_its_end_tells_both(home: Home) -> None:
    plan = training.plan(home.yaml, [], "early", None, True, None, None, home.store, None)
    end = home.train("early")
    spec = home.begin("early")
    told = training.farewell(plan, spec, end)
    assert "Finished early at 48 images, " in told
    end["result"] = {**end["result"], "images_seen": 16}
    told = training.farewell(plan, spec, end)
    assert "Finished early at 48 images; the best checkpoint is of 16, " in told


def test_divergence_for_good_is_exit_code_3(home: Home, capsys: Capture) -> None:
    wild = ["optimizer.learning_rate=1e30", "optimizer.warmup_images=0"]
    hasty = ["stability.skips_in_a_row=2", "stability.max_rollbacks=1"]
    shown = nvae(capsys, "train", "tiny.yaml", *wild, *hasty, "--local", "--name", "wild")
    assert shown.code == 3
    assert "back to the initial weights" in shown.err
    assert "Diverged: 2 updates in a row were skipped" in shown.err
    assert "Traceback" not in shown.err


def test_a_run_that_is_running_is_not_started_again(home: Home, capsys: Capture) -> None:
    with lease.held(home.run_url("busy")):
        refused = nvae(capsys, "train", "tiny.yaml", "--local", "--name", "busy")
    assert_refused(refused, "already being run by")


# -- looking up -------------------------------------------------------------------------


def test_every_listing_has_a_form_for_programs(home: Home, trained: str, capsys: Capture) -> None:
    def listed(*arguments: str) -> Any:
        shown = nvae(capsys, *arguments, "--json")
        assert shown.code == 0
        return json.loads(shown.out)

    assert RUN in [run["name"] for run in listed("runs", "list")]
    shown = listed("runs", "show", RUN)
    assert shown["train.total_images"] == 48
    assert [launch["workers"] for launch in shown["launches"]] == [1]
    assert shown["checkpoint"] in [saved["url"] for saved in shown["checkpoints"]]
    assert shown["checkpoints"][0]["images_seen"] == 48
    assert shown["interventions"] == {"skip": 0, "clip": 0, "roll_back": 0, "soften": 0, "give_up": 0}
    logged = shown["logged"]
    assert logged["images_seen"] == 48
    steering = {"speed/images_per_second", "speed/communication_fraction", "train/gradient_norm"}
    assert steering | {"data/wait_fraction", "train/active_channels/group_01"} <= logged["numbers"].keys()
    assert not [key for key in shown if " " in key]
    assert f"models:/nvae-{RUN}/1" in [version["model"] for version in listed("registry", "list")]
    assert listed("registry", "list", f"nvae-{RUN}")[0]["aliases"] == ["best"]
    assert listed("registry", "list", f"nvae-{RUN}")[0]["run_ended"] == "finished"
    version = listed("registry", "show", trained)
    assert (version["run_name"], version["aliases"], version["parent"]) == (RUN, ["best"], None)
    assert version["run_ended"] == "finished"
    assert listed("shards", "show", "store:tiny")["splits"]["train"]["samples"] == 18
    assert listed("shards", "verify", "store:tiny") == []
    assert "ffhq256" in listed("config", "show")
    assert listed("config", "show", "ffhq256")["model"]["groups_per_scale"] == [4, 4, 4, 8, 16]
    assert {"setting": "model.image_size", "first": 64, "second": 256} in listed(
        "config", "diff", "celeba64", "ffhq256"
    )
    assert listed("evaluate", trained)["validation/images"] == 6


def test_a_listing_for_people_names_the_same(home: Home, trained: str, capsys: Capture) -> None:
    line = next(line for line in nvae(capsys, "runs", "list").out.splitlines() if line.startswith(RUN))
    assert line.split("\t")[1:4] == ["finished", "48", "48"]
    assert f"nvae-{RUN}" in nvae(capsys, "registry", "list").out
    assert "splits.train.samples\t18\n" in nvae(capsys, "shards", "show", "store:tiny").out
    shown = nvae(capsys, "runs", "show", RUN).out
    assert "model.groups_per_scale" not in shown
    assert "\nmodel.groups_per_scale\t1, 1\n" in nvae(capsys, "runs", "show", RUN, "--settings").out
    assert re.search(r"\ncheckpoint\tat 48 images, \d+s old, earlier ones at 32, ", shown)
    assert re.search(r"\nstart 1\t.* on .*, 1 worker\n", shown)
    assert "aliases\tbest\n" in nvae(capsys, "registry", "show", trained).out


def test_a_damaged_run_is_listed_beside_the_others(home: Home, trained: str, capsys: Capture) -> None:
    record = Path(home.run_url("broken"), "run.json")
    record.parent.mkdir()
    record.write_text("{")
    listed = nvae(capsys, "runs", "list")
    assert listed.code == 0
    assert "\nbroken\tdamaged\t-\t" in listed.out
    assert f"\n{RUN}\tfinished\t" in listed.out
    rows = json.loads(nvae(capsys, "runs", "list", "--json").out)
    assert len({frozenset(row) for row in rows}) == 1
    assert nvae(capsys, "track", "status").code == 0
    assert_refused(nvae(capsys, "runs", "show", "broken"), "run.json is damaged")


def test_the_module_is_the_command(home: Home) -> None:
    command = [sys.executable, "-m", "cluster.cli", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("nvae, version")


def test_a_run_says_in_the_morning_what_the_night_was_like(home: Home, capsys: Capture) -> None:
    """Nothing of it asks MLflow, which has never been there."""
    spec = home.begin("night", "train.total_images=4800", tracking="http://127.0.0.1:9")
    journal = Journal(spec.url, attempt=1)
    numbers = {"train/bits_per_dim": 2.5, "speed/images_per_second": 10.0, "memory/reserved_gib/max": 3.0}
    numbers |= {"train/active_channels": 3, "train/active_channels/group_01": 2}
    journal.note("metrics", at=1200, values=numbers | {"train/active_channels/group_00": 1})
    journal.note("metrics", at=1240, values={f"stability/{kind}": float(kind == "skip") for kind in Kind})
    journal.note("tag", key="stability.last", value="At 1,240 images: update skipped: because")
    journal.close()
    run_folder.update_record(spec.url, state="running")
    with lease.held(spec.url):
        shown = nvae(capsys, "runs", "show", "night").out.splitlines()
        listed = nvae(capsys, "runs", "list").out.splitlines()
    assert "state\trunning" in shown
    assert any(line.startswith("images\t1,200 of 4,800 (25%), 6m 00s left, logged ") for line in shown)
    assert "memory\t3.0 GiB of the fullest device" in shown
    assert "active channels\t3: 1, 2 (of 2 in each group, coarsest first)" in shown
    assert "against divergence\t1 skipped update" in shown
    assert "last of that\tAt 1,240 images: update skipped: because" in shown
    assert "checkpoint\tnone yet" in shown
    row = dict(zip(listed[0].split("\t"), next(x for x in listed if "night" in x).split("\t"), strict=True))
    assert (row["STATE"], row["SKIPPED"], row["ROLLBACKS"]) == ("running", "1", "0")


def test_a_store_without_any_training_has_an_empty_registry(
    home: Home, capsys: Capture, tmp_path: Path
) -> None:
    listed = nvae(capsys, "registry", "list", "--json", "--store", str(tmp_path))
    assert (listed.code, json.loads(listed.out)) == (0, [])
    headings = nvae(capsys, "registry", "list", "--store", str(tmp_path))
    assert (headings.code, headings.out.split("\t")[0]) == (0, "MODEL")
    assert_refused(nvae(capsys, "registry", "list", "nvae-x", "--store", str(tmp_path)), "no MLflow database")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_is_explained_with_its_values(capsys: Capture) -> None:
    shown = nvae(capsys, "config", "explain", "objective.spectral_coefficient").out
    assert "default 0.01" in shown
    assert "ffhq256" in shown
    assert "part of the run's identity" in shown


def test_the_schema_knows_every_section(capsys: Capture) -> None:
    schema = json.loads(nvae(capsys, "config", "schema").out)
    assert {"base", "data", "model", "objective", "optimizer", "train"} <= schema["properties"].keys()


def test_what_config_show_prints_is_a_configuration(home: Home, capsys: Capture) -> None:
    (home.folder / "shown.yaml").write_text(nvae(capsys, "config", "show", "celeba64").out)
    assert config_file.load("shown.yaml") == config_file.load("celeba64")


# -- models -----------------------------------------------------------------------------


def test_evaluating_a_registered_model_gives_its_registered_score(
    home: Home, trained: str, capsys: Capture
) -> None:
    scores = json.loads(nvae(capsys, "evaluate", trained, "--json").out)
    version = Registry(home.tracking).find(trained)
    for name, value in version.metrics.items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name
    # The batch size is a matter of memory.
    in_small_batches = json.loads(nvae(capsys, "evaluate", trained, "--json", "--batch-size", "4").out)
    figures = [name for name in scores if name.startswith("validation/")]
    assert [in_small_batches[name] for name in figures] == pytest.approx(
        [scores[name] for name in figures], rel=1e-5, nan_ok=True
    )
    assert in_small_batches.keys() == scores.keys()


def tiles(path: Path, columns: int) -> list[Any]:
    """The images of a grid, in order."""
    pixels, step = np.asarray(Image.open(path)), 8 + 2
    rows = -(-pixels.shape[0] // step)
    return [
        pixels[row * step : row * step + 8, column * step : column * step + 8]
        for row in range(rows)
        for column in range(columns)
    ]


def test_an_image_of_a_seed_is_the_same_however_many_are_drawn(
    home: Home, trained: str, capsys: Capture, tmp_path: Path
) -> None:
    def drawn(name: str, *options: str) -> Path:
        shown = nvae(capsys, "sample", trained, str(tmp_path / name), *options)
        assert shown.code == 0, shown.err
        return tmp_path / name

    nine, again = drawn("nine.png", "--count", "9"), drawn("again.png", "--count", "9")
    assert nine.read_bytes() == again.read_bytes()
    # In other batches a rounding may differ, so a pixel may by one level.
    four = drawn("four.png", "--count", "4", "--batch-size", "3")
    for one, other in zip(tiles(nine, 3), tiles(four, 2), strict=False):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert drawn("other.png", "--count", "9", "--seed", "1").read_bytes() != nine.read_bytes()


def test_a_checkpoint_is_a_model_too(home: Home, trained: str, capsys: Capture, tmp_path: Path) -> None:
    described = json.loads(nvae(capsys, "runs", "show", RUN, "--json").out)
    by_url, by_name = tmp_path / "url.png", tmp_path / "name.png"
    nvae(capsys, "sample", described["checkpoint"], str(by_url))
    nvae(capsys, "sample", trained, str(by_name))
    assert by_url.read_bytes() == by_name.read_bytes()


def test_a_place_that_refuses_the_picture_is_the_users_to_mend(
    home: Home, trained: str, capsys: Capture
) -> None:
    assert_refused(nvae(capsys, "sample", trained, "/proc/x.png"), "/proc/x.png")


# -- runs -------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_same_command(home: Home, capsys: Capture) -> None:
    command = [NVAE, "train", "tiny.yaml", "train.total_images=4000", "--local", "--name", "long"]
    command += ["cadence.evaluate_images=4000", "cadence.checkpoint_images=4000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as training:
        assert training.stderr is not None
        assert training.stderr.readline().startswith("    8 images   0% ")
        assert "stop within seconds" in nvae(capsys, "runs", "stop", "long").out
        _, messages = training.communicate(timeout=300)
    assert training.returncode == 0
    assert "Run the same command again" in messages
    stopped = json.loads(nvae(capsys, "runs", "show", "long", "--json").out)
    assert stopped["state"] == "stopped"
    reached = stopped["checkpoints"][0]["images_seen"]
    assert 8 <= max(at for _, at in points(home.run_url("long"))) <= reached < 4000
    end = home.train("long", f"train.total_images={reached + 8}")
    assert end["state"] == "finished"
    assert max(at for _, at in points(home.run_url("long"))) == reached + 8


def test_a_run_that_nobody_runs_cannot_be_stopped(home: Home, trained: str, capsys: Capture) -> None:
    shown = nvae(capsys, "runs", "stop", RUN)
    assert (shown.code, shown.out) == (0, f"Nobody is running {RUN}.\n")
    assert not run_folder.stop_requested(home.run_url(RUN))


def test_a_run_is_kept_unless_its_deletion_is_confirmed(
    home: Home, trained: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    shown = nvae(capsys, "runs", "delete", RUN)
    assert (shown.code, shown.err) == (1, "Nothing was deleted.\n")
    assert Path(home.run_url(RUN)).exists()


def test_a_deleted_run_leaves_its_model(home: Home, capsys: Capture) -> None:
    home.train("short", "train.total_images=8")
    shown = nvae(capsys, "runs", "delete", "short", "--yes")
    assert shown.code == 0
    assert not Path(home.run_url("short")).exists()
    assert nvae(capsys, "evaluate", "models:/nvae-short@best").code == 0
    # The name is free again, for whatever it may be.
    assert home.train("short", "train.total_images=8", "train.seed=5")["state"] == "finished"


def test_a_killed_run_is_called_killed(home: Home, capsys: Capture) -> None:
    spec = home.begin("gone")
    run_folder.update_record(spec.url, state="running")
    assert json.loads(nvae(capsys, "runs", "show", "gone", "--json").out)["state"] == "killed"


@pytest.mark.parametrize(
    ("library", "extra", "command"),
    [
        ("ray", "train", ["train", "tiny.yaml"]),
        ("psutil", "train", ["train", "tiny.yaml"]),
        ("optuna", "tune", ["tune", "groups_and_spectral", "data.root=store:tiny"]),
    ],
)
def test_what_a_plain_installation_lacks_is_named_before_anything_is_begun(
    home: Home, library: str, extra: str, command: list[str]
) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; from cluster.cli import main; main()"
    name = f"without-{library}"
    ended = subprocess.run(
        [sys.executable, "-c", code, *command, "--name", name], capture_output=True, text=True
    )
    assert ended.returncode == 2
    message = f"Error: {library} is missing: pip install 'nvae-cluster[{extra}]'"
    assert ended.stderr.splitlines()[-1] == message
    assert not any(Path(home.store, kind, name).exists() for kind in ("runs", "searches"))
