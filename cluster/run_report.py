"""What `nvae runs show` prints for people: the state of a run in some twenty lines, most urgent first.

Made of nothing but what `nvae runs show --json` says.
"""

from collections.abc import Mapping
from typing import Any

from pipeline import settings
from pipeline.progress import counted, duration
from pipeline.training.interventions import Kind

_STARTS = 5
"""Starts that are shown; the earlier ones are counted."""

_IN_WORDS = {
    Kind.SKIP: "skipped update",
    Kind.CLIP: "clipping",
    Kind.ROLL_BACK: "rollback",
    Kind.SOFTEN: "softening",
    Kind.GIVE_UP: "end of the run",
}


def report(facts: Mapping[str, Any], with_settings: bool = False) -> dict[str, Any]:
    """A line for each question: what is asked, and the answer. None where nothing is known."""
    # A run of an earlier release lacks what is new.
    settings_shown = {key: facts[key] for key in settings.settings() if with_settings and key in facts}
    numbers = facts["logged"]["numbers"]
    return {
        "run": facts["name"],
        "state": facts["state"] + (f": {facts['reason']}" if facts["reason"] else ""),
        "images": _progress(facts),
        "bits/dim": _listed(
            _worded(numbers, "train/bits_per_dim", "train {:.4f}"),
            _worded(facts, "best_bits_per_dim", "best of an evaluation {:.4f}"),
            _worded(facts, "validation/bits_per_dim", "whole validation split {:.4f}"),
        ),
        "speed": _listed(
            _worded(numbers, "speed/images_per_second", "{:,.1f} images/s"),
            _worded(numbers, "speed/seconds_per_step", "{:.3f} s per step"),
        ),
        "waiting": _listed(
            _worded(numbers, "data/wait_fraction", "{:.1%} for data"),
            _worded(numbers, "speed/communication_fraction", "{:.1%} for communication"),
        ),
        "memory": _listed(
            _worded(numbers, "memory/reserved_gib/max", "{:.1f} GiB of the fullest device"),
            _worded(numbers, "memory/process_gib/max", "{:.1f} GiB of the largest process"),
        ),
        "gradient norm": _worded(numbers, "train/gradient_norm", "{:.4g}"),
        "skipped updates": _listed(
            _worded(numbers, "train/skipped_updates", "{:.0f} in the last interval"),
            f"{facts['interventions'][Kind.SKIP]:,} in all",
        ),
        "active channels": _active(numbers, facts["model.latent_channels"]),
        "against divergence": _interventions(facts["interventions"]),
        "last of that": facts["last_intervention"],
        "checkpoint": _checkpoint(facts),
        "saving": _listed(
            _worded(numbers, "checkpoint/write_seconds", "{:.1f} s in the background"),
            _worded(numbers, "checkpoint/delay_seconds", "{:.2f} s of waiting"),
            _worded(numbers, "checkpoint/failed", "{:.0f} failed"),
            _worded(numbers, "checkpoint/left_out", "{:.0f} left out in the last interval"),
        )
        or None,
        **_starts(facts["launches"]),
        "model": facts.get("model") and facts["verdict"],
        "weights": facts.get("export"),
        "folder": facts["url"],
        "mlflow": facts["mlflow"],
        **settings_shown,
    }


def _progress(facts: Mapping[str, Any]) -> str:
    """`1,600 of 5,600 (29%), 12m 05s left, logged 31s ago`."""
    logged, total = facts["logged"], facts["train.total_images"]
    if logged["age_seconds"] is None:
        return f"none logged of {total:,}"
    seen, rate = logged["images_seen"], logged["numbers"].get("speed/images_per_second")
    return _listed(
        f"{seen:,} of {total:,} ({seen / total:.0%})",
        f"{duration((total - seen) / rate)} left" if rate and facts["state"] == "running" else None,
        f"logged {duration(logged['age_seconds'])} ago",
    )


def _active(numbers: Mapping[str, float], channels: int) -> str | None:
    """`23: 7, 8, 8 (of 8 in each group, coarsest first)`."""
    name = "train/active_channels"
    groups = [numbers[key] for key in sorted(numbers) if key.startswith(f"{name}/group_")]
    if not groups:
        return None
    each = ", ".join(f"{count:.0f}" for count in groups)
    return f"{numbers[name]:.0f}: {each} (of {channels} in each group, coarsest first)"


def _interventions(counts: Mapping[str, int]) -> str:
    done = [counted(counts[kind], what) for kind, what in _IN_WORDS.items() if counts[kind]]
    return ", ".join(done) or "nothing had to be done"


def _checkpoint(facts: Mapping[str, Any]) -> str:
    if not facts["checkpoints"]:
        return "none yet"
    newest, *others = facts["checkpoints"]
    earlier = ", ".join(f"{each['images_seen']:,}" for each in others)
    return _listed(
        f"at {newest['images_seen']:,} images, {duration(facts['newest_checkpoint_age_seconds'])} old",
        f"earlier ones at {earlier}" if earlier else None,
    )


def _starts(launches: list[Mapping[str, Any]]) -> dict[str, str]:
    first = max(len(launches) - _STARTS, 0)
    return {
        f"start {number}": f"{launch['started']} on {launch['host']}, {counted(launch['workers'], 'worker')}"
        for number, launch in enumerate(launches[first:], start=first + 1)
    }


def _worded(numbers: Mapping[str, Any], name: str, form: str) -> str | None:
    value = numbers.get(name)
    return None if value is None else form.format(value)


def _listed(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part is not None)
