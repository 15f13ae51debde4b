"""Meets each hostile payload in a process of its own and reports what became of it.

`python -m tests.pipeline.data.hostile_child FOLDER [slow]` prints a line of JSON per payload: its name,
what was delivered or the message of refusal, and by how much the process grew.
"""

import json
import os
import resource
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
    """What `work` does in a forked process, and by how many MiB that grew."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        before = _resident_mib()
        try:
            result = work(folder)
        except InputError as error:
            result = {"refused": str(error)}
        except BaseException as error:
            result = {"crashed": repr(error)}
        result["grown_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        os.write(writing, json.dumps(result).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    met: dict[str, object] = json.loads(answer or b'{"crashed": "died"}')
    return met


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


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
