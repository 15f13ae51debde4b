"""D1, D2: what a network and a store do on a bad day, while real loaders read an epoch."""

import random
import statistics
from collections.abc import Callable

from pipeline import storage
from pipeline.config import StorageConfig
from pipeline.patience import FIRST_PAUSE_SECONDS
from tests.fault_proxy import Cut, Fail, FaultProxy, Flip, Request, Reset, Shifted, Stall, Whole
from tests.faults.injection import Place, Row, Tally, assert_exact, noise, plan_of, read
from tests.pipeline.data.data_set import build, config

WORLDS = (1, 3)


def of_shards(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith((".tar", ".idx"))


def once_each(seed: int, most: float, least: float = 0) -> Callable[[Request], bool]:
    """A rule's condition: the first request for each range of a tar whose draw is in [least, most)."""
    struck: set[tuple[str, int]] = set()

    def where(request: Request) -> bool:
        if request.method != "GET" or not request.path.endswith(".tar") or request.range is None:
            return False
        # A later request for the rest ends where the first one would have.
        name = (request.path, request.range[1] or 0)
        if name in struck or not least <= random.Random(f"{seed} {name}").random() < most:
            return False
        struck.add(name)
        return True

    return where


def errors(place: Place) -> Row:
    """D1: each tenth request is answered by 500, 503 or SlowDown."""
    tally, pairs = Tally(), 1 if place.short else 5
    local = noise(place.folder, 96 if place.short else 768, 128, 2**20)
    settings = config(batch_size=24, lanes=24, shuffle_window=8, model={"image_size": 128})
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    ratios: dict[int, list[float]] = {world: [] for world in WORLDS}
    samples = 0
    before = storage.statistics()
    with place.through_proxy(StorageConfig()) as proxy:
        read(settings, remote)
        for pair in range(pairs):
            for world in WORLDS:
                proxy.reset()
                clean = read(settings, remote, world)
                proxy.add(Fail(503, "SlowDown"), probability=0.05)
                proxy.add(Fail(500, "InternalError"), probability=0.03)
                proxy.add(Fail(503, "ServiceUnavailable"), probability=0.0225)
                with tally.attempt(f"pair {pair} on {world} ranks", proxy.injected.total):
                    found = read(settings, remote, world)
                    assert_exact(found, clean, planned)
                    samples += len(found.samples)
                    ratios[world].append(found.seconds / clean.seconds)
    retries = storage.statistics().retries - before.retries
    took = ", ".join(
        f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f}) on {world} ranks"
        for world, times in ratios.items()
        if times
    )
    measured = f"{samples:,} samples exact, {retries} retries; time to clean runs' {took}"
    return tally.row("D1", "500, 503, SlowDown on 10% of requests", measured)


def stalls(place: Place) -> Row:
    """D2: silence before an answer, or in the middle of its body."""
    tally, limits = Tally(), StorageConfig(read_timeout_seconds=2, longest_pause_seconds=0.5)
    local = noise(place.folder, 96 if place.short else 384, 64, 2**18)
    settings = config(batch_size=24, lanes=24, shuffle_window=8, model={"image_size": 64})
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    faults = {"5 s of latency": Stall(5), "in the body": Stall(3600, after=5000)}
    waits, usual = [], 0.0
    with place.through_proxy(limits) as proxy:
        read(settings, remote)
        for what, fault in faults.items():
            for world in WORLDS:
                proxy.reset()
                clean = read(settings, remote, world)
                usual = max(usual, clean.longest_wait)
                proxy.add(fault, once_each(place.seed, 0.1))
                with tally.attempt(f"{what} on {world} ranks", proxy.injected.total):
                    found = read(settings, remote, world)
                    assert_exact(found, clean, planned)
                    waits.append(found.longest_wait)
                    most = limits.read_timeout_seconds + FIRST_PAUSE_SECONDS + 2 * usual
                    assert found.longest_wait <= most, f"waited {found.longest_wait:.2f} s"
    longest = max(waits, default=0.0)
    measured = (
        f"longest wait {longest:.2f} s at a time-out of {limits.read_timeout_seconds:g} s "
        f"and a pause of up to {FIRST_PAUSE_SECONDS:g} s (without faults {usual:.2f} s)"
    )
    return tally.row("D2", "5 s of latency; a socket that falls silent", measured)


def breaks(place: Place) -> Row:
    """D2b: connections and bodies that end anywhere, other ranges, whole files in place of ranges."""
    tally, rounds = Tally(), 1 if place.short else 4
    local = noise(place.folder, 96 if place.short else 384, 64, 2**18)
    settings = config(batch_size=24, lanes=24, shuffle_window=8, model={"image_size": 64})
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    largest = max(shard.bytes for shard in local.shards("train"))
    draw, before = random.Random(place.seed), storage.statistics()
    samples = 0
    with place.through_proxy() as proxy:
        clean = read(settings, remote)
        for turn in range(rounds):
            for world in WORLDS:
                proxy.reset()
                add_breaks(proxy, draw, largest)
                with tally.attempt(f"round {turn} on {world} ranks", proxy.injected.total):
                    found = read(settings, remote, world)
                    assert_exact(found, clean, planned)
                    samples += len(found.samples)
    after = storage.statistics()
    measured = (
        f"{samples:,} samples exact, {after.retries - before.retries} retries, "
        f"{(after.reread_bytes - before.reread_bytes) / 2**20:.1f} MiB thrown away"
    )
    return tally.row("D2b", "resets and short bodies at random bytes, wrong ranges, 200 for 206", measured)


def add_breaks(proxy: FaultProxy, draw: random.Random, largest: int) -> None:
    """One of these befalls about a fifth of all requests for shards and sidecars."""
    for _ in range(8):
        # Many cuts lie near the beginning, where they meet small answers, too.
        after = int(largest ** draw.random())
        proxy.add(Reset(after=after), of_shards, probability=0.008)
        proxy.add(Cut(after=after, lying=draw.random() < 0.3), of_shards, probability=0.008)
    proxy.add(Reset(), of_shards, probability=0.03)
    proxy.add(Shifted(by=draw.randrange(1, 9000), honest=True), of_shards, probability=0.03)
    proxy.add(Whole(), of_shards, probability=0.03)


def wrong_bytes(place: Place) -> Row:
    """D3t: answers of the right length with a bit turned, or with the bytes of another range."""
    tally, wanted = Tally(), 40 if place.short else 1000
    local = build(place.folder, str(place.folder / "set"))
    settings = config(lanes=12)
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    draw, rounds, samples = random.Random(place.seed), 0, 0
    with place.through_proxy() as proxy:
        clean = read(settings, remote)
        while tally.tried < wanted:
            rounds += 1
            proxy.reset()
            # Each range is spoilt in the first transfer only: a second one has to heal it.
            flip = Flip(at=draw.randrange(900), mask=1 << draw.randrange(8))
            proxy.add(flip, once_each(rounds, 0.8))
            proxy.add(Shifted(by=1024 * draw.choice((-3, -1, 1, 3))), once_each(rounds, 1, least=0.8))
            with tally.attempt(f"reading {rounds}", proxy.injected.total):
                found = read(settings, remote, 1 + rounds % 3)
                assert_exact(found, clean, planned)
                samples += len(found.samples)
            assert proxy.injected["Flip"]
    measured = f"{samples:,} samples in {rounds} readings, all healed by the second transfer"
    return tally.row("D3t", "wrong bytes of the right number, in transit", measured)
