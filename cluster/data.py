"""`nvae shards`: data sets, as the command line shows them."""

from collections import Counter
from typing import Any

from pipeline import storage
from pipeline import store as stores
from pipeline.data import shards, verification
from pipeline.data.index import Index

_REJECTIONS_SHOWN = 10


def build(source: str, target: str, store: str | None, grey: bool, shard_mib: int, **options: Any) -> str:
    """Build a data set; returns what to tell the user."""
    root = stores.data_url(target, stores.locate(store))
    report = shards.build(source, root, channels=1 if grey else None, shard_bytes=shard_mib << 20, **options)
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
    problems = verification.verify(stores.data_url(root, stores.locate(store)), decode_images=decode)
    return [f"{problem.shard}: {problem.what}" for problem in problems]


def summary(root: str, store: str | None) -> dict[str, Any]:
    """A data set in a few plain values."""
    return verification.show(stores.data_url(root, stores.locate(store)))


def _sentence(index: Index) -> str:
    return (
        f"{index.root}: {index.num_samples('train'):,} training and {index.num_samples('validation'):,} "
        f"validation images of {index.image_size}x{index.image_size}"
    )
