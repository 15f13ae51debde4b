"""Verified samples out of the shards, fetched ahead.

The plan says which sample is needed at which position and which of its neighbours the same
lane will need soon (its window). A window is fetched in pieces of about two megabytes: one
range request each, in the order in which they are first needed. A piece is delivered only if
the checksum of each of its samples is what the sidecar says, and the sidecar is what the index
says; what differs is fetched once more, and then the run ends with the shard, the sample and
its place. So neither a cut tar, nor a replaced one, nor a bit that fell over goes unnoticed.

Memory: each lane that a rank reads holds what is left of its current window, at most
`shuffle_window` encoded images, and the beginning of the next. A sample is released when it
is handed out.
"""

import threading
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.index import Index, Shard, ShardError, Sidecar, read_sidecar
from pipeline.data.plan import Places
from pipeline.data.tars import Sample, read_samples

PIECE_BYTES = 2 * 2**20
FETCH_THREADS = 8
_SIDECARS_KEPT = 256


@dataclass(frozen=True)
class _Piece:
    """Samples [first, end) of a shard, which are fetched together."""

    shard: int
    first: int
    end: int


@dataclass(frozen=True)
class PendingSample:
    """A sample that has been asked for."""

    name: str
    """Shard and number, for messages."""
    _piece: Future[dict[int, Sample]]
    _number: int

    def wait(self) -> Sample:
        """The sample, once. Raises ShardError or StoreError if it cannot be had unharmed."""
        # Taken out, so that its bytes are freed while the rest of the piece waits.
        return self._piece.result().pop(self._number)


class Reader:
    """Reads the samples of one split, each lane in the order of the plan."""

    def __init__(self, index: Index, split: str) -> None:
        self._index, self._shards = index, index.shards(split)
        self._pool = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        self._windows: dict[int, tuple[int, dict[_Piece, Future[dict[int, Sample]]]]] = {}
        self._sidecars: OrderedDict[int, Future[Sidecar]] = OrderedDict()
        self._lock = threading.Lock()

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
        """Stop fetching. What is being transferred just now ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._windows.clear()

    def _request(
        self, lane: int, window: int, shard: int, sample: int, first: int, end: int
    ) -> PendingSample:
        if lane not in self._windows or self._windows[lane][0] != window:
            # The lane has left its last window; what this rank did not need of it goes.
            self._windows[lane] = (window, {})
        pieces = self._windows[lane][1]
        piece = self._piece(shard, sample, first, end)
        if piece not in pieces:
            pieces[piece] = self._pool.submit(self._fetch, piece)
        return PendingSample(f"{self._shards[shard].name}, sample {sample}", pieces[piece], sample)

    def _piece(self, shard: int, sample: int, first: int, end: int) -> _Piece:
        row = self._shards[shard]
        length = max(PIECE_BYTES * row.samples // max(row.bytes, 1), 1)
        begin = sample // length * length
        return _Piece(shard, max(begin, first), min(begin + length, end))

    def _fetch(self, piece: _Piece) -> dict[int, Sample]:
        shard, sidecar = self._shards[piece.shard], self._sidecar(piece.shard)
        url = storage.join(self._index.root, shard.name)
        begin = int(sidecar.offsets[piece.first])
        end = int(sidecar.offsets[piece.end - 1] + sidecar.sizes[piece.end - 1])
        data = storage.read_bytes(url, begin, end)
        if _first_damaged(data, begin, sidecar, piece) is not None:
            # A transfer may have spoilt it; a second one tells that from a damaged shard.
            data = storage.read_bytes(url, begin, end)
            damaged = _first_damaged(data, begin, sidecar, piece)
            if damaged is not None:
                raise _damage(self._index, shard, sidecar, damaged, "its checksum is wrong")
        return _opened(data, self._index, shard, sidecar, piece)

    def _sidecar(self, number: int) -> Sidecar:
        """The sidecar of a shard; whoever asks first fetches it, the others wait."""
        with self._lock:
            mine = number not in self._sidecars
            future = self._sidecars.setdefault(number, Future())
            self._sidecars.move_to_end(number)
            if len(self._sidecars) > _SIDECARS_KEPT:
                self._sidecars.popitem(last=False)
        if mine:
            try:
                future.set_result(read_sidecar(self._index, self._shards[number]))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _first_damaged(data: bytes, begin: int, sidecar: Sidecar, piece: _Piece) -> int | None:
    """Number of the first sample in `data` whose checksum is wrong."""
    view = memoryview(data)
    for number in range(piece.first, piece.end):
        start = int(sidecar.offsets[number]) - begin
        if zlib.crc32(view[start : start + int(sidecar.sizes[number])]) != sidecar.checksums[number]:
            return number
    return None


def _opened(data: bytes, index: Index, shard: Shard, sidecar: Sidecar, piece: _Piece) -> dict[int, Sample]:
    """The samples in `data` by number. Raises ShardError if they are not the sidecar's."""
    numbers = range(piece.first, piece.end)
    try:
        samples = list(read_samples(data, shard.name))
    except Exception as error:
        # webdataset and tarfile report a broken tar by many unrelated exceptions.
        what = f"it cannot be read as a tar ({type(error).__name__}: {error})"
        raise _damage(index, shard, sidecar, piece.first, what) from error
    if [sample.key for sample in samples] != [sidecar.keys[number] for number in numbers]:
        raise _damage(index, shard, sidecar, piece.first, "the tar holds other samples")
    return dict(zip(numbers, samples, strict=True))


def _damage(index: Index, shard: Shard, sidecar: Sidecar, number: int, what: str) -> ShardError:
    return ShardError(
        f"{storage.shown(storage.join(index.root, shard.name))}: sample {sidecar.keys[number]!r} at byte "
        f"{int(sidecar.offsets[number]):,}: {what}, read twice. The shard was damaged or replaced; "
        f"`nvae shards verify {storage.shown(index.root)}` lists everything that is wrong. Build the data "
        f"set again, or restore the shard, and start the run again: it continues."
    )
