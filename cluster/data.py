"""`nvae shards`: data sets, as the command line shows them."""

import time
from collections import Counter
from typing import Any

from pipeline import storage
from pipeline import store as stores
from pipeline.data import shards, verification
from pipeline.data.index import TRAIN, VALIDATION, Index
from pipeline.data.survey import Progress
from pipeline.progress import say

_REJECTIONS_SHOWN = 10
_PROGRESS_SECONDS = 5.0


def build(source: str, target: str, store: str | None, **options: Any) -> str:
    """Build a data set with the options of `shards.build`; returns what to tell the user."""
    root = stores.data_url(target, stores.locate(store))
    report = shards.build(source, root, progress=_now_and_then(), **options)
    lines = []
    if report.already_there:
        lines.append("Already there, complete; nothing was written.")
    if report.rejected:
        reasons = Counter(rejection.reason for rejection in report.rejected)
        lines.append(f"Left out {len(report.rejected):,} of the source's files:")
        lines += [f"  {count:,} x {reason}" for reason, count in reasons.most_common(_REJECTIONS_SHOWN)]
        lines.append(f"  each of them: {storage.join(root, shards.REPORT_NAME)}")
    lines.append(_sentence(report.index))
    return "\n".join(lines)


def verify(root: str, store: str | None, decode: bool) -> list[str]:
    """What is wrong with a data set; nothing if it is whole."""
    url = stores.data_url(root, stores.locate(store))
    problems = verification.verify(url, decode_images=decode, progress=_now_and_then())
    return [f"{problem.shard}: {problem.what}" for problem in problems]


def summary(root: str, store: str | None) -> dict[str, Any]:
    """A data set in a few plain values."""
    return verification.show(stores.data_url(root, stores.locate(store)))


def _now_and_then() -> Progress:
    """Says how far the work is, every few seconds."""
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    return progress


def _sentence(index: Index) -> str:
    return (
        f"{storage.shown(index.root)}: {index.num_samples(TRAIN):,} training and "
        f"{index.num_samples(VALIDATION):,} validation images of {index.image_size}x{index.image_size}"
    )
