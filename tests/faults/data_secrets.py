"""S5, S7: what a real training leaves behind, and who could have read it meanwhile.

    python -m tests.faults.data_secrets FILE ARGUMENTS

is the `nvae` command, which also notes in FILE each folder and temporary file that it makes.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import storage
from tests import s3_server
from tests.faults.injection import Place, Row, Tally, environment_of_child, noise
from tests.pipeline.data.data_set import build
from tests.pipeline.data.web_server import serving
from tests.tiny_run import NVAE, YAML

ROOT = Path(__file__).parents[2]
TOKEN, PASSWORD, SIGNATURE = "tok-5e1f7c29ab", "pw-93bd02aa71", "sig-c0ffee4d11"
SHORT = ["train.total_images=16", "cadence.checkpoint_images=8", "cadence.log_images=8"]


def secrets() -> dict[str, list[bytes]]:
    """Each secret in every spelling in which it could be written down."""
    names = {
        "AWS_SECRET_ACCESS_KEY": s3_server.SECRET_KEY,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "a token in a URL": TOKEN,
        "a signature in a URL": SIGNATURE,
    }
    found = {name: [secret.encode(), quote(secret, safe="").encode()] for name, secret in names.items()}
    found["MLFLOW_TRACKING_PASSWORD"].append(base64.b64encode(f"user:{PASSWORD}".encode()))
    found["a token in a URL"].append(base64.b64encode(f"user:{TOKEN}".encode()))
    return found


Command = tuple[str, list[str], int | None]
"""What it is, its arguments, its exit code where that is sure."""


def commands(yaml: str, data: str, served: str, store: str) -> list[list[Command]]:
    """Commands that go well and that fail; those of one list follow upon each other."""
    nowhere = "127.0.0.1:9"
    train = ["-v", "train", yaml, f"data.root={data}", *SHORT, "--store", store, "--local"]
    signed = f"https://user:{TOKEN}@{nowhere}/set?X-Amz-Signature={SIGNATURE}"
    down = ["--tracking", f"http://user:{TOKEN}@{nowhere}"]
    behind = [*train, f"data.root={served}", "--name", "behind"]
    bad_store = f"s3://key:{TOKEN}@bucket/x"
    return [
        [("a server for curves that is down", [*train, "--name", "down", *down], None)],
        [
            ("data behind a password", behind, 0),
            ("the same going on", [*behind, "train.total_images=24"], 0),
            ("the run", ["runs", "show", "behind", "--store", store], 0),
        ],
        [
            ("a training", [*train, "--name", "one"], 0),
            ("what would be trained", [*behind, *down, "--dry-run"], 0),
            ("data behind a signature", [*train, f"data.root={signed}", "--name", "signed"], 2),
            ("a store in a URL with a key", [*train, "--store", bad_store, "--name", "key"], 2),
            ("models of a server that is down", ["-v", "registry", "list", *down], 2),
            ("verifying data behind a signature", ["-v", "shards", "verify", signed], 2),
        ],
    ]


def left_behind(place: Place) -> Row:
    """S5: after real trainings with secrets around, no output holds any of them."""
    tally, cwd = Tally(), place.folder / "cwd"
    cwd.mkdir()
    (place.folder / "tiny.yaml").write_text(YAML)
    data = place.uploaded(build(place.folder, str(place.folder / "set")), "set").root
    store = f"{place.bucket}/{place.folder.name}/store"
    environment = environment_of_child(
        MLFLOW_TRACKING_USERNAME="user",
        MLFLOW_TRACKING_PASSWORD=PASSWORD,
        HOME=str(cwd),
        TMPDIR=str(cwd),
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
    )
    outputs: dict[str, bytes] = {}

    def run(chain: list[Command]) -> None:
        for what, arguments, code in chain:
            ended = subprocess.run(
                [NVAE, *arguments], cwd=cwd, env=environment, capture_output=True, check=False
            )
            outputs[f"output of {what}"] = ended.stdout + ended.stderr
            with tally.attempt(what):
                assert code is None or ended.returncode == code, ended.stderr.decode()[-500:]

    with serving(place.folder / "set") as server, ThreadPoolExecutor(3) as pool:
        served = server.url.replace("//", f"//user:{TOKEN}@")
        chains = commands(str(place.folder / "tiny.yaml"), data, served, store)
        list(pool.map(run, chains))
    outputs |= {str(path.relative_to(cwd)): path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    outputs |= dict(stored(store))
    searched = sum(map(len, outputs.values()))
    assert any(name.endswith("mlflow.db") for name in outputs)
    assert any(name.endswith("model.safetensors") for name in outputs)
    hits = 0
    for name, content in outputs.items():
        for secret, spellings in secrets().items():
            with tally.attempt(f"{secret} in {name}"):
                found = any(spelling in content for spelling in spellings)
                hits += found
                assert not found, "it is there"
    return tally.row(
        "S5",
        "secrets in the environment and in URLs: trainings that go well and that fail",
        f"{hits} hits in {len(outputs)} outputs, {searched / 2**20:.1f} MiB (logs, store, MLflow's database)",
    )


def stored(url: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file below `url`."""
    files = storage.list_sizes(url)
    for name in storage.list_dir(url):
        below = storage.join(url, name)
        if name in files:
            yield below, storage.read_bytes(below)
        else:
            yield from stored(below)


# --- folders -----------------------------------------------------------------------------------


def modes(place: Place) -> Row:
    """S7: what a training puts where others may look is for its user alone, whatever the umask."""
    tally, scratch = Tally(), place.folder / "tmp"
    scratch.mkdir(mode=0o777)
    scratch.chmod(0o1777)
    (place.folder / "tiny.yaml").write_text(YAML)
    data = place.uploaded(noise(place.folder, 40, 8, 13_000, held_out=8), "set").root
    store = f"{place.bucket}/{place.folder.name}/store"
    notes = place.folder / "notes.jsonl"
    arguments = ["train", str(place.folder / "tiny.yaml"), f"data.root={data}", *SHORT, "--store", store]
    arguments += ["--local", "--name", "modes", f"data.cache_folder={scratch}/cache"]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults.data_secrets", str(notes), *arguments],
        cwd=place.folder,
        env=environment_of_child(TMPDIR=str(scratch), PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        umask=0,
        check=False,
    )
    with tally.attempt("the training"):
        assert ended.returncode == 0, ended.stderr[-500:]
    made = [json.loads(line) for line in notes.read_text().splitlines()]
    private = set()
    for note in made:
        path = Path(note["path"])
        if not path.is_relative_to(scratch) or private & {str(parent) for parent in path.parents}:
            continue
        with tally.attempt(f"{note['event']} {path.name}"):
            # Who may enter the cache's parent learns nothing: its pieces are in a folder of their own.
            # torch makes a folder for what it compiles, which is nothing here.
            if path != scratch / "cache" and not is_empty_folder_of_torch(path):
                assert note["mode"] is None or note["mode"] & 0o077 == 0, f"mode {note['mode']:o}"
            if note["event"] == "os.mkdir" and note["mode"] == 0o700:
                private.add(str(path))
    names = sorted({Path(name).name.rpartition("-")[0] or Path(name).name for name in private})
    with tally.attempt("the folders that are expected"):
        assert {"nvae-journal", "nvae-register", "nvae-artifact"} <= {*names}, names
        assert (scratch / "cache/nvae-pieces").stat().st_mode & 0o777 == 0o700
        left = [path.name for path in scratch.iterdir() if not is_empty_folder_of_torch(path)]
        assert left == ["cache"], left
    return tally.row("S7", "temporary folders and the cache under a umask of 0", f"0700: {', '.join(names)}")


def is_empty_folder_of_torch(path: Path) -> bool:
    return path.name.startswith("torchinductor_") and path.is_dir() and not any(path.iterdir())


def note_what_is_made(file: str) -> None:
    """Write a line for each folder and temporary file that this process makes from now on."""
    out = Path(file).open("a")  # noqa: SIM115

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        note: Mapping[str, Any] | None = None
        if event == "os.mkdir":
            note = {"event": event, "path": os.fspath(arguments[0]), "mode": arguments[1]}
        elif event == "tempfile.mkstemp":
            # Python makes these for the user alone.
            note = {"event": event, "path": os.fspath(arguments[0]), "mode": None}
        elif event == "open" and arguments[1] is not None and set("wxa") & set(str(arguments[1])):
            path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else Path()
            if str(path.parent) == tempfile.gettempdir():
                note = {"event": event, "path": str(path), "mode": 0o666}
        if note is not None:
            print(json.dumps(note), file=out, flush=True)

    sys.addaudithook(hook)


if __name__ == "__main__":
    from cluster.cli import main

    note_what_is_made(sys.argv[1])
    sys.argv = ["nvae", *sys.argv[2:]]
    main()
