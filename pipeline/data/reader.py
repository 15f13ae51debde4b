"""Verified samples out of the shards, fetched ahead.

The plan says which sample is needed at which position and which of its neighbours the same
lane will need soon (its window). A window is fetched in pieces of up to four megabytes: one
range request each, in the order in which they are first needed; smaller ones cost a server more
than they deliver, larger ones let the second batch of a run wait. Nothing is delivered but
samples whose checksum is what the sidecar says, out of a sidecar that is what the index says.
A piece with a sample that differs is fetched once more, and so is a sidecar; then that sample,
and only it, is corrupt (data/corruption.py). So neither a cut tar, nor a replaced one, nor a
bit that fell over goes unnoticed. (CRC-32 tells accidents. Who may write to the store could forge
it; `nvae shards verify` compares the SHA-256 of whole shards.)

The very first sample of each lane is fetched by itself, before the piece around it: a run
begins when a batch has arrived, not when the windows of all lanes have.

With a cache (data/cache.py), pieces are those of a fixed grid, whole. At its two edges a window
then fetches up to one piece more, which whoever reads the next window finds in the cache; if the
cache is too small to hold it until then, that is the cost: on average one piece per window. Without
a cache pieces end where the window does.

Memory, in encoded images: let the caller request h samples per lane ahead of those he has
taken. A lane then holds at most one window of samples, h besides, and its first sample, since a
window is requested only when all but h of the one before were taken; for L lanes that is
L (shuffle_window + h + 1), and FETCH_THREADS pieces in transfer. A rank reads the lanes of its
share (data/plan.py says how many).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline import storage
from pipeline.data import pieces
from pipeline.data.cache import PieceCache
from pipeline.data.corruption import CorruptSampleError
from pipeline.data.index import Index, Shard, ShardError, Sidecar, read_sidecar
from pipeline.data.pieces import Piece
from pipeline.data.plan import Places

FETCH_THREADS = 16
"""Requests under way at once: at 100 ms each, 160 pieces or 640 MB a second."""
_SIDECAR_BYTES_KEPT = 512 * 2**20
"""Of the sidecars in memory, about 50 bytes per sample: those of ten million."""


@dataclass(frozen=True, slots=True)
class Span:
    """The verified bytes of a sample."""

    shard: Shard
    key: str
    offset: int
    """Its first byte in the shard."""
    data: bytes

    def corrupt(self, index: Index, what: str) -> CorruptSampleError:
        return CorruptSampleError(index, self.shard, self.key, self.offset, what)


_Spans = dict[int, Span | CorruptSampleError]


@dataclass(frozen=True, slots=True)
class PendingSample:
    """A sample that has been asked for."""

    _spans: Future[_Spans]
    _number: int

    def when_decided(self, action: Callable[[], None]) -> None:
        """Call `action` once, as soon as `take` answers at once, from whatever thread it is."""
        self._spans.add_done_callback(lambda _: action())

    def take(self) -> Span:
        """The sample, once; waits for it. Raises CorruptSampleError if it alone cannot be had,
        ShardError or StoreError if nothing can, CancelledError if the reader was closed."""
        # Taken out, so that its bytes are freed while the rest of the piece waits.
        span = self._spans.result().pop(self._number)
        if isinstance(span, CorruptSampleError):
            raise span
        return span


class Reader:
    """Reads the samples of one split, each lane in the order of the plan."""

    def __init__(self, index: Index, split: str, cache: PieceCache | None = None) -> None:
        self._index, self._shards, self._cache = index, index.shards(split), cache
        self._is_closed = threading.Event()
        self._pool = ThreadPoolExecutor(
            FETCH_THREADS, "fetch", initializer=storage.give_up_when, initargs=(self._is_closed,)
        )
        self._windows: dict[int, tuple[int, dict[Piece, Future[_Spans]]]] = {}
        self._sidecars: OrderedDict[int, Future[Sidecar]] = OrderedDict()
        self._sidecar_bytes = 0
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(1024)]
        self.transferred_bytes = 0
        """From the store: shards and sidecars, damaged and repeated transfers included."""
        self.cached_bytes = 0
        """Out of the cache, undamaged."""

    def request(self, places: Places) -> list[PendingSample]:
        """Begin to fetch the samples at `places`; not to be called by several threads at once."""
        rows = zip(
            places.lanes.tolist(),
            places.windows.tolist(),
            places.shards.tolist(),
            places.samples.tolist(),
            places.firsts.tolist(),
            places.ends.tolist(),
            strict=True,
        )
        return [self._request(*row) for row in rows]

    def close(self) -> None:
        """Stop fetching. What is being transferred just now ends by itself, and is not tried again."""
        self._is_closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._windows.clear()

    def _request(
        self, lane: int, window: int, shard: int, sample: int, first: int, end: int
    ) -> PendingSample:
        is_first = lane not in self._windows
        if is_first or self._windows[lane][0] != window:
            # The lane has left its last window; what this rank did not need of it goes.
            self._windows[lane] = (window, {})
        if is_first:
            alone = Piece(shard, sample, sample + 1)
            return PendingSample(self._pool.submit(self._fetch, alone, alone, None), sample)
        known = self._windows[lane][1]
        if self._cache is None:
            wanted = fetched = pieces.part(Piece(shard, first, end), self._shards[shard], sample)
        else:
            fetched = pieces.grid_piece(shard, self._shards[shard], sample)
            wanted = Piece(shard, max(fetched.first, first), min(fetched.end, end))
        if wanted not in known:
            known[wanted] = self._pool.submit(self._fetch, wanted, fetched, self._cache)
        return PendingSample(known[wanted], sample)

    def _fetch(self, wanted: Piece, fetched: Piece, cache: PieceCache | None) -> _Spans:
        """The samples of `wanted` by number, out of a transfer of all of `fetched`."""
        shard, sidecar = self._shards[fetched.shard], self._sidecar(fetched.shard)
        found: _Spans = {}
        for run in pieces.runs(fetched, sidecar):
            data, damaged = self._whole(run, shard, sidecar, cache)
            for number, span in pieces.spans(data, run, sidecar):
                if wanted.first <= number < wanted.end:
                    key, offset = sidecar.keys[number], int(sidecar.offsets[number])
                    if number in damaged:
                        found[number] = CorruptSampleError(self._index, shard, key, offset, damaged[number])
                    else:
                        # A copy, so that the piece does not stay for the sake of its last sample.
                        found[number] = Span(shard, key, offset, bytes(span))
        return found

    def _whole(
        self, run: Piece, shard: Shard, sidecar: Sidecar, cache: PieceCache | None
    ) -> tuple[bytes, dict[int, str]]:
        """The bytes of `run`, from the cache or the store, and what is wrong with which sample."""
        start, end = pieces.byte_range(run, sidecar)
        name = f"{shard.sha256}-{start}-{end}"
        if cache is None:
            return self._out_of_store(run, shard, sidecar)
        # Neighbouring windows want the same piece at the same time: who comes second finds it there.
        with self._stripes[hash(name) % len(self._stripes)]:
            cached = self._out_of_cache(name, run, sidecar, cache)
            if cached is not None:
                return cached, {}
            data, damaged = self._out_of_store(run, shard, sidecar)
            if not damaged:
                cache.put(name, data)
            return data, damaged

    def _out_of_cache(self, name: str, run: Piece, sidecar: Sidecar, cache: PieceCache) -> bytes | None:
        """The undamaged bytes of `run`; a damaged entry is dropped."""
        start, end = pieces.byte_range(run, sidecar)
        data = cache.get(name, end - start)
        if data is None:
            return None
        if pieces.damage(data, run, sidecar):
            cache.drop(name)
            return None
        with self._lock:
            self.cached_bytes += len(data)
        return data

    def _out_of_store(self, run: Piece, shard: Shard, sidecar: Sidecar) -> tuple[bytes, dict[int, str]]:
        start, end = pieces.byte_range(run, sidecar)
        data = self._transfer(shard, start, end)
        damaged = pieces.damage(data, run, sidecar)
        if damaged:
            # A transfer may have spoilt it; a second one tells that from a damaged shard.
            data = self._transfer(shard, start, end)
            damaged = pieces.damage(data, run, sidecar)
        return data, damaged

    def _transfer(self, shard: Shard, start: int, end: int) -> bytes:
        """Bytes [start, end) of `shard`, or as many of them as it has."""
        url = storage.join(self._index.root, shard.name)
        try:
            data = storage.read_bytes(url, start, end)
        except storage.CutError:
            there = storage.size(url)
            data = storage.read_bytes(url, start, there) if there > start else b""
        with self._lock:
            self.transferred_bytes += len(data)
        return data

    def _sidecar(self, number: int) -> Sidecar:
        """The sidecar of a shard; whoever asks first fetches it, the others wait."""
        with self._lock:
            mine = number not in self._sidecars
            future = self._sidecars.setdefault(number, Future())
            self._sidecars.move_to_end(number)
            self._sidecar_bytes += self._shards[number].sidecar_bytes if mine else 0
            while self._sidecar_bytes > _SIDECAR_BYTES_KEPT and len(self._sidecars) > FETCH_THREADS:
                oldest, _ = self._sidecars.popitem(last=False)
                self._sidecar_bytes -= self._shards[oldest].sidecar_bytes
        if mine:
            try:
                future.set_result(self._fetch_sidecar(self._shards[number]))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _fetch_sidecar(self, shard: Shard) -> Sidecar:
        with self._lock:
            self.transferred_bytes += shard.sidecar_bytes
        try:
            return read_sidecar(self._index, shard)
        except ShardError:
            # As with samples, a second transfer decides.
            return read_sidecar(self._index, shard)
