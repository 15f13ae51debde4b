"""What an interrupted build has to remember: `building.json`, written after each shard."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import storage
from pipeline.data.index import TRAIN, VALIDATION, Shard, ShardError, parse_shard
from pipeline.data.rejections import Rejection

PROGRESS_NAME = "building.json"


@dataclass
class Unfinished:
    """A build that has begun."""

    arguments: Mapping[str, Any]
    fingerprint: str
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {TRAIN: [], VALIDATION: []})
    consumed: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Entries of each split that are in a finished shard or were rejected before its end."""
    rejected: list[Rejection] = field(default_factory=list)

    def save(self, target: str) -> None:
        content = json.dumps(asdict(self), indent=1).encode()
        storage.write_bytes(storage.join(target, PROGRESS_NAME), content)


def begin(target: str, arguments: Mapping[str, Any], fingerprint: str) -> Unfinished:
    """The build that was interrupted at `target`, or a new one.

    Raises ShardError if another build has left shards there.
    """
    url = storage.join(target, PROGRESS_NAME)
    state = Unfinished(arguments, fingerprint)
    if not storage.exists(url):
        state.save(target)
        return state
    try:
        left = json.loads(storage.read_text(url))
        same = left["arguments"] == arguments and left["fingerprint"] == fingerprint
        left_shards = {split: [parse_shard(row) for row in rows] for split, rows in left["shards"].items()}
        left_rejected = [Rejection(**row) for row in left["rejected"]]
        consumed = {split: int(left["consumed"][split]) for split in left_shards}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{storage.shown(url)}: is damaged; delete that folder and build again.") from error
    if not same and not any(left_shards.values()):
        state.save(target)
        return state
    if not same:
        raise ShardError(
            f"{storage.shown(target)}: holds an unfinished build with other arguments or of other images. "
            f"Choose another target, or delete that folder first."
        )
    sizes = storage.list_sizes(target)
    for shard in [*left_shards[TRAIN], *left_shards[VALIDATION]]:
        if sizes.get(shard.name) != shard.bytes or shard.sidecar_name not in sizes:
            return state  # Someone tidied up; the recorded shards are built again.
    return Unfinished(arguments, fingerprint, left_shards, consumed, left_rejected)
