"""Hostile input to the registry, through the commands: how much was tried, how much refused.

    make faults-registry
    python -m tests.faults.registry --only names,tags --short

Refused means: exit code 2, one message without control characters or a traceback, nothing run (no marker),
no file made or changed in the store and the working directory. Of `tags` commands that only show may succeed
as well: then what they print, or write as a page, has no markup and no control characters of the tag's.
It ends with 1 if any line has refused less than was tried, and says what was not.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from mlflow import MlflowClient

from cluster.cli import main
from pipeline.artifacts import sealed
from pipeline.data import shards
from tests.faults.campaign import command
from tests.faults.injection import Row, Tally
from tests.tiny_run import YAML, Home

MARKER = "marker"
NAME, RUN = "nvae-good", "good"
GOOD = f"models:/{NAME}/1"

HOSTILE_NAMES = (
    "../x", "..", ".", "", "/etc/passwd", "a/../b", "a\\..\\b", "~root", "-rf", "--help", "a b", "a\nb",
    "x\x1b[2J", "\u202etxt", "x" * 101, "x" * 100_000, "%2e%2e%2f", "$(touch marker)", "`touch marker`",
    "'; DROP TABLE model_versions; --", "a' or name = 'b", "<script>alert(1)</script>", "{{7*7}}",
    "file:///etc", "s3://bucket/x", "http://169.254.169.254", "\ud800", "ﬁne",
)  # fmt: skip
HOSTILE_VERSIONS = (
    "0", "-1", "1.5", "1e3", "01x", "latest", "Production", "²", "9" * 50, "1/../2", "1\n", " ", "",
)  # fmt: skip
FORBIDDEN = ("pipe:touch marker", "http://169.254.169.254/latest", "memory://x", "file:///etc", "/proc/self")
OUTSIDE = (
    "../x", "..", "/etc/passwd", "a/b", "", ".", ".hidden", "x\0", "a\nb", "x" * 200, "C:\\x", "%2e%2e",
)  # fmt: skip
GARBAGE = (
    "", " ", "nan", "-1", "1e999", "²", "[" * 50_000, "{}", "null", '{"x": [1, {"y": "z"}]}', "x" * 4000,
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b]0;owned\x07\x1b[2J", "\u202e",
)  # fmt: skip
TARGETS = (
    "full", "file", "link", "loop", "dangling", "file/below", "/proc/x", "/dev/null", "x" * 300, "pipe:x",
)  # fmt: skip
MLMODEL = """flavors:
  python_function:
    loader_module: loader
    python_model: python_model.pkl
    code: .
"""


@dataclass(frozen=True)
class Place:
    """A registry with one good model, and where to work."""

    home: Home
    folder: Path
    """Empty, of the row's own, and the working directory."""
    short: bool

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.home.tracking, self.home.tracking)

    def some(self, things: Iterable[str]) -> list[str]:
        return list(things)[::5] if self.short else list(things)

    @property
    def export(self) -> Path:
        return Path(self.client.get_model_version(NAME, "1").tags["weights.url"])


def asked(*arguments: str) -> tuple[int, str, str]:
    """The `nvae` command in this process: exit code, standard output and error."""
    out, error = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["nvae", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        else:
            code = 0
    return int(code or 0), out.getvalue(), error.getvalue()


def files(*folders: Path) -> dict[str, str]:
    """What lies below: names, and hashes of the contents; SQLite's own files may change."""
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    kept = (path for path in found if not path.name.startswith("mlflow.db"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def refuse(place: Place, *arguments: str) -> None:
    """Run a command, and see that it is refused as is promised."""
    before = files(place.folder, Path(place.home.store))
    code, _, error = asked(*arguments)
    assert code == 2, f"exit code {code}: {error[:300]}"
    says_one_thing(error)
    assert files(place.folder, Path(place.home.store)) == before, "a file was made or changed"
    assert not any(Path(each, MARKER).exists() for each in (place.folder, "/tmp", "/"))


def says_one_thing(error: str) -> None:
    assert error.strip(), "nothing was said"
    assert "Traceback" not in error
    assert all(line.isprintable() for line in error.splitlines()), f"not printable: {error[:300]!r}"
    assert len(error) < 4000, f"{len(error)} characters were said"


def reading(ref: str) -> list[tuple[str, ...]]:
    """The commands that read a model's weights or files."""
    return [
        ("registry", "download", ref, "copy"),
        ("registry", "show", ref, "--card"),
        ("sample", ref, "out.png", "--count", "1"),
        ("evaluate", ref),
        ("export", ref, "handed-out"),
        ("registry", "promote", ref.removeprefix("models:/"), "--alias", "champion"),
    ]


def looking(ref: str) -> list[tuple[str, ...]]:
    """The commands that show what is recorded."""
    return [
        ("registry", "show", ref),
        ("registry", "lineage", ref),
        ("registry", "compare", ref, GOOD),
        ("report", ref),
    ]


# -- the rows -------------------------------------------------------------------------------


def names(place: Place) -> Row:
    """As the name of a model, its version, its alias, in every command that takes one."""
    tally = Tally()
    refs = [f"models:/{name}/1" for name in place.some(HOSTILE_NAMES)]
    refs += [f"models:/{NAME}/{version}" for version in place.some(HOSTILE_VERSIONS)]
    refs += [f"models:/{NAME}@{alias}" for alias in place.some(HOSTILE_NAMES)]
    for ref in refs:
        for arguments in [*reading(ref), *looking(ref)]:
            with tally.attempt(repr(arguments)[:200]):
                refuse(place, *arguments)
    return tally.row("names", "names, versions and aliases in ten commands", "")


def aliases(place: Place) -> Row:
    """As the alias that is to be moved."""
    tally = Tally()
    for alias in [*place.some(HOSTILE_NAMES), "latest", "best", "1", "v1"]:
        for arguments in [
            ("registry", "promote", f"{NAME}/1", "--alias", alias),
            ("registry", "rollback", NAME, "--alias", alias),
        ]:
            with tally.attempt(repr(arguments)[:200]):
                refuse(place, *arguments)
    return tally.row("aliases", "names of aliases to be moved", "no alias was made")


def places(place: Place) -> Row:
    """A version's tag names another place for its weights."""
    tally, was = Tally(), str(place.export)
    copy = place.folder.parent / "elsewhere"
    shutil.copytree(was, copy)
    (copy / "model.safetensors").write_bytes(b"other")
    (copy / "card.md").write_text("other")
    traversals = (f"{was}/../../../../../etc", f"{was}/..", str(copy), "../../etc/passwd", "x" * 500)
    for url in [*FORBIDDEN, *traversals]:
        place.client.set_model_version_tag(NAME, "1", "weights.url", url)
        for arguments in reading(GOOD)[:5]:
            with tally.attempt(f"{url[:60]!r}: {arguments[:2]}"):
                refuse(place, *arguments)
    place.client.set_model_version_tag(NAME, "1", "weights.url", was)
    return tally.row("places", "weights elsewhere: other schemes, traversals, other folders", "")


def manifests(place: Place) -> Row:
    """A folder whose manifest, with a checksum that fits, names files that are not in it."""
    tally = Tally()
    for name in OUTSIDE:
        folder = place.folder / "hostile"
        shutil.copytree(place.export, folder)
        record = json.loads((folder / "manifest.json").read_text())
        record["files"][name] = record["files"]["config.json"]
        (folder / "manifest.json").write_bytes(sealed(record))
        for arguments in (
            ("sample", str(folder), "out.png"),
            ("evaluate", str(folder)),
            ("export", str(folder), "handed-out"),
            ("registry", "download", str(folder), "copy"),
        ):
            with tally.attempt(f"{name!r}: {arguments[0]}"):
                refuse(place, *arguments)
        shutil.rmtree(folder)
    return tally.row("manifests", "manifests that name files outside of their folder", "")


def tags(place: Place) -> Row:
    """Anybody may edit a version's tags: nothing that lists or shows may fail or repeat markup."""
    tally = Tally()
    before = dict(place.client.get_model_version(NAME, "1").tags)
    for tag in place.some(before):
        for value in place.some(GARBAGE):
            place.client.set_model_version_tag(NAME, "1", tag, value)
            with tally.attempt(f"{tag} = {value[:40]!r}"):
                look(place)
        place.client.set_model_version_tag(NAME, "1", tag, before[tag])
    return tally.row("tags", "tags of a version, edited by somebody: shown as text, or refused", "")


def look(place: Place) -> None:
    page = place.folder / "page.html"
    for arguments in [
        ("registry", "list"),
        ("registry", "find", "images_seen > 0 or not data = x", "--sort", "created", "--refresh"),
        ("registry", "show", GOOD),
        ("registry", "lineage", GOOD),
        ("registry", "compare", GOOD, GOOD, "--output", str(page)),
    ]:
        code, out, error = asked(*arguments)
        assert code in (0, 2), f"{arguments}: exit code {code}"
        if code:
            says_one_thing(error)
        assert "\x1b" not in out, f"{arguments} writes an escape"
    if page.exists():
        text = page.read_text()
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        page.unlink()


def targets(place: Place) -> Row:
    """Folders that a download must not write to."""
    tally, folder = Tally(), place.folder
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to("full")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    for target in TARGETS:
        for arguments in [("registry", "download", GOOD, target), ("export", GOOD, target)]:
            with tally.attempt(repr(arguments)):
                refuse(place, *arguments)
    return tally.row("targets", "folders of others, links, files, devices as a download's place", "")


def foreign(place: Place) -> Row:
    """Versions that something else registered, with code inside: MLflow would run it on loading."""
    tally, artifacts = Tally(), place.folder.parent / "foreign"
    artifacts.mkdir()
    run = f"import os; os.system('touch {place.folder}/{MARKER}')"
    (artifacts / "loader.py").write_text(run)
    (artifacts / "MLmodel").write_text(MLMODEL)
    (artifacts / "python_model.pkl").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    client = place.client
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(artifacts))
    client.set_registered_model_alias("foreign", "champion", "1")
    for ref in ("models:/foreign/1", "models:/foreign@champion"):
        for arguments in [*reading(ref), *looking(ref)]:
            with tally.attempt(repr(arguments)):
                refuse(place, *arguments)
    for arguments in (("sample", str(artifacts), "out.png"), ("evaluate", str(artifacts))):
        with tally.attempt(repr(arguments)):
            refuse(place, *arguments)
    client.delete_registered_model("foreign")
    return tally.row("foreign", "versions of others, with code and pickles in them", "nothing of it was run")


def honest(place: Place) -> Row:
    """What is good is taken, so that refusing everything is no success."""
    tally = Tally()
    listing = [("registry", "list"), ("registry", "find", "data=tiny")]
    for arguments in [*reading(GOOD)[:5], *looking(GOOD), *listing]:
        with tally.attempt(repr(arguments)):
            code, _, error = asked(*arguments)
            assert code == 0, error
    return tally.row("honest", "the same commands on the good model", "taken, not refused")


ROWS: dict[str, Callable[[Place], Row]] = {
    row.__name__: row for row in (honest, names, aliases, places, manifests, tags, targets, foreign)
}


def run(chosen: Sequence[str], _: int, short: bool) -> list[Row]:
    """Try the rows `chosen`; print each as soon as it is there."""
    rows = []
    print(f"{'':9} {'tried':>6} {'refused':>8} {'seconds':>7}  what: measured", flush=True)
    with tempfile.TemporaryDirectory(prefix="nvae-faults-") as outer:
        home = Home(Path(outer) / "home")
        home.folder.mkdir()
        Path(home.yaml).write_text(YAML)
        os.environ |= {"NVAE_STORE": home.store, "XDG_CACHE_HOME": f"{outer}/cache"}
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        with Path(os.devnull).open("w") as nobody, contextlib.redirect_stderr(nobody):
            shards.build("portraits:24", f"{home.store}/data/tiny", image_size=16, validation_fraction=0.25)
            home.train(RUN)
        for name in chosen:
            folder = Path(outer) / name / "work"
            folder.mkdir(parents=True)
            began = time.monotonic()
            with contextlib.chdir(folder):
                row = ROWS[name](Place(home, folder, short))
            print(
                f"{row.id:9} {row.tried:6,} {row.survived:8,} {time.monotonic() - began:7.1f}  {row.fault}",
                flush=True,
            )
            for what in row.broken:
                print(f"     NOT REFUSED: {what}", flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(command("tests.faults.registry", __doc__, ROWS, run, sys.argv[1:]))
