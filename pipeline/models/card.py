"""A model's card: what it is, what it was trained on, how good it is, how to use it.

It is one of the files of an export, so its hash stands in the manifest, and the description of
the version in MLflow. Names and notes that users or data sets brought along are shown as code,
on one line, so that none of them can become a link, a heading or HTML where the card is rendered.
"""

import math
import re
from collections.abc import Iterator, Mapping

from nvae.config import NVAEConfig
from pipeline.config import RunConfig
from pipeline.models.assessment import comparable
from pipeline.models.lineage import Lineage

MAX_CHARACTERS = 5000
"""What MLflow's databases hold of a description."""
_LONGEST_NOTE = 300
_SHOWN = {
    "validation/nelbo_nats": "NELBO, nats per image",
    "validation/bits_per_dim": "bits/dim",
    "validation/importance_weighted_nats": "importance-weighted -log p(x), nats per image",
    "validation/importance_weighted_bits_per_dim": "importance-weighted bits/dim",
    "validation/reconstruction_nats": "reconstruction, nats per image",
    "validation/kl_nats": "KL, nats per image",
    "validation/active_channels": "latent channels in use",
}


def write_card(
    name: str, config: RunConfig, lineage: Lineage, metrics: Mapping[str, float], data_root: str
) -> str:
    """The card in Markdown, at most MAX_CHARACTERS of it.

    `metrics` are those of the end of the training; `data_root` is the place of the data without secrets.
    """
    sections = [
        [f"# {name}", "", _what(config.model)],
        ["## Data", "", *_data(lineage, data_root)],
        ["## Metrics", "", *_metrics(config, metrics)],
        ["## Use", "", *_use(name, config)],
        ["## Lineage", "", *_lineage(lineage)],
        ["## Limits", "", _LIMITS],
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections) + "\n"
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 2] + "…\n"


_LIMITS = (
    "The model draws what its data shows, with all that the data lacks or shows too often, and may resemble "
    "single images of it; what the licence of the data forbids, these samples may not be used for either. "
    "Its figures are of one data set's validation split; they say nothing of other images."
)


def _what(model: NVAEConfig) -> str:
    colours = "RGB" if model.image_channels == 3 else "grey"
    visible = model.image_size - 2 * model.border_pixels
    per_scale = ", ".join(
        f"{groups} of {size}x{size}"
        for groups, size in zip(
            model.groups_per_scale, sorted({shape[1] for shape in model.latent_shapes}), strict=True
        )
    )
    likelihood = model.likelihood.replace("_", " ")
    return (
        f"An NVAE (Vahdat & Kautz, NeurIPS 2020) of {visible}x{visible} {colours} images, "
        f"{model.pixel_bits} bits per colour value, with a {likelihood} likelihood. It has "
        f"{model.num_groups} groups of {model.latent_channels} latent channels, coarsest first: {per_scale}."
    )


def _data(lineage: Lineage, data_root: str) -> Iterator[str]:
    yield f"- Data set: {_code(data_root)}, content hash {_code(lineage.data_hash)}"
    if lineage.data_licence:
        yield f"- Licence of the images: {_code(lineage.data_licence)}"
    else:
        yield (
            "- Licence of the images: no note was kept with the data set. Find out before you share the "
            "model or what it draws."
        )


def _metrics(config: RunConfig, metrics: Mapping[str, float]) -> Iterator[str]:
    images = metrics.get("validation/images")
    if images is None:
        yield "Nothing was measured when it was exported; `nvae evaluate` does."
        return
    draws = config.evaluation.importance_samples
    corrupt = int(metrics.get("validation/corrupt_images", 0))
    yield (
        f"Means over {int(images):,} images of the validation split"
        + (f", beside {corrupt:,} that could not be read" if corrupt else "")
        + f", {draws} draw{'s' if draws > 1 else ''} per image."
    )
    yield from ("", "| metric | value |", "|---|---|")
    for metric, title in _SHOWN.items():
        if metric in metrics:
            counted = metric.endswith("active_channels")
            yield f"| {title} | {f'{metrics[metric]:,.0f}' if counted else _figure(metrics[metric])} |"
    yield from ("", comparable(config.model, draws))


def _use(name: str, config: RunConfig) -> list[str]:
    temperature = f"{config.sampling.temperature:g}"
    return [
        "```sh",
        f"nvae sample models:/{name}@best samples.png --count 36 --temperature {temperature}",
        f"nvae evaluate models:/{name}@best --samples 100",
        "```",
        "",
        "```python",
        "from pipeline.registry import load",
        f'model = load("models:/{name}@best").model  # a torch module, every file verified',
        "```",
    ]


def _lineage(lineage: Lineage) -> Iterator[str]:
    width = (
        "" if lineage.world_size is None else f", {lineage.world_size} worker{'s' * (lineage.world_size > 1)}"
    )
    yield f"- Trained by the run {_code(lineage.run_name)} to {lineage.images_seen:,} images{width}"
    if lineage.diverged:
        yield "- The run diverged; these weights are of its best checkpoint from before."
    if lineage.trial:
        yield f"- It was the trial {_code(lineage.trial)} of a search."
    if lineage.parent:
        yield f"- It began with the weights of {_code(lineage.parent)}."
    yield f"- Code: {_code(lineage.code_version)}"


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1 else f"{value:,.4f}"


def _code(text: str) -> str:
    """Text of somebody else as inline code: nothing in it has a meaning in Markdown or HTML.

    A quote by backticks ends at a backtick, so it has none; a renderer that ignores quotes finds no tag.
    """
    plain = re.sub(r"\s+", " ", "".join(letter if letter.isprintable() else " " for letter in text)).strip()
    plain = plain.replace("`", "'").replace("<", "(").replace(">", ")")
    if len(plain) > _LONGEST_NOTE:
        plain = plain[: _LONGEST_NOTE - 1] + "…"
    return f"`{plain}`" if plain else "(empty)"
