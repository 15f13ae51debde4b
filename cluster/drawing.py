"""What the drawing commands do: a model is found, pictures are made, one file or folder is written.

Every output is checked for being writable before a model is loaded, which may take minutes.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.models import tracking_uri
from nvae.model import NVAE
from pipeline import storage
from pipeline.data.given import image_files, load_images
from pipeline.errors import InputError
from pipeline.models import sample_folder, sampling, walks
from pipeline.models.export import EMA_WEIGHTS, WEIGHTS, LoadedModel
from pipeline.models.registry import load
from pipeline.models.sampling import Drawing, Images
from pipeline.progress import track
from pipeline.training.worker import LocalWorker

STRIP_STEPS, ANIMATION_STEPS = 10, 30

_SEED = re.compile(r"seed:(?P<seed>[0-9]{1,18})(?:/(?P<index>[0-9]{1,9}))?")


class OutputError(InputError):
    """A file that cannot be written where the user wants it."""


class SubjectError(InputError):
    """Something to be varied that is neither an image file nor a seed."""


def sample(
    model: str,
    output: Path,
    count: int,
    temperature: tuple[float, ...],
    seed: int,
    batch_size: int,
    pixels: Literal["mean", "sample"],
    pixel_temperature: float,
    recalibrate: bool,
    separate: bool,
    store: str | None,
    tracking: str | None,
) -> str:
    """Write prior samples to `output`, a grid or a folder; returns what to tell the user."""
    if separate:
        _check_folder(output)
    else:
        _check_picture(output, (".png",), "; for a folder with one file per image add --separate")
    loaded = load(model, tracking_uri(store, tracking))
    network = _on_device(loaded)
    drawing = Drawing(temperature, seed, pixels, pixel_temperature)
    sampling.per_group(temperature, network.config)
    if separate:
        sample_folder.claim(output, sample_folder.contents(_weights(loaded), drawing, recalibrate))
    note = _recalibrated(network, drawing) if recalibrate else ""
    what = f"{count} images of {model} at temperature {_shown(temperature)}, seed {seed}: {output}"
    if separate:
        kept = _fill(output, network, drawing, count, batch_size)
        return f"{what} ({kept} of them were there already){note}" if kept else f"{what}{note}"
    drawn = list(sampling.samples(network, range(count), drawing, batch_size))
    _write_grid(output, np.concatenate([images for _, images in drawn]))
    return f"{what}{note}"


def _fill(folder: Path, network: NVAE, drawing: Drawing, count: int, batch_size: int) -> int:
    """Draws what is missing of the first `count` images; returns how many were there."""
    size = network.config.image_size - 2 * network.config.border_pixels
    indices = sample_folder.missing(folder, count, size)
    written = sample_folder.fill(folder, network, drawing, indices, batch_size)
    for _ in track(written, "Drawing", total=len(indices)):
        pass
    return count - len(indices)


def _recalibrated(network: NVAE, drawing: Drawing) -> str:
    """Estimates batch norm's statistics anew; what there is to say of it."""
    if sampling.recalibrate_batch_norm(network, drawing.temperature, drawing.seed):
        return "\nBatch norm has the statistics of this temperature."
    return (
        "\nBatch norm's statistics at this temperature were not finite: "
        "the images are drawn with those of the training."
    )


def reconstruct(
    model: str,
    images: Sequence[Path],
    output: Path,
    temperature: tuple[float, ...],
    seed: int,
    batch_size: int,
    store: str | None,
    tracking: str | None,
) -> str:
    """Write pairs of image and reconstruction to `output`; returns what to tell the user."""
    _check_picture(output, (".png",))
    files = image_files(images)
    network = _on_device(load(model, tracking_uri(store, tracking)))
    given = load_images(files, network.config)
    pairs = sampling.reconstruct(network, given, seed, temperature=temperature, batch_size=batch_size)
    # As wide as high, or nearly: twice as many columns as pairs in a row.
    per_row = max(1, round((len(files) / 2) ** 0.5)) if len(files) > 4 else len(files)
    _write_grid(output, pairs, columns=2 * per_row)
    return f"{len(files)} images, each beside its reconstruction by {model}: {output}"


def interpolate(
    model: str,
    start: str,
    end: str,
    output: Path,
    steps: int | None,
    temperature: tuple[float, ...],
    batch_size: int,
    store: str | None,
    tracking: str | None,
) -> str:
    """Write the way from `start` to `end` to `output`; returns what to tell the user."""
    _check_picture(output, (".png", ".gif", ".apng"))
    for subject in (start, end):
        _check_subject(subject)
    network = _on_device(load(model, tracking_uri(store, tracking)))
    ends = [_latents(network, subject, temperature) for subject in (start, end)]
    moving = output.suffix.lower() != ".png"
    count = steps or (ANIMATION_STEPS if moving else STRIP_STEPS)
    images = walks.decoded(network, walks.between(ends[0], ends[1], count), batch_size)
    if moving:
        form: Literal["GIF", "PNG"] = "GIF" if output.suffix.lower() == ".gif" else "PNG"
        storage.write_bytes(str(output), sampling.animation(images, form))
    else:
        _write_grid(output, images, columns=count)
    return f"{count} images from {start} to {end} by {model}: {output}"


def traverse(
    model: str,
    output: Path,
    subject: str,
    columns: int,
    each_group: bool,
    with_finer: bool,
    temperature: tuple[float, ...],
    seed: int,
    batch_size: int,
    store: str | None,
    tracking: str | None,
) -> str:
    """Write a row of variations for each scale or group to `output`; returns what to tell the user."""
    _check_picture(output, (".png",))
    _check_subject(subject)
    network = _on_device(load(model, tracking_uri(store, tracking)))
    kept = _latents(network, subject, temperature)
    original = walks.decoded(network, kept)
    rows = walks.rows_of_groups(network.config, each_group, with_finer)
    images = []
    for groups in rows:
        varied = walks.resampled(network, kept, groups, columns, seed, temperature)
        images += [original, walks.decoded(network, varied, batch_size)]
    _write_grid(output, np.concatenate(images), columns=columns + 1)
    names = _row_names(network, rows)
    return f"{subject} by {model}, drawn anew from the top: {'; '.join(names)}. {output}"


def _row_names(network: NVAE, rows: Sequence[range]) -> list[str]:
    """Which groups, by number from 0, and at which scales, each row draws anew."""
    names = []
    for groups in rows:
        sizes = dict.fromkeys(
            f"{w}x{h}" for _, h, w in network.config.latent_shapes[groups.start : groups.stop]
        )
        numbers = f"group {groups[0]}" if len(groups) == 1 else f"groups {groups[0]} to {groups[-1]}"
        names.append(f"{', '.join(sizes)} ({numbers})")
    return names


def _check_subject(subject: str) -> None:
    if not (_SEED.fullmatch(subject) or Path(subject).is_file()):
        raise SubjectError(
            f"{subject!r} is neither an image file nor a sample. Name a file, or seed:N, or seed:N/I "
            "for image number I of that seed."
        )


def _latents(network: NVAE, subject: str, temperature: tuple[float, ...]) -> walks.Latents:
    """Of one image: an encoded file's, or those that a sample is drawn from."""
    seed = _SEED.fullmatch(subject)
    if seed:
        return walks.drawn(network, int(seed["seed"]), [int(seed["index"] or 0)], temperature)
    return walks.encoded(network, load_images([Path(subject)], network.config))


def _on_device(loaded: LoadedModel) -> NVAE:
    return loaded.model.to(LocalWorker().device)


def _weights(loaded: LoadedModel) -> str:
    files = loaded.manifest.files
    return files[EMA_WEIGHTS if EMA_WEIGHTS in files else WEIGHTS].sha256


def _shown(temperature: tuple[float, ...]) -> str:
    return ",".join(f"{each:g}" for each in temperature)


def _write_grid(output: Path, images: Images, columns: int | None = None) -> None:
    storage.write_bytes(str(output), sampling.png(sampling.grid(images, columns)))


def _check_picture(output: Path, suffixes: tuple[str, ...], otherwise: str = "") -> None:
    """Raises OutputError if `output` cannot be a picture's file of one of these kinds."""
    if output.is_dir():
        raise OutputError(f"{output} cannot be written: it is a directory. Name a file{otherwise}.")
    if output.suffix.lower() not in suffixes:
        raise OutputError(
            f"{output} cannot be written: let its name end in {' or '.join(suffixes)}{otherwise}."
        )
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(
            f"{output} cannot be written: there is no folder {folder}. Make it, or name another."
        )
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise _not_allowed(output)


def _check_folder(output: Path) -> None:
    """Raises OutputError if `output` is no folder and cannot become one."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} cannot be written: it is a file; with --separate name a folder.")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise _not_allowed(output)


def _not_allowed(output: Path) -> OutputError:
    return OutputError(f"{output} cannot be written: you lack the permission. Name another place.")
