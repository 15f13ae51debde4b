"""A trained model as a directory of its own, and back.

STORE/models/NAME/<images seen>-<hash of the weights>/
  model.safetensors   the averaged (EMA) weights and the batch-norm statistics that fit them
  config.json         the run's configuration
  samples.png         what the model draws, at the configured temperature
  card.md             the model card
  manifest.json       lineage, metrics, length and SHA-256 of every file; written last

RUN/initial/ has the first two files of the model that a run began with.

The folder's name is made of the weights, so a checkpoint that is exported twice is one export, and
the first one stands; beside it those of the same weights that were measured on other data, as an
import may be. Training checkpoints can be loaded too, so that a model can be looked at before its
run is over; their averaged weights are preferred.

Loading trusts nothing: files are checked against the manifest, the configuration against its
ranges, and names, shapes and types of all tensors against the model that the configuration
describes, before memory for that model is taken. There is no pickle on this path.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.model import NVAE
from pipeline import config_file, storage
from pipeline.artifacts import (
    MANIFEST,
    ArtifactError,
    Manifest,
    damaged_files,
    read_manifest_of,
    read_verified,
    tensors_from_bytes,
    tensors_to_bytes,
    write_directory,
)
from pipeline.config import RunConfig
from pipeline.errors import InputError
from pipeline.models.card import write_card
from pipeline.models.folders import new_folder
from pipeline.models.lineage import Lineage
from pipeline.models.names import RegistryError, check_name
from pipeline.models.sampling import grid, png, sample_images

FORMAT = "nvae-model"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "ema.safetensors"
CONFIG = "config.json"
SAMPLES = "samples.png"
CARD = "card.md"
SMALL_FILES = (CONFIG, SAMPLES, CARD)
"""What MLflow gets a copy of."""

# training/checkpoint.py writes the second; its name is repeated here since spokes do not
# import each other, and a test exports what a real CheckpointWriter wrote.
_READABLE = {FORMAT: FORMAT_VERSION, "nvae-checkpoint": 1}


@dataclass(frozen=True)
class LoadedModel:
    """A model that was loaded and verified, in eval mode, on the CPU."""

    model: NVAE
    config: RunConfig
    manifest: Manifest
    ref: str
    """What it was asked for by."""


def export(
    store: str,
    name: str,
    model: NVAE,
    config: RunConfig,
    lineage: Lineage,
    metrics: Mapping[str, float],
) -> Manifest:
    """Writes `model`, which holds the averaged weights, below STORE/models/NAME.

    If these weights were exported there before, with metrics on the same data, that export is
    returned as it is. Raises RegistryError on an impossible name, StoreError if the store refuses.
    """
    weights = tensors_to_bytes(model.state_dict())
    digest = hashlib.sha256(weights).hexdigest()
    url = storage.join(store, "models", check_name(name), f"{lineage.images_seen:012d}-{digest[:12]}")
    existing = _existing(url, digest)
    if existing is not None and existing.fields["data_hash"] != lineage.data_hash:
        url = f"{url}-{lineage.data_hash[:12]}"
        existing = _existing(url, digest)
    if existing is not None:
        return existing
    return write_export(url, name, model, config, lineage, metrics, weights)


def write_export(
    url: str,
    name: str,
    model: NVAE,
    config: RunConfig,
    lineage: Lineage,
    metrics: Mapping[str, float],
    weights: bytes | None = None,
) -> Manifest:
    """Writes an export to the folder `url` itself; `weights` are those of `model` if they are known.

    Raises StoreError if the store refuses.
    """
    if weights is None:
        weights = tensors_to_bytes(model.state_dict())
    images = sample_images(model, config.sampling.count, config.sampling.temperature, config.train.seed)
    data_root = storage.shown(config.data.root)
    return write_directory(
        url,
        {
            WEIGHTS: weights,
            CONFIG: _settings_text(config),
            SAMPLES: png(grid(images)),
            CARD: write_card(name, config, lineage, metrics, data_root).encode(),
        }.items(),
        format=FORMAT,
        version=FORMAT_VERSION,
        fields={
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **asdict(lineage),
            "data_root": data_root,
            # JSON knows no NaN; null is a metric that was not finite.
            "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        },
    )


def hand_out(loaded: LoadedModel, url: str) -> LoadedModel:
    """Copies a model to the folder `url`, which must be new or empty, and loads it from there.

    Of an export each file is copied byte for byte, the manifest too, so that the hash by which a
    registry knows it is the copy's. Of a training checkpoint the averaged weights and the configuration
    are taken. Raises InputError if the folder is taken, or the model is not what it was.
    """
    manifest = loaded.manifest
    with new_folder(url) as place:
        expected = None
        if manifest.fields["format"] == FORMAT:
            text = storage.read_bytes(storage.join(manifest.url, MANIFEST))
            for name in manifest.files:
                storage.write_bytes(storage.join(place, name), read_verified(manifest, name))
            storage.write_bytes(storage.join(place, MANIFEST), text)
            expected = manifest.sha256
        else:
            write_weights(place, loaded.model, loaded.config)
        load_directory(place, storage.shown(url), expected)
        copied = read_manifest_of(place, {FORMAT: FORMAT_VERSION})
        for name in copied.files:
            read_verified(copied, name)
    return LoadedModel(loaded.model, loaded.config, replace(copied, url=storage.normalize(url)), loaded.ref)


def write_weights(url: str, model: NVAE, config: RunConfig) -> Manifest:
    """Writes what `load_directory` needs to give back `model`; raises StoreError if the store refuses."""
    files = {WEIGHTS: tensors_to_bytes(model.state_dict()), CONFIG: _settings_text(config)}
    return write_directory(url, files.items(), format=FORMAT, version=FORMAT_VERSION, fields={})


def _settings_text(config: RunConfig) -> bytes:
    return json.dumps(config_file.to_mapping(config_file.without_secrets(config)), indent=2).encode()


def _existing(url: str, weights_sha256: str) -> Manifest | None:
    """The whole export of these weights in `url`, if there is one; a broken one is written anew."""
    try:
        manifest = read_manifest_of(url, {FORMAT: FORMAT_VERSION})
    except ArtifactError:
        return None
    entry = manifest.files.get(WEIGHTS)
    whole = entry is not None and entry.sha256 == weights_sha256 and not damaged_files(manifest)
    return manifest if whole else None


def load_directory(url: str, ref: str | None = None, manifest_sha256: str | None = None) -> LoadedModel:
    """The model in an export or in a training checkpoint, verified.

    `ref` is what messages call it; `manifest_sha256` is what its manifest must be, if that is
    known. Raises RegistryError if anything is not as it was written, or does not fit this
    release.
    """
    ref = ref or storage.shown(url)
    try:
        manifest = read_manifest_of(url, _READABLE)
        if manifest_sha256 is not None:
            _registered(manifest, manifest_sha256)
        config = config_file.from_mapping(read_settings(manifest), ref)
        weights = EMA_WEIGHTS if EMA_WEIGHTS in manifest.files else WEIGHTS
        tensors = tensors_from_bytes(read_verified(manifest, weights), storage.join(manifest.url, weights))
        return LoadedModel(build(config.model, tensors, ref), config, manifest, ref)
    except InputError as error:
        raise RegistryError(f"{ref} cannot be loaded. {error}") from error


def registered_file(url: str, manifest_sha256: str, name: str) -> bytes:
    """One of the small files of the export `url`, whose manifest must have this hash.

    Raises RegistryError.
    """
    try:
        manifest = _registered(read_manifest_of(url, {FORMAT: FORMAT_VERSION}), manifest_sha256)
        if name not in manifest.files:
            raise RegistryError(f"There is no {name}: an earlier release exported this model.")
        return read_verified(manifest, name)
    except InputError as error:
        raise RegistryError(f"{storage.shown(url)}: {name} cannot be shown. {error}") from error


def _registered(manifest: Manifest, sha256: str) -> Manifest:
    """The manifest, if it is the one that was registered."""
    if manifest.sha256 != sha256:
        raise RegistryError(
            f"{manifest.url}: its manifest is not the one that was registered (SHA-256 "
            f"{manifest.sha256[:12]}, registered {sha256[:12]}); somebody replaced it."
        )
    return manifest


def read_settings(manifest: Manifest) -> dict[str, Any]:
    """The configuration as it was written: in a file of an export, in a checkpoint's record.

    Raises RegistryError if there is none.
    """
    if manifest.fields["format"] == FORMAT:
        try:
            settings = json.loads(read_verified(manifest, CONFIG))
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"{manifest.url}: {CONFIG} is not valid JSON ({error}).") from error
    else:
        record = manifest.fields.get("record")
        settings = record.get("config") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        raise RegistryError(f"{manifest.url}: holds no configuration; it was not written by us.")
    return settings


def build(config: NVAEConfig, tensors: Mapping[str, Tensor], source: str) -> NVAE:
    """An NVAE with these weights, in eval mode.

    Raises RegistryError if names, shapes or types are not exactly those of the model that
    `config` describes.
    """
    if config.num_groups > len(tensors):
        # Even the tensorless model would take too long to write down.
        raise RegistryError(
            f"{source}: the configuration has {config.num_groups} latent groups, the weights {len(tensors)} "
            "tensors. One of the two was replaced."
        )
    with torch.device("meta"):
        expected = NVAE(config).state_dict()
    misfits = list(_misfits(expected, tensors))
    if misfits:
        raise RegistryError(
            f"{source}: the weights do not fit the configuration beside them; {len(misfits)} tensors "
            f"differ: {'; '.join(misfits[:3])}. One of the two was replaced, or another release wrote them."
        )
    model = NVAE(config)
    model.load_state_dict(tensors)
    return model.eval()


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterable[str]:
    """In words, every tensor that is missing, unexpected, or of another shape or type."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is unknown"
        elif (found[name].shape, found[name].dtype) != (expected[name].shape, expected[name].dtype):
            yield (
                f"{name} is {found[name].dtype} {tuple(found[name].shape)}, "
                f"not {expected[name].dtype} {tuple(expected[name].shape)}"
            )
