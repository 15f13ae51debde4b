"""What the rows of the campaign share: a place with a real S3 server, counting, exact readings."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import RunConfig, StorageConfig
from pipeline.data import shards
from pipeline.data.index import TRAIN, Index, load_index
from pipeline.data.loader import training_batches
from tests import s3_server
from tests.fault_proxy import FaultProxy
from tests.recorded_batches import planned

BUCKET = "faults"
# A stall is to be noticed soon, but whoever is busy with other work may take a while to answer.
QUICK_TO_RETRY = StorageConfig(
    connect_timeout_seconds=5, read_timeout_seconds=3, retry_seconds=60, longest_pause_seconds=0.5
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    id: str
    fault: str
    tried: int
    survived: int
    measured: str
    broken: tuple[str, ...] = ()
    """What did not survive, and how."""


@dataclass
class Tally:
    """Counts what was tried and what of it survived."""

    tried: int = 0
    survived: int = 0
    broken: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str, count: Callable[[], int] = lambda: 1) -> Iterator[None]:
        """Injections, in the end `count()` of them, that survive if nothing is raised.

        Where there was none, nothing was survived: that counts as one that was not.
        """
        try:
            yield
            injected = count()
            assert injected, "no fault was met"
        except (Exception, pytest.fail.Exception) as error:
            self.broken.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
            self.tried += max(count(), 1)
        else:
            self.survived += injected
            self.tried += injected

    def note(self, survived: int, tried: int, what: str = "") -> None:
        """Add injections whose outcome is known."""
        self.tried += tried
        self.survived += survived
        if survived < tried:
            self.broken.append(what)

    def row(self, id: str, fault: str, measured: str) -> Row:
        return Row(id, fault, self.tried, self.survived, measured, tuple(self.broken))


@dataclass(frozen=True)
class Place:
    """Where a row works."""

    folder: Path
    """Empty, of the row's own."""
    bucket: str
    """The URL of a bucket on a real S3 server, whose settings are in the environment."""
    proxy: FaultProxy
    """In front of that server; `through_proxy` leads there."""
    seed: int
    short: bool

    @contextmanager
    def through_proxy(self, settings: StorageConfig = QUICK_TO_RETRY) -> Iterator[FaultProxy]:
        """The store is reached through the proxy, which has no rule yet, by a client with `settings`."""
        self.proxy.reset()
        storage.configure(settings)
        try:
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("AWS_ENDPOINT_URL_S3", self.proxy.url)
                yield self.proxy
        finally:
            storage.configure(StorageConfig())
            self.proxy.clear()

    def uploaded(self, index: Index, name: str) -> Index:
        """The same data set in the bucket."""
        root = f"{self.bucket}/{self.folder.name}/{name}"
        for path in Path(index.root).iterdir():
            storage.write_bytes(f"{root}/{path.name}", path.read_bytes())
        return load_index(root)


@contextmanager
def places(folder: Path, seed: int, short: bool) -> Iterator[Iterator[Place]]:
    """Places for any number of rows, with one server and one proxy for all."""
    with ExitStack() as stack:
        server = stack.enter_context(s3_server.serving(folder / "s3"))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.client.items():
            environment.setenv(name, value)
        s3_server.make_bucket(BUCKET)
        proxy = stack.enter_context(FaultProxy(server.client["AWS_ENDPOINT_URL_S3"], seed))

        def each() -> Iterator[Place]:
            for number in range(1000):
                own = folder / f"row{number:03d}"
                own.mkdir()
                yield Place(own, f"s3://{BUCKET}", proxy, seed, short)
                shutil.rmtree(own, ignore_errors=True)

        yield each()


# --- data sets and what is read of them ----------------------------------------------------------


def noise(folder: Path, count: int, size: int, shard_bytes: int, seed: int = 0, held_out: int = 0) -> Index:
    """A data set of `count` images of noise for training, below `folder`."""
    random = np.random.default_rng(seed)
    source = folder / "images"
    source.mkdir(parents=True)
    for number in range(count + held_out):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number:05d}.png", compress_level=1)
    built = shards.build(
        str(source),
        str(folder / "set"),
        image_size=size,
        channels=3,
        validation_count=held_out,
        shard_bytes=shard_bytes,
    )
    shutil.rmtree(source)
    return built.index


Sample = tuple[int, str, str]
"""Position, key, digest of the pixels."""


@dataclass(frozen=True)
class Reading:
    """What all ranks together got."""

    samples: list[Sample]
    seconds: float
    longest_wait: float
    transferred_bytes: int

    def places(self) -> list[tuple[int, str]]:
        return [(position, key) for position, key, _ in self.samples]


def read(settings: RunConfig, index: Index, world_size: int = 1, epochs: int = 1) -> Reading:
    """The first epochs by real loaders, one per rank, side by side."""
    stop = epochs * index.num_samples(TRAIN)
    where = {"world_size": world_size, "start": 0, "stop": stop}
    begun = time.monotonic()
    loaders = [training_batches(settings, index, rank=rank, **where) for rank in range(world_size)]
    samples, longest, transferred = [], 0.0, 0
    with contextlib.ExitStack() as stack:
        for loader in loaders:
            stack.callback(loader.close)
        for step in zip(*loaders, strict=True):
            for batch in step:
                longest = max(longest, batch.wait_seconds)
                transferred += batch.transferred_bytes
                pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
                rows = zip(batch.positions.tolist(), batch.keys, pixels, batch.weights, strict=True)
                samples += [(position, key, digest) for position, key, digest, weight in rows if weight]
    return Reading(sorted(samples), time.monotonic() - begun, longest, transferred)


def assert_exact(found: Reading, clean: Reading, in_plan: list[tuple[int, str]]) -> None:
    """Every sample once, in its place, with its pixels."""
    assert clean.places() == in_plan
    wrong = set(clean.samples).symmetric_difference(found.samples)
    assert found.samples == clean.samples, f"{len(wrong)} samples are lost, repeated or changed"


def plan_of(index: Index, settings: RunConfig, epochs: int = 1) -> list[tuple[int, str]]:
    """(position, key) by the plan and the names in the tars of a local data set."""
    assert settings.data.lanes is not None
    return planned(
        index,
        lanes=settings.data.lanes,
        window=settings.data.shuffle_window,
        seed=settings.train.seed,
        stop=epochs * index.num_samples(TRAIN),
    )


@contextmanager
def grown_mib() -> Iterator[list[float]]:
    """A list that gets, at the end, by how many MiB this process grew at most meanwhile."""
    grown: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mib("VmRSS")
    yield grown
    grown.append(_memory_mib("VmHWM") - before)


def _memory_mib(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def environment_of_child(**more: str) -> dict[str, str]:
    """The environment for an `nvae` process that is to know nothing of this machine's runs."""
    strays = ("NVAE_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    return {name: value for name, value in os.environ.items() if name not in strays} | more
