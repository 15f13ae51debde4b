"""D1, D2: what a network and a store do on a bad day, while real loaders read an epoch."""

import random
import statistics
from collections import Counter
from collections.abc import Callable

from pipeline import storage
from pipeline.config import StorageConfig
from pipeline.patience import FIRST_PAUSE_SECONDS
from tests.fault_proxy import FaultProxy
from tests.faults.injection import Place, Row, Tally, assert_exact, noise, plan_of, read
from tests.http_faults import Cut, Fail, Flip, Request, Reset, Shifted, Stall, Whole
from tests.pipeline.data.data_set import build, config

WORLDS = (1, 3)


def of_shards(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith((".tar", ".idx"))


def longer_than(size: int) -> Callable[[Request], bool]:
    """A rule's condition: what is asked for of a shard or a sidecar has, or may have, a byte there."""

    def where(request: Request) -> bool:
        if not of_shards(request):
            return False
        asked = request.range
        return asked is None or asked[1] is None or asked[1] - asked[0] > size

    return where


def met(tally: Tally, injected: Counter[str], *names: str) -> str:
    """How often each of these faults was met, in words; one that never was is counted as not survived."""
    if missing := [name for name in names if not injected[name]]:
        tally.note(0, 1, f"nobody met {', '.join(missing)}")
    return ", ".join(f"{name} {injected[name]:,}" for name in names)


def once_each(seed: int, most: float, least: float = 0, first: bool = False) -> Callable[[Request], bool]:
    """A rule's condition: the first request for each range of a tar whose draw is in [least, most).

    With `first`, for the very first range as well, so that there is always one.
    """
    struck: set[tuple[str, int]] = set()

    def where(request: Request) -> bool:
        if request.method != "GET" or not request.path.endswith(".tar") or request.range is None:
            return False
        # A later request for the rest ends where the first one would have.
        name = (request.path, request.range[1] or 0)
        drawn = least <= random.Random(f"{seed} {name}").random() < most
        if name in struck or not (drawn or (first and not struck)):
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
                proxy.add(fault, once_each(place.seed, 0.1, first=True))
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
    samples, injected = 0, Counter[str]()
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
                injected += proxy.injected
    after = storage.statistics()
    kinds = met(tally, injected, "Reset", "Cut", "Shifted", "Whole")
    measured = (
        f"{kinds}; {samples:,} samples exact, {after.retries - before.retries} retries, "
        f"{(after.reread_bytes - before.reread_bytes) / 2**20:.1f} MiB thrown away"
    )
    return tally.row("D2b", "resets and short bodies at random bytes, wrong ranges, 200 for 206", measured)


def add_breaks(proxy: FaultProxy, draw: random.Random, largest: int) -> None:
    """One of these befalls about a fifth of all requests for shards and sidecars."""
    for _ in range(8):
        # Many cuts lie near the beginning, where they meet small answers, too; none behind the end.
        after = int(largest ** draw.random())
        proxy.add(Reset(after=after), longer_than(after), probability=0.008)
        proxy.add(Cut(after=after, lying=draw.random() < 0.3), longer_than(after), probability=0.008)
    for fault in (Reset(), Shifted(by=draw.randrange(1, 9000), honest=True), Whole()):
        # One of each comes early: no kind shall be missed by chance.
        proxy.add(fault, of_shards, probability=0.2, times=1)
        proxy.add(fault, of_shards, probability=0.03)


def wrong_bytes(place: Place) -> Row:
    """D3t: answers of the right length with a bit turned, or with the bytes of another range."""
    tally, wanted = Tally(), 40 if place.short else 1000
    local = build(place.folder, str(place.folder / "set"))
    settings = config(lanes=12)
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    draw, rounds, samples, injected = random.Random(place.seed), 0, 0, Counter[str]()
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
            injected += proxy.injected
    measured = (
        f"{met(tally, injected, 'Flip', 'Shifted')}; {samples:,} samples in {rounds} readings, "
        f"all healed by the second transfer"
    )
    return tally.row("D3t", "wrong bytes of the right number, in transit", measured)
