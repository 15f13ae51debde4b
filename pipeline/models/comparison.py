"""Two versions beside each other: settings that differ, metrics, KL per group, what they draw.

Metrics compare only if they are of the same data and of as many bits; where they are not, the
comparison says so before it shows them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.figures import Panel, columns
from pipeline.models.report import beside, command, facts, note, page, paragraph, picture, section, table
from pipeline.models.versions import Version

_KL = "validation/kl_nats/group_"
_LACKING = "-"


@dataclass(frozen=True)
class Difference:
    """One name and its values in both versions; None where a version does not have it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Comparison:
    """What distinguishes two versions."""

    first: Version
    second: Version
    warnings: tuple[str, ...]
    """Why figures of the two cannot be compared."""
    identity: tuple[Difference, ...]
    """Data, code, run and the like, whether they differ or not."""
    settings: tuple[Difference, ...]
    """Those that differ."""
    metrics: tuple[Difference, ...]
    """All that either has, but those of single groups."""
    kl_per_group: tuple[Difference, ...]
    """Nats per image, the coarsest group first."""


def compare(first: Version, second: Version) -> Comparison:
    metrics = [
        Difference(name, first.metrics.get(name), second.metrics.get(name))
        for name in sorted({*first.metrics, *second.metrics})
    ]
    return Comparison(
        first,
        second,
        tuple(_warnings(first, second)),
        tuple(_identity(first, second)),
        tuple(
            Difference(name, first.settings.get(name), second.settings.get(name))
            for name in sorted({*first.settings, *second.settings})
            if first.settings.get(name) != second.settings.get(name)
        ),
        (
            *(each for each in metrics if "/group_" not in each.name),
            *_evaluated(first, second),
            *_sampled(first, second),
        ),
        tuple(each for each in metrics if each.name.startswith(_KL)),
    )


def _identity(first: Version, second: Version) -> Iterator[Difference]:
    for name in (
        "aliases",
        "created",
        "run_name",
        "run_ended",
        "trial",
        "parent",
        "images_seen",
        "world_size",
        "data_root",
        "data_hash",
        "code_version",
    ):
        values = [getattr(version, name) for version in (first, second)]
        values = [", ".join(value) if isinstance(value, tuple) else value for value in values]
        yield Difference(name, *(None if value == "" else value for value in values))


def _warnings(first: Version, second: Version) -> Iterator[str]:
    if first.data_hash != second.data_hash:
        yield "They were evaluated on different data sets: their metrics cannot be compared."
    for setting, what in [
        ("model.pixel_bits", "of different bits per colour value"),
        ("model.likelihood", "with different likelihoods"),
        ("model.image_size", "of different sizes"),
    ]:
        if first.settings.get(setting) != second.settings.get(setting):
            yield f"They are models {what} ({setting}): their bits/dim cannot be compared."


def _evaluated(first: Version, second: Version) -> Iterator[Difference]:
    """What `nvae evaluate` found of both in the same way: data, images, draws and seed."""
    for one in first.evaluations:
        for other in second.evaluations:
            if (one.data_hash, one.images, one.draws, one.seed) != (
                other.data_hash,
                other.images,
                other.draws,
                other.seed,
            ):
                continue
            for name in sorted({*one.metrics, *other.metrics}):
                if "/group_" not in name:
                    told = name.replace("validation/", f"evaluation of {one.images:,}, K = {one.draws}/", 1)
                    yield Difference(told, one.metrics.get(name), other.metrics.get(name))


def _sampled(first: Version, second: Version) -> Iterator[Difference]:
    """FID, precision and recall that were measured of both under the same conditions."""
    for one in first.sample_quality:
        for other in second.sample_quality:
            if (one.conditions, one.seed) == (other.conditions, other.seed):
                temperature = ", ".join(f"{each:g}" for each in one.temperature)
                of = f"{one.samples:,} samples at temperature {temperature}"
                for name in ("fid", "precision", "recall"):
                    yield Difference(f"{name} of {of}", getattr(one, name), getattr(other, name))


def written(value: Any) -> str:
    """A value as a table has it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _LACKING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def change(difference: Difference) -> str:
    """Second minus first, of numbers."""
    values = (difference.first, difference.second)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return ""
    return f"{difference.second - difference.first:+.4g}"


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The whole as rows of a table: part, name, first, second, change."""
    for part in ("identity", "settings", "metrics", "kl_per_group"):
        for each in getattr(comparison, part):
            yield {
                "part": part,
                "name": each.name,
                "first": written(each.first),
                "second": written(each.second),
                "change": change(each) if part in ("metrics", "kl_per_group") else "",
            }


def write_page(comparison: Comparison, samples: Mapping[str, bytes | str]) -> bytes:
    """The comparison as one page of HTML.

    `samples` has a PNG by the reference of each version, or why there is none.
    """
    first, second = comparison.first, comparison.second
    heading = ("", first.ref, second.ref)

    def both(differences: tuple[Difference, ...], *, numbers: bool = False) -> Any:
        lines = [
            (each.name, written(each.first), written(each.second), *([change(each)] if numbers else []))
            for each in differences
        ]
        return table(
            (*heading, *(["change"] if numbers else [])), lines, numbers=(1, 2, 3) if numbers else ()
        )

    pictures = [
        note(drawn) if isinstance(drawn, str) else picture(drawn, f"Samples of {ref}", ref)
        for ref, drawn in samples.items()
    ]
    parts = [
        *(paragraph(warning) for warning in comparison.warnings),
        section("What they are", both(comparison.identity)),
        section(
            "Settings that differ",
            both(comparison.settings) if comparison.settings else note("None: all settings are equal."),
        ),
        section("Metrics", both(comparison.metrics, numbers=True)),
        section("KL per group", *_kl_figures(comparison)),
        section("Samples", beside(*pictures)),
        section("Files", *(_files(version) for version in (first, second))),
        section("Again", command(f"nvae registry compare {first.ref} {second.ref}")),
    ]
    return page(f"{first.ref} and {second.ref}", *parts)


def _files(version: Version) -> Any:
    return facts({"model": version.ref, "folder": version.url, **version.files})


def _kl_figures(comparison: Comparison) -> Iterator[Any]:
    panels = []
    for version in (comparison.first, comparison.second):
        names = sorted(name for name in version.metrics if name.startswith(_KL))
        values = [value if math.isfinite(value := version.metrics[name]) else 0.0 for name in names]
        if values:
            panels.append(Panel(version.ref, values, _stretches(version, len(values))))
    if not panels:
        yield note("Neither has figures of its groups.")
        return
    caption = "KL of each group's posterior from its prior, on the validation split; coarsest first."
    yield columns("kl-per-group", panels, "nats per image", "group", caption)


def _stretches(version: Version, groups: int) -> list[tuple[str, int]]:
    """The scales' names and how many groups each has, if the settings tell."""
    per_scale: Any = version.settings.get("model.groups_per_scale")
    size: Any = version.settings.get("model.image_size")
    blocks: Any = version.settings.get("model.preprocess_blocks")
    if not isinstance(per_scale, list) or not isinstance(size, int) or not isinstance(blocks, int):
        return [("", groups)]
    if sum(per_scale) != groups:
        return [("", groups)]
    coarsest = (size >> blocks) >> (len(per_scale) - 1)
    return [(f"{coarsest << scale}x{coarsest << scale}", count) for scale, count in enumerate(per_scale)]
