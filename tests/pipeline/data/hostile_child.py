"""Meets each hostile payload and reports what became of it.

`python -m tests.pipeline.data.hostile_child FOLDER [slow]` prints a line of JSON per payload: its name,
what was delivered or the message of refusal, and by how much this process grew.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline import storage
from pipeline.data import verification
from pipeline.data.index import SPLITS, TRAIN, load_index, read_sidecar
from pipeline.data.indexing import index_tars
from pipeline.data.loader import evaluation_batches
from pipeline.errors import InputError
from tests.pipeline.data.hostile_indexes import INDEX_PAYLOADS
from tests.pipeline.data.hostile_tars import TAR_PAYLOADS
from tests.pipeline.data.test_loader import config


def index_and_read(folder: Path) -> dict[str, object]:
    """Make an index of the tar in `folder`, check it and read its samples as a training does."""
    index = index_tars([str(folder)], validation_fraction=0, max_rejected=1, image_size=8, channels=3).index
    assert verification.verify(index.root) == []
    keys = {key for shard in index.shards(TRAIN) for key in read_sidecar(index, shard).keys}
    return {"keys": sorted(keys), "delivered": read(index.root)}


def verify_and_read(folder: Path) -> dict[str, object]:
    """Read a data set that is there; what `verify` says of it comes along."""
    index = load_index(str(folder))
    problems = [
        problem.what
        for split in SPLITS
        if index.shards(split)
        for problem in verification.verify(str(folder))
    ]
    try:
        return {"delivered": read(str(folder)), "problems": problems}
    except InputError as error:
        return {"refused": str(error), "problems": problems}


def read(root: str) -> list[str]:
    batches = evaluation_batches(config(), load_index(root), rank=0, world_size=1, split=TRAIN, batch_size=4)
    return sorted(key for batch in batches for key in batch.keys)


def meet(work: Callable[[Path], dict[str, object]], folder: Path) -> dict[str, object]:
    """What `work` does, and by how many MiB this process grew meanwhile at most."""
    # Resets the high-water mark of the memory in use.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mib("VmRSS")
    try:
        result = work(folder)
    except InputError as error:
        result = {"refused": str(error)}
    except BaseException as error:
        result = {"crashed": repr(error)}
    return result | {"grown_mib": _memory_mib("VmHWM") - before}


def _memory_mib(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def main(folder: Path, slow: bool) -> None:
    for number, payload in enumerate(TAR_PAYLOADS):
        if payload.slow == slow:
            place = folder / f"tar{number}"
            place.mkdir()
            payload.write(place / "0.tar")
            print(json.dumps({"name": payload.name} | meet(index_and_read, place)), flush=True)
            (place / "0.tar").unlink()
    for number, payload in enumerate([] if slow else INDEX_PAYLOADS):
        place = folder / f"index{number}"
        place.mkdir()
        payload.write(place)
        print(json.dumps({"name": payload.name} | meet(verify_and_read, place)), flush=True)


if __name__ == "__main__":
    assert storage.is_local(sys.argv[1])
    main(Path(sys.argv[1]), "slow" in sys.argv[2:])
