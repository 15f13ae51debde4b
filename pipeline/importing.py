"""A published checkpoint becomes a model of ours: received, checked, measured, exported, registered.

Nothing is kept of a checkpoint that fails on the way: the export is written when everything about
the model is known, and registered when it is written. An imported model has no training of ours, so it
gets an MLflow run of its own, `import-NAME`, which says where it came from and how good it was found.
The same checkpoint imported twice under one name is one run and one version.

Without a data set there is no likelihood, and the model cannot become `best`: that is for what was
measured. The figure of the first forward pass is of a few images and only says that the model works.
"""

import copy
import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.model import NVAE
from nvae.published import PublishedCheckpointError, build_published
from pipeline import config_file, progress, storage
from pipeline.code_version import code_version
from pipeline.config import RunConfig
from pipeline.data.index import VALIDATION, Index, load_index
from pipeline.data.loader import Batch, check_fits, evaluation_batches
from pipeline.data.portraits import portrait
from pipeline.data.verification import check_complete
from pipeline.models.adoption import adopt
from pipeline.models.evaluation import evaluate
from pipeline.models.export import export, load_directory, write_export
from pipeline.models.folders import new_folder
from pipeline.models.lineage import Lineage
from pipeline.models.names import check_name
from pipeline.models.registry import Registration, Registry
from pipeline.published_settings import global_batch_size, run_config
from pipeline.run import EXPERIMENT
from pipeline.training.private_folder import PrivateFolder
from pipeline.training.run_description import described
from pipeline.training.worker import LocalWorker
from pipeline.untrusted.published import MOST_BYTES, PREFIX, Received, UntrustedError, receive

NOT_MEASURED = "not-measured"
"""What stands for the data set's hash where none was given."""
CHECKED_IMAGES = 4
PROGRESS_SECONDS = 10.0
_PART_BYTES = 64 << 20


@dataclass(frozen=True)
class Imported:
    """A checkpoint as a model of ours, which has computed something finite."""

    model: NVAE
    config: RunConfig
    source: str
    sha256: str
    images_seen: int
    checked_bits_per_dim: float
    """Of CHECKED_IMAGES images; what of, `checked_on` says."""
    checked_on: str
    scores: dict[str, float]
    """On the whole validation split; empty without a data set."""
    data_hash: str
    left_out: tuple[str, ...]
    """Settings of the published command line that ours cannot say."""
    layers: tuple[str, ...]


def take_in(
    source: str, preset: str | None, overrides: Sequence[str], data: str | None, draws: int, batch_size: int
) -> Imported:
    """The model in the published checkpoint at `source`, a path or URL; `data` is a data set's URL.

    Raises UntrustedError, DisagreementError or another InputError with the reason why not.
    """
    # What can be wrong without the file is found before hours of a download.
    if preset:
        config_file.load(preset)
    index = None if data is None else load_index(data)
    with _on_disk(source) as path:
        received = receive(path)
    if not {"network", "calls"} & set(received.layers):
        progress.say(
            "This system has neither network namespaces nor a filter of system calls: the checkpoint was "
            "opened within limits, by a reader that makes tensors and plain values only."
        )
    return accept(received, source, preset, overrides, index, draws, batch_size)


def accept(
    received: Received,
    source: str,
    preset: str | None,
    overrides: Sequence[str],
    index: Index | None,
    draws: int,
    batch_size: int,
) -> Imported:
    """What `take_in` does with a checkpoint once it is open."""
    model = _built(received, source)
    config, left_out = run_config(received.arguments, model.config, preset, overrides)
    if index is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": index.root})})
        check_fits(config, index)
        check_complete(index, (VALIDATION,), cut_is_corrupt=config.data.on_corrupt == "skip")
    if config.model != model.config:
        model = _with_config(model, config.model)
    worker = LocalWorker()
    model.to(worker.device)
    bits, checked_on = _checked(_to_use(model), config, index, source)
    progress.say(f"Opened and checked: {bits:.3f} bits/dim on {checked_on}")
    scores = _measured(_to_use(model), config, index, worker, draws, batch_size) if index else {}
    return Imported(
        model=model.cpu().eval(),
        config=config,
        source=storage.shown(source),
        sha256=received.sha256,
        images_seen=(received.global_step or 0) * (global_batch_size(received.arguments) or 1),
        checked_bits_per_dim=bits,
        checked_on=checked_on,
        scores=scores,
        data_hash=index.content_hash if index else NOT_MEASURED,
        left_out=tuple(left_out),
        layers=received.layers,
    )


def write(imported: Imported, url: str) -> str:
    """Writes the model as an export to the folder `url`, which must be new or empty; its URL."""
    with new_folder(url) as place:
        name = place.rstrip("/").rpartition("/")[2]
        write_export(
            place, name, imported.model, imported.config, _lineage(imported, name, ""), imported.scores
        )
        load_directory(place)
    return storage.normalize(url)


def register(imported: Imported, name: str, store: str, tracking_uri: str) -> Registration:
    """Registers the model as a version of `name`, with what was measured of it."""
    run_name = f"import-{check_name(name)}"
    origin = {"imported.from": imported.source, "imported.sha256": imported.sha256}
    description = described(
        # The same import is the same run.
        hashlib.sha256(f"{imported.sha256}/{name}/{imported.data_hash}".encode()).hexdigest()[:32],
        EXPERIMENT,
        run_name,
        config_file.leaves(config_file.without_secrets(imported.config)),
        {
            **origin,
            "data.hash": imported.data_hash,
            "data.root": storage.shown(imported.config.data.root),
            "code.version": code_version(),
        },
    )
    run_id = adopt(tracking_uri, description, imported.scores, imported.images_seen)
    lineage = _lineage(imported, run_name, run_id)
    manifest = export(store, name, imported.model, imported.config, lineage, imported.scores)
    registry = Registry(tracking_uri)
    registration = registry.register(manifest.url, name)
    registry.note(registration.version, origin)
    return registration


def _lineage(imported: Imported, run_name: str, run_id: str) -> Lineage:
    return Lineage(
        run_name,
        run_id,
        imported.images_seen,
        imported.data_hash,
        code_version(),
        parent=imported.source,
    )


# --- the file ---------------------------------------------------------------------------------


@contextmanager
def _on_disk(source: str) -> Iterator[Path]:
    """The file itself, or a copy of it in a folder of this user alone."""
    place = storage.normalize(source)
    if storage.is_local(place):
        yield Path(place)
        return
    size = storage.size(place)
    if size > MOST_BYTES:
        raise UntrustedError(f"{storage.shown(source)}: has {size:,} bytes, more than any published model.")
    private = PrivateFolder(PREFIX)
    try:
        path = private.path / "checkpoint.pt"
        with path.open("xb") as file:
            for start in range(0, size, _PART_BYTES):
                file.write(storage.read_bytes(place, start, min(start + _PART_BYTES, size)))
        yield path
    finally:
        private.leave(keep=False)


# --- the model --------------------------------------------------------------------------------


def _built(received: Received, source: str) -> NVAE:
    for name, value in received.weights.items():
        if not value.isfinite().all():
            raise UntrustedError(
                f"{storage.shown(source)}: its weight {name} is not finite; the training had diverged, or "
                "the file is damaged. Take an earlier checkpoint."
            )
    try:
        # Singular vectors are not in the file; drawn alike each time, the same import is the same model.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_published(received.arguments, received.weights).eval()
    except PublishedCheckpointError as error:
        raise UntrustedError(f"{storage.shown(source)}: {error}") from error


def _with_config(model: NVAE, config: NVAEConfig) -> NVAE:
    """The same weights, used in another way: without the published peculiarities."""
    with torch.random.fork_rng(devices=[]):
        changed = NVAE(config)
    trained = {name: torch.tensor(True) for name in changed.state_dict() if name.endswith(".initialized")}
    changed.load_state_dict(model.state_dict() | trained)
    return changed.eval()


def _to_use(model: NVAE) -> NVAE:
    """A model to compute with: published cells of res_elu are changed by the first batch that they see."""
    return copy.deepcopy(model) if model.config.cell_family == "res_elu" else model


# --- what it computes -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Portraits:
    """A batch for a model without a data set."""

    images: Tensor
    positions: Tensor
    weights: Tensor


def _checked(model: NVAE, config: RunConfig, index: Index | None, source: str) -> tuple[float, str]:
    """Bits/dim of a few images, and which; raises UntrustedError if it is not finite."""
    if index is None:
        what = f"{CHECKED_IMAGES} drawn portraits, on which it was not trained"
        scores = evaluate(model, config, [_portraits(config.model)], LocalWorker())
    else:
        what = f"the first {CHECKED_IMAGES} validation images"
        batches = evaluation_batches(
            config, index, rank=0, world_size=1, limit=CHECKED_IMAGES, batch_size=CHECKED_IMAGES
        )
        with closing(batches):
            scores = evaluate(model, config, batches, LocalWorker())
    bits = scores["validation/bits_per_dim"]
    if not np.isfinite(bits):
        raise UntrustedError(
            f"{storage.shown(source)}: its model computes {bits} bits/dim on {what}. The training had "
            "diverged, or the file is damaged; take an earlier checkpoint."
        )
    return bits, what


def _portraits(config: NVAEConfig) -> _Portraits:
    border = config.border_pixels
    size = config.image_size - 2 * border
    pixels = np.stack([portrait(number, size).transpose(2, 0, 1) for number in range(CHECKED_IMAGES)])
    if config.image_channels == 1:
        pixels = pixels.mean(axis=1, keepdims=True).astype(np.uint8)
    if config.likelihood == "bernoulli":
        pixels = (pixels > 127).astype(np.uint8)
    images = np.pad(pixels, ((0, 0), (0, 0), (border, border), (border, border)))
    count = torch.arange(CHECKED_IMAGES)
    return _Portraits(torch.from_numpy(images), count, torch.ones(CHECKED_IMAGES))


def _measured(
    model: NVAE, config: RunConfig, index: Index, worker: LocalWorker, draws: int, batch_size: int
) -> dict[str, float]:
    """Scores on the whole validation split."""
    batches = evaluation_batches(config, index, rank=0, world_size=1, batch_size=batch_size)
    with closing(batches):
        return evaluate(model, config, _told(batches, index.num_samples(VALIDATION)), worker, draws)


def _told(batches: Generator[Batch, None, None], count: int) -> Iterator[Batch]:
    """The batches, with a line every few seconds."""
    said, seen = time.monotonic(), 0
    for batch in batches:
        yield batch
        seen += len(batch.images)
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            progress.say(f"Evaluated {seen:,} of {count:,} images")


def facts(imported: Imported) -> dict[str, Any]:
    """What the user will want to know of an import."""
    return {
        **imported.scores,
        "checked_bits_per_dim": imported.checked_bits_per_dim,
        "checked_on": imported.checked_on,
        "images_seen": imported.images_seen,
        "sha256": imported.sha256,
        "opened_within": list(imported.layers),
        "not_kept": list(imported.left_out),
    }
