"""What FID, precision and recall leave at a registered version: one tag, as evaluations do.

Its name says how the samples were drawn and what they were measured with, so that only the same
measurement, made again, replaces a figure: FIDs of other conditions are not comparable.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PREFIX = "sample_quality/"
_HASH_DIGITS = 12


@dataclass(frozen=True)
class SampleQuality:
    """One recorded measurement, as its tag has it."""

    fid: float
    precision: float
    recall: float
    samples: int
    temperature: tuple[float, ...]
    """Of all latents, or one per scale, coarsest first."""
    pixels: str
    seed: int
    data_hash: str
    """Content hash of the data set whose images the samples were compared with."""
    reference: str
    """The split of those."""
    reference_images: int
    inception_sha256: str
    """Of the file of the network's weights."""

    @property
    def conditions(self) -> tuple[Any, ...]:
        """Figures compare where these are equal; another seed is another draw of the same."""
        return (
            self.data_hash,
            self.reference,
            self.reference_images,
            self.samples,
            self.temperature,
            self.pixels,
            self.inception_sha256,
        )


def quality_tag(answer: Mapping[str, Any]) -> tuple[str, str]:
    """Name and value of the tag for what `sharded_quality.measure` answered."""
    found = SampleQuality(**{name: answer[name] for name in SampleQuality.__dataclass_fields__})
    name = (
        f"{PREFIX}{found.data_hash[:_HASH_DIGITS]}/{found.reference}_{found.reference_images}"
        f"/samples_{found.samples}/temperature_{'_'.join(map(repr, found.temperature))}/{found.pixels}"
        f"/inception_{found.inception_sha256[:_HASH_DIGITS]}/seed_{found.seed}"
    )
    return name, json.dumps(asdict(found), allow_nan=False)


def sample_qualities(tags: Mapping[str, str]) -> tuple[SampleQuality, ...]:
    """The measurements in a version's tags: of most samples first, then of most images.

    Tags can be edited by anybody: one that is not as it was written counts for nothing.
    """
    texts = [value for name, value in tags.items() if name.startswith(PREFIX)]
    found = [each for each in map(_parsed, texts) if each is not None]
    return tuple(sorted(found, key=lambda each: (-each.samples, -each.reference_images, each.seed, each.fid)))


def _parsed(text: str) -> SampleQuality | None:
    try:
        value = json.loads(text)
        return SampleQuality(
            fid=float(value["fid"]),
            precision=float(value["precision"]),
            recall=float(value["recall"]),
            samples=int(value["samples"]),
            temperature=tuple(float(each) for each in value["temperature"]),
            pixels=str(value["pixels"]),
            seed=int(value["seed"]),
            data_hash=str(value["data_hash"]),
            reference=str(value["reference"]),
            reference_images=int(value["reference_images"]),
            inception_sha256=str(value["inception_sha256"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
