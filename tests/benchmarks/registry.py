"""Finding models among ten thousand versions: on SQLite, and on a real MLflow server with PostgreSQL.

    python -m tests.benchmarks.registry --versions 10000
    python -m tests.benchmarks.registry --versions 10000 --postgresql /usr/lib/postgresql/15/bin

The second starts a PostgreSQL of its own in a temporary folder (as the user postgres where it is
started by root) and `mlflow server` on it with its usual four workers; it needs psycopg2, as MLflow
does. One version is registered as always; the others are its rows again, with other numbers, hashes,
scores and spectral coefficients, put into MLflow's tables: registering them one by one would take an hour.

`cold` is with an empty cache; `unchanged` with nothing new in MLflow; `one new` after one more version was
registered; `MLflow` is its own search for all versions. Each is a median of several, whole commands
(`nvae registry find`, from the shell's prompt to the prompt) and, in brackets, without starting Python and
importing libraries.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from mlflow import MlflowClient

from pipeline.models.export import export
from pipeline.models.lineage import Lineage
from pipeline.models.registry import Registry
from tests.mlflow_server import free_port, serving
from tests.pipeline.models.tiny import tiny_config, tiny_model

MODELS, GROUPS = 5, 20
QUERY = "validation.bits_per_dim < 0.75 and objective.spectral_coefficient <= 0.1"
INSIDE = """
import sys, time
from mlflow import MlflowClient
from pipeline import registry
began = time.perf_counter()
registry.find(sys.argv[1], tracking=sys.argv[2])
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--postgresql", type=Path, metavar="FOLDER", help="of initdb and pg_ctl")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nvae-registry-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        if asked.postgresql is None:
            place, database = "SQLite", f"sqlite:///{folder}/mlflow.db"
            uri = database
            MlflowClient(uri, uri).search_experiments()
        else:
            place = "mlflow server on PostgreSQL"
            database = stack.enter_context(_postgresql(folder, asked.postgresql))
            uri = stack.enter_context(serving(folder, backend=database, workers=4)).url
        measured = _measured(folder, uri, database, asked.versions, asked.repeat)
    print(f"{asked.versions:,} versions of {MODELS} models, {place}; seconds")
    for what, (whole, inside) in measured.items():
        print(f"  {what:<10} {whole:6.2f}  ({inside:.2f})" if whole else f"  {what:<10} {inside:6.2f}")


def _measured(
    folder: Path, uri: str, database: str, versions: int, repeat: int
) -> dict[str, tuple[float | None, float]]:
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("nvae", artifact_location=str(folder / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    _register(folder, uri, run_id, 0)
    _copy_rows(database, versions)
    cache = folder / "cache"

    def forgotten() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    seeds = iter(range(1, 1000))

    def one_more() -> None:
        _register(folder, uri, run_id, next(seeds))

    def find(before: Callable[[], None]) -> tuple[float, float]:
        command, whole, inside = ["-m", "cluster.cli", "registry", "find", QUERY, "--tracking", uri], [], []
        for _ in range(repeat):
            before()
            whole.append(_timed(command, cache)[0])
            before()
            inside.append(float(_timed(["-c", INSIDE, QUERY, uri], cache)[1]))
        return statistics.median(whole), statistics.median(inside)

    # Our own client has set a limit that suits a page.
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "300"
    began = time.perf_counter()
    client.search_model_versions(max_results=10_000)
    return {
        "MLflow": (None, time.perf_counter() - began),
        "cold": find(forgotten),
        "unchanged": find(lambda: None),
        "one new": find(one_more),
    }


def _timed(arguments: list[str], cache: Path) -> tuple[float, str]:
    """Seconds that a Python program takes, and what it prints."""
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - began, ended.stdout


def _register(folder: Path, uri: str, run_id: str, seed: int) -> None:
    metrics = {"validation/bits_per_dim": 0.7, "validation/nelbo_nats": 95.0, "validation/images": 7000.0}
    for group in range(GROUPS):
        metrics[f"validation/kl_nats/group_{group:02d}"] = 3.5
        metrics[f"validation/active_channels/group_{group:02d}"] = 20.0
    lineage = Lineage(
        "faces", run_id, 1_000_000, "d1" * 32, "0.1.0", data_licence="CC BY-NC-SA 4.0", world_size=8
    )
    manifest = export(str(folder / "store"), "nvae-many-0", tiny_model(seed), tiny_config(), lineage, metrics)
    Registry(uri).register(manifest.url, "nvae-many-0")


def _copy_rows(database: str, versions: int) -> None:
    """The first version's rows, again and again, in turn for each model."""
    engine, chance = sqlalchemy.create_engine(database), random.Random(0)
    with engine.begin() as connection:

        def rows(table: str) -> list[dict[str, Any]]:
            found = connection.execute(sqlalchemy.text(f"SELECT * FROM {table}"))  # a constant of this file
            return [dict(row) for row in found.mappings()]

        def insert(table: str, new: list[dict[str, Any]]) -> None:
            names = ", ".join(new[0])
            values = ", ".join(f":{name}" for name in new[0])
            connection.execute(sqlalchemy.text(f"INSERT INTO {table} ({names}) VALUES ({values})"), new)

        (model,), (first,) = rows("registered_models"), rows("model_versions")
        tags = [tag for tag in rows("model_version_tags") if tag["key"] != "best.passed"]
        insert("registered_models", [model | {"name": f"nvae-many-{number}"} for number in range(1, MODELS)])
        new_versions, new_tags = [], []
        for count in range(versions - 1):
            key = {"name": f"nvae-many-{count % MODELS}", "version": 2 + count // MODELS}
            # A few every hour, as if they had been trained over years.
            then = first["creation_time"] - 1_000_000 * (versions - count)
            run = {"run_id": f"{count:032x}", "creation_time": then, "last_updated_time": then}
            new_versions.append(first | key | run)
            new_tags += [tag | key | {"value": _changed(tag, count, chance)} for tag in tags]
        for start in range(0, len(new_versions), 1000):
            insert("model_versions", new_versions[start : start + 1000])
        for start in range(0, len(new_tags), 10_000):
            insert("model_version_tags", new_tags[start : start + 10_000])


def _changed(tag: dict[str, Any], count: int, chance: random.Random) -> str:
    value = str(tag["value"])
    if tag["key"] == "validation/bits_per_dim":
        return repr(chance.uniform(0.6, 1.6))
    if tag["key"] == "weights.sha256":
        return f"{count:064x}"
    if tag["key"] == "settings":
        return json.dumps(json.loads(value) | {"objective.spectral_coefficient": 10 ** chance.uniform(-3, 0)})
    return value


@contextmanager
def _postgresql(folder: Path, programs: Path) -> Iterator[str]:
    """The address of a database in a PostgreSQL of its own."""
    user = "postgres" if os.getuid() == 0 else None
    place, port = folder / "postgresql", free_port()
    place.mkdir()
    if user is not None:
        shutil.chown(place, user)

    def call(program: str, *arguments: str) -> None:
        with (folder / "postgresql.log").open("ab") as log:
            subprocess.run(
                [programs / program, *arguments], check=True, user=user, cwd="/", stdout=log, stderr=log
            )

    data = str(place / "data")
    call("initdb", "-D", data, "-A", "trust", "-U", "nvae", "-E", "UTF8", "--no-locale")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place}"
    call("pg_ctl", "-D", data, "-w", "-o", options, "start")
    try:
        yield f"postgresql+psycopg2://nvae@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")


if __name__ == "__main__":
    main()
