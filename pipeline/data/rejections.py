"""Images that a build leaves out: why, how many are too many, and the list of them.

Two kinds are told apart. What a rule leaves out (files that are no images, training images that
the validation split repeats) is listed and no reason to worry. What cannot be used (damaged, not
square, too small) is either a few files in ten thousand or a sign that something is wrong with
the whole: a download that was cut, a crop that was forgotten. So a build stops if these are
more than a given share.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from pipeline import storage
from pipeline.data.index import ShardError

REPORT_NAME = "rejected.json"
DEFAULT_MAX_REJECTED = 0.01
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Rejection:
    """An image of the source that was left out."""

    name: str
    reason: str
    by_rule: bool = False
    """It says nothing about the state of the source."""


def reasons(rejections: Iterable[Rejection], most: int = _SHOWN) -> list[str]:
    """`count x reason` for the most frequent reasons; those that differ in numbers alone count as one."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for rejection in rejections:
        kind = re.sub(r"\d[\d,]*", "0", rejection.reason)
        counts[kind] += 1
        examples.setdefault(kind, rejection.reason)
    lines = [f"{count:,} x {examples[kind]}" for kind, count in counts.most_common(most)]
    return [*lines, f"{len(counts) - most} other reasons"] if len(counts) > most else lines


@dataclass
class Tolerance:
    """Counts what cannot be used, and says when it is more than a share of the images."""

    source: str
    most: float
    """The largest share of the images that may be unusable."""
    images: int
    """How many the source offers."""
    unusable: list[Rejection] = field(default_factory=list)

    def add(self, rejections: Iterable[Rejection]) -> None:
        self.unusable += [rejection for rejection in rejections if not rejection.by_rule]

    @property
    def is_exceeded(self) -> bool:
        """Whether these are too many, whatever the other images are."""
        return len(self.unusable) > self.most * self.images

    def check(self) -> None:
        """Raises ShardError if too many images cannot be used."""
        if self.is_exceeded:
            why = "; ".join(reasons(self.unusable))
            raise ShardError(
                f"{self.source}: {len(self.unusable):,} of {self.images:,} images cannot be used so far, "
                f"more than --max-rejected {self.most:g} allows: {why}; the first is "
                f"{self.unusable[0].name}. No data set was made. Mend that, or repeat the command with "
                f"--max-rejected 1 to leave them out: it goes on where this one stopped."
            )


def write_report(root: str, rejected: Iterable[Rejection]) -> None:
    rows = [asdict(rejection) for rejection in rejected]
    storage.write_bytes(storage.join(root, REPORT_NAME), json.dumps(rows, indent=1).encode())


def read_report(root: str) -> tuple[Rejection, ...]:
    """What the build of the data set at `root` left out. Raises ShardError if the list is damaged."""
    try:
        rows = json.loads(storage.read_text(storage.join(root, REPORT_NAME)))
        return tuple(Rejection(**row) for row in rows)
    except storage.MissingError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{storage.shown(root)}/{REPORT_NAME}: is damaged; delete it.") from error
