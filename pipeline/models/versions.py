"""A registered version in plain values: what its tags say, and which of two is the better.

A version's tags are its identity: where the weights lie, the hash of the weights and of the
manifest that vouches for every file, the data set's content hash, the metrics under their own
names (those of single groups together), the resolved configuration as one JSON object. Versions of
earlier releases lack some tags; what a version does not say of itself is empty here. Nothing here
asks MLflow or loads torch, so the rules can be read and tested alone, and ten thousand versions be
listed before either is imported.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.models.evaluation_record import Evaluation, evaluations
from pipeline.models.quality_record import SampleQuality, sample_qualities

if TYPE_CHECKING:
    from pipeline.artifacts import Manifest

CRITERION = "validation/bits_per_dim"
_METRIC_PREFIX = "validation/"
_GROUPS = "validation"
"""The tag of the metrics of single latent groups, a JSON object: MLflow lists ten thousand versions at
the pace of their tags, and these would be three of four."""


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created: str
    """ISO 8601, UTC."""
    run_id: str
    """MLflow run that trained it."""
    run_name: str
    url: str
    """Folder of the export."""
    weights_sha256: str
    manifest_sha256: str
    images_seen: int
    data_hash: str
    data_root: str
    code_version: str
    parent: str
    """Model whose weights the run began with; empty without one."""
    run_ended: str
    """How the run ended that trained it: "finished" or "diverged", for good and despite all rollbacks.
    The weights themselves are of a checkpoint from before."""
    metrics: Mapping[str, float]
    """What was measured at the end of the training, on `validation/images` images."""
    data_licence: str = ""
    """The note on the images' licence that is kept with the data set."""
    trial: str = ""
    """SEARCH/NUMBER of the trial that was this training; empty if it was none."""
    world_size: int | None = None
    """Workers of the launch that ended the training."""
    ray_job: str = ""
    """Ray's job of that launch; `local` without Ray."""
    journal: str = ""
    """Where every point of the run's curves lies, with MLflow or without."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration by dotted paths."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every file of the export, by its name."""
    evaluations: tuple[Evaluation, ...] = ()
    """What `nvae evaluate` recorded: most images first, then most draws."""
    sample_quality: tuple[SampleQuality, ...] = ()
    """FID, precision and recall that it recorded: of most samples first."""

    @property
    def ref(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def score(self) -> float:
        """Validation bits/dim; NaN if it was not measured."""
        return self.metrics.get(CRITERION, math.nan)


def version_tags(manifest: "Manifest", weights: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version with this export's manifest.

    `weights` is the file of its weights, `settings` its configuration by dotted paths.
    """
    fields = manifest.fields
    metrics = {name: value for name, value in fields["metrics"].items() if name.startswith(_METRIC_PREFIX)}
    of_groups = {name: value for name, value in metrics.items() if "/group_" in name}
    tags = {
        "weights.url": manifest.url,
        "weights.sha256": manifest.files[weights].sha256,
        "manifest.sha256": manifest.sha256,
        "files": json.dumps({name: entry.sha256 for name, entry in manifest.files.items()}),
        "settings": json.dumps(dict(settings)),
        "run.name": fields["run_name"],
        "run.diverged": json.dumps(fields.get("diverged", False)),
        "run.journal": fields.get("journal"),
        "run.trial": fields.get("trial"),
        "run.world_size": fields.get("world_size"),
        "run.ray_job": fields.get("ray_job"),
        "images_seen": fields["images_seen"],
        "data.hash": fields["data_hash"],
        "data.root": fields["data_root"],
        "data.licence": fields.get("data_licence"),
        "code.version": fields["code_version"],
        "parent": fields["parent"],
        _GROUPS: json.dumps(of_groups) if of_groups else None,
        **{name: repr(_finite(value)) for name, value in metrics.items() if name not in of_groups},
    }
    return {name: str(value) for name, value in tags.items() if value not in (None, "")}


def _finite(value: float | None) -> float:
    """JSON knows no NaN: the manifest has null for it."""
    return math.nan if value is None else float(value)


_NEEDED = ("weights.url", "weights.sha256", "manifest.sha256", "images_seen", "data.hash")


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether a version with these tags was registered by this project."""
    return all(map(tags.get, _NEEDED)) and tags["images_seen"].isdecimal()


def parse_version(
    *, name: str, version: str, created: str, run_id: str, tags: Mapping[str, str], aliases: Mapping[str, str]
) -> Version:
    """A version from its tags, which must be ours, and from the model's aliases -> versions."""
    world_size = tags.get("run.world_size", "")[:9]
    # Ten thousand versions are parsed for each lookup: their tags are looked through once.
    parts: dict[str, dict[str, str]] = {"validation": {}, "evaluation": {}, "sample_quality": {}}
    for tag, text in tags.items():
        kind, slash, _ = tag.partition("/")
        if slash and kind in parts:
            parts[kind][tag] = text
    return Version(
        name=name,
        version=version,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == version)),
        created=created,
        run_id=run_id,
        run_name=tags.get("run.name", ""),
        url=tags["weights.url"],
        weights_sha256=tags["weights.sha256"],
        manifest_sha256=tags["manifest.sha256"],
        images_seen=int(tags["images_seen"]),
        data_hash=tags["data.hash"],
        data_root=tags.get("data.root", ""),
        code_version=tags.get("code.version", ""),
        parent=tags.get("parent", ""),
        run_ended="diverged" if tags.get("run.diverged") == "true" else "finished",
        metrics=_Parsed(
            tags.get(_GROUPS, ""),
            {name: _number(text) for name, text in parts["validation"].items()},
            prefix=_METRIC_PREFIX,
        ),
        data_licence=tags.get("data.licence", ""),
        trial=tags.get("run.trial", ""),
        world_size=int(world_size) if world_size.isdecimal() else None,
        ray_job=tags.get("run.ray_job", ""),
        journal=tags.get("run.journal", ""),
        settings=_Parsed(tags.get("settings", "")),
        files=_Parsed(tags.get("files", "")),
        evaluations=evaluations(parts["evaluation"]),
        sample_quality=sample_qualities(parts["sample_quality"]),
    )


def when(milliseconds: int) -> str:
    """A moment of MLflow's clock as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


class _Parsed(Mapping[str, Any]):
    """The JSON object in a tag, with `plain` over it; parsed when it is first needed.

    Of ten thousand versions that are listed, few are asked for their settings. Tags can be edited by
    anybody: a text that is no object is an empty one.
    """

    def __init__(self, text: str, plain: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        """`prefix`: names that begin otherwise are left out, and values are numbers."""
        self._text, self._plain, self._prefix = text, plain or {}, prefix

    @cached_property
    def _whole(self) -> dict[str, Any]:
        try:
            found = json.loads(self._text) if self._text else {}
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict):
            found = {}
        if self._prefix:
            found = {name: _number(value) for name, value in found.items() if name.startswith(self._prefix)}
        return {**self._plain, **found}

    def __getitem__(self, name: str) -> Any:
        return self._plain[name] if name in self._plain else self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def __repr__(self) -> str:
        return repr(self._whole)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        # Tags can be edited by anybody; what is no number has not been measured.
        return math.nan


def judge(candidate: Version, holder: Version | None) -> tuple[bool, str]:
    """Whether `candidate` may take the alias `best` from its holder, and why (not)."""
    if not math.isfinite(candidate.score):
        return False, f"its {CRITERION} is missing or not finite"
    if holder is None:
        return True, f"there was none before; its {CRITERION} is {candidate.score:.4f}"
    if holder.version == candidate.version:
        return True, f"it was before; its {CRITERION} is {candidate.score:.4f}"
    if not math.isfinite(holder.score):
        return True, f"version {holder.version}, which was before, has no finite {CRITERION}"
    if holder.data_hash != candidate.data_hash:
        return False, (
            f"version {holder.version}, which is, was evaluated on another data set "
            f"({holder.data_hash[:12]}, not {candidate.data_hash[:12]}): their {CRITERION} cannot be compared"
        )
    if candidate.score < holder.score:
        return True, (
            f"{CRITERION} fell from {holder.score:.4f} (version {holder.version}) to {candidate.score:.4f}"
        )
    return False, (
        f"its {CRITERION} {candidate.score:.4f} is not below the {holder.score:.4f} of version "
        f"{holder.version}"
    )


def best_of(versions: Iterable[Version]) -> Version | None:
    """The version with the lowest finite score, the earliest of equals; None without one."""
    finite = [version for version in versions if math.isfinite(version.score)]
    return min(finite, key=lambda version: (version.score, int(version.version)), default=None)
