"""The part of `nvae evaluate --inception` that each worker executes: samples and images to features.

Samples are numbered, and image number i of a seed is one picture; images of the data set have places in its
split. Both are cut into pieces as the evaluation's images are (sharded_evaluation.py), so the same
batches go through the networks however many workers there are. The features of the data set are kept in
the store: another model of the same data set does not need them anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.pixels import crop_border
from pipeline import storage
from pipeline.artifacts import (
    ArtifactError,
    read_manifest,
    read_verified,
    tensors_from_bytes,
    tensors_to_bytes,
    write_directory,
)
from pipeline.data.index import Index
from pipeline.data.loader import evaluation_batches
from pipeline.models.evaluation import EvaluationError
from pipeline.models.export import LoadedModel
from pipeline.models.inception import Inception, load_inception
from pipeline.models.sample_quality import (
    NEIGHBOURS,
    Features,
    frechet_distance,
    precision_and_recall,
)
from pipeline.models.sampling import Drawing, samples
from pipeline.training.worker import Worker

PIECE_IMAGES = 64
MOST_KEPT = 10_000
"""Images of either side that precision and recall compare: their cost grows with the square."""
FEWEST = NEIGHBOURS + 1
_OF_PAPERS = 50_000
_FORMAT, _FORMAT_VERSION, _FILE = "nvae-features", 1, "features.safetensors"


def measure(
    loaded: LoadedModel, index: Index, arguments: Mapping[str, Any], worker: Worker
) -> dict[str, Any] | None:
    """The figures of the samples of a model beside images of its data set; None if asked to stop.

    `arguments`: `inception`, the folder of its weights, and the `inception_manifest` that must be its;
    `inception_sha256` of the file that the user named; `count`, how many samples, and at most how many
    images; `reference`, the split; `temperature`, `pixels`, `seed`, `batch_size`; `features`, the folder
    of features that are kept. Every rank must call it; all get the same. Raises EvaluationError if there
    are too few images.
    """
    network = load_inception(arguments["inception"], arguments["inception_manifest"]).to(worker.device)
    count, reference = arguments["count"], arguments["reference"]
    reference_count = min(index.num_samples(reference), count)
    if reference_count < FEWEST:
        raise EvaluationError(
            f"{storage.shown(index.root)}: the {reference} split has {reference_count} images; FID, "
            f"precision and recall need {FEWEST} or more."
        )
    images = _of_images(network, loaded, index, reference_count, arguments, worker)
    if images is None:
        return None
    drawn = _collected(network, _sample_share(loaded, arguments), count, "samples", worker)
    if drawn is None:
        return None
    precision, recall = precision_and_recall(images.kept, drawn.kept)
    return {
        "fid": frechet_distance(images.moments(), drawn.moments()),
        "precision": precision,
        "recall": recall,
        "samples": drawn.images,
        "temperature": arguments["temperature"],
        "pixels": arguments["pixels"],
        "seed": arguments["seed"],
        "data_hash": index.content_hash,
        "reference": reference,
        "reference_images": images.images,
        "precision_recall_images": [len(images.kept), len(drawn.kept)],
        "neighbours": NEIGHBOURS,
        "inception_sha256": arguments["inception_sha256"],
        "comparable": _comparable(drawn.images, images.images),
    }


def _comparable(samples: int, images: int) -> str:
    few = " FID falls as samples are added: papers take 50,000." if samples < _OF_PAPERS else ""
    return (
        f"with figures of {samples:,} samples at the same temperature beside the same {images:,} images, "
        f"by the same Inception weights.{few}"
    )


def _of_images(
    network: Inception,
    loaded: LoadedModel,
    index: Index,
    count: int,
    arguments: Mapping[str, Any],
    worker: Worker,
) -> Features | None:
    """The features of the data set: those that are kept, or new ones, which are kept then."""
    model = loaded.config.model
    of = {
        "data_hash": index.content_hash,
        "split": arguments["reference"],
        "images": count,
        "model": [model.image_size, model.image_channels, model.border_pixels, model.likelihood],
        "inception_sha256": arguments["inception_sha256"],
    }
    name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    url = storage.join(arguments["features"], name)
    images = _kept(url, network, count, worker)
    if images is None:
        share = _image_share(loaded, index, arguments["reference"], count, arguments["batch_size"])
        images = _collected(network, share, count, "images", worker)
        if images is not None:
            _keep(url, images, of, worker)
    return images


Share = Callable[[int, int, int], Iterator[tuple[Tensor, Tensor]]]
"""Pictures (B, C, H, W) in [0, 1] and their numbers (B,) of one piece: (piece, pieces, count)."""


def _collected(network: Inception, share: Share, count: int, what: str, worker: Worker) -> Features | None:
    """The features of all `count` pictures, from all ranks; None if they were asked to stop."""
    features = Features(network.features, min(count, MOST_KEPT), worker.device)
    pieces = -(-count // PIECE_IMAGES)
    for first in range(0, pieces, worker.world_size):
        if worker.stop_requested():
            return None
        if first and first % (16 * worker.world_size) == 0:
            worker.say(f"Features of {first * count // pieces:,} of {count:,} {what}")
        piece = first + worker.rank
        if piece < pieces:
            for pictures, numbers in share(piece, pieces, count):
                features.add(_features(network, pictures.to(worker.device)), numbers.to(worker.device))
    return features.merged(worker)


@torch.no_grad()
def _features(network: Inception, pictures: Tensor) -> Tensor:
    # The figures of papers were made in full precision.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return network(pictures)  # type: ignore[no-any-return]


def _image_share(loaded: LoadedModel, index: Index, split: str, limit: int, batch_size: int) -> Share:
    def share(piece: int, pieces: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = evaluation_batches(
            loaded.config,
            index,
            rank=piece,
            world_size=pieces,
            split=split,
            limit=limit,
            batch_size=batch_size,
        )
        with closing(batches):
            for batch in batches:
                kept = batch.weights > 0
                yield _unit(batch.images[kept], loaded.config.model), batch.positions[kept]

    return share


def _unit(stored: Tensor, config: NVAEConfig) -> Tensor:
    """Images of the data set as they are stored, with all their bits, in [0, 1] without the border."""
    highest = 1 if config.likelihood == "bernoulli" else 255
    return crop_border(stored.float() / highest, config.border_pixels)


def _sample_share(loaded: LoadedModel, arguments: Mapping[str, Any]) -> Share:
    drawing = Drawing(arguments["temperature"], arguments["seed"], arguments["pixels"])

    def share(piece: int, pieces: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = range(piece * count // pieces, (piece + 1) * count // pieces)
        for batch, pictures in samples(loaded.model, numbers, drawing, arguments["batch_size"]):
            yield torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.tensor(list(batch))

    return share


# -- features of the data set that are kept -------------------------------------------------------


def _kept(url: str, network: Inception, count: int, worker: Worker) -> Features | None:
    """The features in the folder `url`, which rank 0 reads and tells the others; None if there are none."""
    features = Features(network.features, min(count, MOST_KEPT), worker.device)
    found = torch.zeros(1, device=worker.device)
    if worker.rank == 0 and _read(url, features):
        found += 1
    if not worker.all_reduce(found).item():
        return None
    return features.merged(worker)


def _read(url: str, features: Features) -> bool:
    try:
        manifest = read_manifest(url, format=_FORMAT, version=_FORMAT_VERSION)
        tensors = tensors_from_bytes(read_verified(manifest, _FILE), url)
    except ArtifactError:
        return False
    parts = features.tensors()
    if tensors.keys() != parts.keys() or any(tensors[name].shape != parts[name].shape for name in parts):
        return False
    for name, part in parts.items():
        part.copy_(tensors[name])
    return True


def _keep(url: str, features: Features, of: Mapping[str, Any], worker: Worker) -> None:
    if worker.rank == 0:
        data = tensors_to_bytes({name: part.cpu() for name, part in features.tensors().items()})
        write_directory(url, [(_FILE, data)], format=_FORMAT, version=_FORMAT_VERSION, fields=of)
