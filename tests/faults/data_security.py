"""S1-S4, S6: places, files and texts that were made to do harm: nothing runs, nothing grows."""

import contextlib
import pickle
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvae.published import PublishedCheckpointError, load_published
from pipeline import config_file, storage
from pipeline.artifacts import ArtifactError, tensors_from_bytes
from pipeline.config_file import ConfigError
from pipeline.data.index import load_index
from pipeline.errors import InputError
from pipeline.models import export, registry
from pipeline.models.export import load_directory
from pipeline.models.lineage import Lineage
from pipeline.models.names import RegistryError
from pipeline.models.versions import version_tags
from tests.faults.hostile_weights import weight_payloads
from tests.faults.injection import Place, Row, Tally, grown_mib
from tests.pipeline.data import test_hostile_shards as hostile_shards
from tests.pipeline.data.hostile_indexes import INDEX_PAYLOADS
from tests.pipeline.data.hostile_tars import TAR_PAYLOADS
from tests.pipeline.models.test_registry import BITS, TAMPERING, Opened, pretend
from tests.pipeline.models.tiny import tiny_config, tiny_model
from tests.pipeline.test_storage import REFUSED
from tests.tiny_run import YAML

MOST_GROWN_MIB = 256
MOST_SECONDS = 5
MARKER = "marker"


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within `folder`: at the end there is no marker, and memory has not grown beyond the cap."""
    with contextlib.chdir(folder), grown_mib() as grown:
        yield
        assert not list(folder.rglob(MARKER)), "the marker was made"
    assert grown[0] < MOST_GROWN_MIB, f"grew by {grown[0]:.0f} MiB"


# --- S1 ----------------------------------------------------------------------------------------

METADATA = "http://169.254.169.254/latest/meta-data"


def places_refused(place: Place) -> Row:
    """S1: URLs behind which a shell, a cloud's metadata or another folder would be."""
    tally = Tally()
    uses: tuple[Callable[[str], object], ...] = (
        *(storage.read_bytes, storage.exists, storage.list_dir, storage.delete, storage.size),
        lambda url: storage.write_bytes(url, b""),
        lambda url: storage.read_bytes(url, 0, 10),
    )
    for url in REFUSED:
        with tally.attempt(f"{url!r}"), watched(place.folder):
            for use in uses:
                with pytest.raises(InputError):
                    use(url)
            if not url.startswith("store:"):
                with pytest.raises(InputError):
                    load_index(url)
    for url in (METADATA, "pipe:touch marker", "s3://b/$(touch marker).tar"):
        with tally.attempt(f"GOPEN_REWRITE to {url}"), watched(place.folder):
            Path("there").write_bytes(b"there")
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("GOPEN_REWRITE", f"{place.folder}={url}")
                assert storage.read_bytes(str(place.folder / "there")) == b"there"
    for payload in INDEX_PAYLOADS:
        if payload.name.startswith("shard "):
            with tally.attempt(payload.name), watched(place.folder):
                folder = place.folder / f"index{tally.tried}"
                folder.mkdir()
                payload.write(folder)
                with pytest.raises(InputError, match=payload.refusal):
                    load_index(str(folder))
    expected = {"there", *(f"index{number}" for number in range(tally.tried))}
    assert {path.name for path in place.folder.iterdir()} <= expected
    return tally.row(
        "S1",
        "pipe:, shell characters, metadata servers, GOPEN_REWRITE; absolute names, schemes, .. in an index",
        f"refused by {len(uses) + 1} functions, no marker",
    )


# --- S2 ----------------------------------------------------------------------------------------


def checkpoints(place: Place) -> Row:
    """S2: what is called a checkpoint and would run code or fill the memory."""
    tally, grown = Tally(), []
    lineage = Lineage("faces", "0" * 32, 100, "d1" * 32, "0.1.0")
    good = Path(
        export.export(str(place.folder), "good", tiny_model(), tiny_config(), lineage, {BITS: 4.0}).url
    )
    payloads = weight_payloads(Path(MARKER))
    work = place.folder / "work"
    for what, data in payloads.items():
        shutil.copytree(good, work)
        pretend(work, export.WEIGHTS, data)
        with tally.attempt(f"weights: {what}"), watched(work):
            with grown_mib() as more, pytest.raises(RegistryError):
                load_directory(str(work))
            grown += more
        with tally.attempt(f"published: {what}"), watched(work), pytest.raises(PublishedCheckpointError):
            load_published(data)
        with contextlib.suppress(ArtifactError):
            # What is well formed and yet no model of ours may be parsed, not more.
            tensors_from_bytes(data, what)
        shutil.rmtree(work)
    for what, (tamper, message) in TAMPERING.items():
        shutil.copytree(good, work)
        tamper(work)
        with tally.attempt(what), watched(work), pytest.raises(RegistryError, match=re.escape(message)):
            load_directory(str(work))
        shutil.rmtree(work)
    return tally.row(
        "S2",
        "checkpoints with pickles, zips, headers that promise too much, changed manifests",
        f"refused, no marker; memory grew by {max(grown):.0f} MiB at most",
    )


# --- S3 ----------------------------------------------------------------------------------------


def tars(place: Place) -> Row:
    """S3: tars and indexes with pickles, links, devices, bombs."""
    tally, grown = Tally(), []
    payloads = {payload.name: payload for payload in TAR_PAYLOADS}
    for options in ([],) if place.short else ([], ["slow"]):
        folder = place.folder / f"of{len(options)}"
        folder.mkdir()
        met = hostile_shards.meet_payloads(folder, *options)
        grown += [result["grown_mib"] for result in met.values()]
        for name, result in met.items():
            with tally.attempt(name):
                if name in payloads:
                    hostile_shards.assert_met(payloads[name], result)
                else:
                    assert "crashed" not in result
                    assert result["grown_mib"] < MOST_GROWN_MIB
                    hostile_shards.assert_one_printable_message(result)
        with tally.attempt("what is left behind"):
            left = [path for path in folder.rglob("*") if path.is_file()]
            assert {path.suffix for path in left} <= hostile_shards.OURS
            assert not list(folder.rglob(MARKER))
            assert not Path("/tmp/escaped.png").exists()
    return tally.row(
        "S3",
        "shards with pickles, links, devices, sparse members, bombs; indexes that lie",
        f"ignored or refused; memory grew by {max(grown):.0f} MiB at most",
    )


# --- S4 ----------------------------------------------------------------------------------------

LOADER = "evil_loader_of_a_model"
SOURCE = f"open({str(Path(tempfile.gettempdir()) / 'marker-of-a-model')!r}, 'w').close()\n"
MLMODEL = f"""
artifact_path: model
flavors:
  python_function:
    loader_module: {LOADER}
    code: code
    data: data.pkl
    env: {{conda: conda.yaml}}
"""


def registered_models(place: Place) -> Row:
    """S4: registered versions that bring code along, or whose tags lead elsewhere."""
    from mlflow import MlflowClient

    tally, uri = Tally(), f"sqlite:///{place.folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("x", artifact_location=str(place.folder / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    lineage = Lineage("faces", run_id, 100, "d1" * 32, "0.1.0")
    good = export.export(str(place.folder), "evil", tiny_model(), tiny_config(), lineage, {BITS: 4.0})
    shipped = place.folder / "shipped"
    (shipped / "code").mkdir(parents=True)
    (shipped / "MLmodel").write_text(MLMODEL)
    (shipped / f"code/{LOADER}.py").write_text(SOURCE)
    (shipped / "data.pkl").write_bytes(pickle.dumps(Opened(place.folder / MARKER)))
    (shipped / "python_model.pkl").write_bytes(pickle.dumps(Opened(place.folder / MARKER)))
    client.log_artifacts(run_id, str(shipped), "model")
    # The same beside our own files, which the manifest does not list.
    shutil.copytree(shipped, good.url, dirs_exist_ok=True)
    client.create_registered_model("evil")
    tags, marker = version_tags(good, export.WEIGHTS, {}), Path(tempfile.gettempdir()) / "marker-of-a-model"
    elsewhere = ("pipe:touch marker", f"{good.url}/../../../evil", METADATA, "models:/evil/1", "/etc", "")
    variants: dict[str, tuple[dict[str, str], str | None]] = {
        "code beside a model of ours": (tags, None),
        "a model of MLflow's own": ({}, "was not registered by nvae"),
        **{f"weights at {url!r}": (tags | {"weights.url": url}, "evil") for url in elsewhere},
        "another manifest": (tags | {"manifest.sha256": "0" * 64}, "somebody replaced it"),
        "other weights": (tags | {"weights.sha256": "0" * 64}, "changed the tag"),
    }
    for number, (what, (given, refusal)) in enumerate(variants.items(), 1):
        client.create_model_version("evil", f"runs:/{run_id}/model", run_id=run_id, tags=given)
        with tally.attempt(what), watched(place.folder):
            if refusal is None:
                assert registry.load(f"models:/evil/{number}", uri).manifest.sha256 == good.sha256
            else:
                with pytest.raises(RegistryError, match=refusal):
                    registry.load(f"models:/evil/{number}", uri)
            assert LOADER not in sys.modules
            assert not marker.exists()
    names = ("../evil/1", "evil/../../x", "evil@../x", "/etc/passwd", "evil/1/../../code", "evil@best/..")
    for ref in names:
        with tally.attempt(f"models:/{ref}"), watched(place.folder), pytest.raises(RegistryError):
            registry.load(f"models:/{ref}", uri)
    return tally.row(
        "S4",
        "registered models with loader_module and code; tags and names that lead elsewhere",
        "never imported, refused",
    )


# --- S6 ----------------------------------------------------------------------------------------


def yaml_payloads() -> dict[str, str]:
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    return {
        "a call": YAML + "x: !!python/object/apply:os.system ['touch marker']\n",
        "an object": YAML + "x: !!python/object:os.system {}\n",
        "a name": YAML + "x: !!python/name:os.system ''\n",
        "a module": YAML + "x: !!python/module:os ''\n",
        "a new object": YAML + "x: !!python/object/new:os.system ['touch marker']\n",
        "a tag of its own": YAML + "x: !touch marker\n",
        "anchors bomb": 'a0: &a0 ["x"]\n' + bomb,
        "an anchor alone": YAML + "x: &a 1\n",
        "a merge of itself": "x: &a\n  <<: *a\n",
        "a key of a megabyte": YAML + "k" * 2**20 + ": 1\n",
        "a key of 200,000 letters": YAML + "k" * 200_000 + ": 1\n",
        "a value of a megabyte": YAML + f"x: {'v' * 2**20}\n",
        "a key of 200,000 letters, quoted": YAML + f"? {'k' * 200_000}\n: 1\n",
        "a tag of 200,000 letters": YAML + f"x: !{'t' * 200_000} 1\n",
        "an unknown key": YAML + "unknown: 1\n",
        "an unknown setting": YAML.replace("batch_size: 4", "batch_sice: 4"),
        "lists in lists": "x: " + "[" * 100_000 + "\n",
        "mappings in mappings": "x: " + "{a: " * 50_000 + "\n",
        "a number of 100,000 digits": YAML.replace("batch_size: 4", f"batch_size: {'9' * 100_000}"),
        "an expression": YAML.replace("batch_size: 4", "batch_size: __import__('os').system('touch marker')"),
        "a variable of the environment": YAML.replace("batch_size: 4", "batch_size: ${oc.env:HOME}"),
        "not a number": YAML.replace("batch_size: 4", "batch_size: .nan"),
        "two documents": YAML + "---\nx: 1\n",
        "a key that is a list": YAML + "? [a, b]\n: 1\n",
        "a control character": YAML + "x: \x00\n",
        "an included file": YAML + "x: !include /etc/passwd\n",
    }


def configurations(place: Place) -> Row:
    """S6: YAML that would run code, or grow, or is misspelt."""
    tally, longest = Tally(), 0.0
    for number, (what, text) in enumerate(yaml_payloads().items()):
        path = place.folder / f"{number}.yaml"
        path.write_text(text)
        begun = time.monotonic()
        with tally.attempt(what), watched(place.folder):
            with pytest.raises(ConfigError) as caught:
                config_file.load(str(path))
            message = str(caught.value)
            assert len(message) < 5000, f"a message of {len(message):,} characters"
            assert re.search(rf"{number}\.yaml:\d+|characters", message), message
            seconds = time.monotonic() - begun
            longest = max(longest, seconds)
            assert seconds < MOST_SECONDS, f"took {seconds:.1f} s"
    return tally.row(
        "S6",
        "YAML with code, bombs, long keys, unknown keys",
        f"an error with its line after {longest:.1f} s at most",
    )
