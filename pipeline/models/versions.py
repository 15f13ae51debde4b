"""A registered version in plain values: what its tags say, and which of two is the better.

A version's tags are its identity: where the weights lie, the hash of the weights and of the
manifest that vouches for every file, the data set's content hash, the metrics under their own
names. Nothing here asks MLflow, so the rules can be read and tested alone.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.artifacts import Manifest

CRITERION = "validation/bits_per_dim"
_METRIC_PREFIX = "validation/"


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

    @property
    def ref(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def score(self) -> float:
        """Validation bits/dim; NaN if it was not measured."""
        return self.metrics.get(CRITERION, math.nan)


def version_tags(manifest: Manifest, weights: str) -> dict[str, str]:
    """The tags of a version with this export's manifest; `weights` is the file of its weights."""
    fields = manifest.fields
    metrics = {name: math.nan if value is None else value for name, value in fields["metrics"].items()}
    return {
        "weights.url": manifest.url,
        "weights.sha256": manifest.files[weights].sha256,
        "manifest.sha256": manifest.sha256,
        "run.name": fields["run_name"],
        "images_seen": str(fields["images_seen"]),
        "data.hash": fields["data_hash"],
        "data.root": fields["data_root"],
        "code.version": fields["code_version"],
        "parent": fields["parent"] or "",
        "run.diverged": json.dumps(fields.get("diverged", False)),
        **{name: repr(float(value)) for name, value in metrics.items() if name.startswith(_METRIC_PREFIX)},
    }


_NEEDED = ("weights.url", "weights.sha256", "manifest.sha256", "images_seen", "data.hash")


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether a version with these tags was registered by this project."""
    return all(tags.get(name) for name in _NEEDED) and tags["images_seen"].isdecimal()


def parse_version(
    *, name: str, version: str, created: str, run_id: str, tags: Mapping[str, str], aliases: Mapping[str, str]
) -> Version:
    """A version from its tags, which must be ours, and from the model's aliases -> versions."""
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
        metrics={key: _number(value) for key, value in tags.items() if key.startswith(_METRIC_PREFIX)},
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
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
