"""`nvae shards`: data sets, as the command line shows them."""

import time
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline import store as stores
from pipeline.data import indexing, shards, verification
from pipeline.data.index import TRAIN, VALIDATION, Index
from pipeline.data.survey import Progress
from pipeline.progress import say

_REASONS_SHOWN = 10
_PROGRESS_SECONDS = 5.0


def build(source: str, target: str, store: str | None, **options: Any) -> str:
    """Build a data set with the options of `shards.build`; returns what to tell the user."""
    root = stores.data_url(target, stores.locate(store))
    report = shards.build(source, root, progress=_now_and_then(), **options)
    lines = []
    if report.already_there:
        lines.append("Already there, complete; nothing was written.")
    lines += report.remarks
    if report.rejected:
        lines.append(f"Left out {len(report.rejected):,} of the source's files:")
        lines += [f"  {reason}" for reason in shards.reasons(report.rejected, _REASONS_SHOWN)]
        lines.append(f"  each of them: {storage.join(root, shards.REPORT_NAME)}")
    lines.append(_sentence(report.index))
    return "\n".join(lines)


def index(urls: Sequence[str], store: str | None, **options: Any) -> str:
    """Index others' tars with the options of `indexing.index_tars`; returns what to tell the user."""
    located = [
        stores.data_url(url, stores.locate(store)) if url.startswith("store:") else url for url in urls
    ]
    report = indexing.index_tars(located, progress=_now_and_then(), **options)
    index = report.index
    lines = []
    if report.already_there:
        lines.append("Already there; nothing was read or written (`nvae shards verify` checks every byte).")
    if index.rejected:
        lines.append(f"Left out {index.rejected:,} of the tars' samples:")
        lines += [f"  {reason}" for reason in shards.reasons(report.rejected, _REASONS_SHOWN)]
        lines.append(f"  each of them: {storage.shown(storage.join(index.root, shards.REPORT_NAME))}")
    lines.append(_sentence(index))
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
    begun: dict[str, tuple[float, int]] = {}
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        since, first = begun.setdefault(what, (now, done))
        if now - last > _PROGRESS_SECONDS:
            last = now
            say(progress_line(what, done, total, (done - first) / (now - since) if now > since else 0.0))

    return progress


def progress_line(what: str, done: int, total: int, per_second: float) -> str:
    """How much is done, how fast, and what that leaves."""
    line = f"{what}: {done:,} of {total:,}"
    if per_second <= 0:
        return line
    minutes, seconds = divmod(round((total - done) / per_second), 60)
    left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"
    speed = f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"
    return f"{line}, {speed} a second, {left} left"


def _sentence(index: Index) -> str:
    return (
        f"{storage.shown(index.root)}: {index.num_samples(TRAIN):,} training and "
        f"{index.num_samples(VALIDATION):,} validation images of {index.image_size}x{index.image_size}"
    )
