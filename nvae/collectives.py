# W ranks.
"""What ranks tell each other during an update, and how long each of them waits for it.

All collectives of an update are here: the sums and gathers of batch norm, KL balancing and the
loss, and the end of the backward pass. Gradients are averaged by DistributedDataParallel while
the backward pass still goes on; what counts as waiting is the rest, after the last gradient is
there. Asking DistributedDataParallel instead was rejected: it times its own sums, in every
hundredth update, and knows nothing of the hundreds of batch norms.

Waiting comprises the transfer and the delay of slower ranks, which look the same from within a
collective. The rank that comes last waits for nobody, so that the least waiting of all ranks is
about what the transfer takes.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable


class Stopwatch:
    """Adds up the time spent in its `with` blocks, which may not be nested.

    On a CUDA device that is the time between two points of its current stream, for which nobody
    waits before `read`; elsewhere it is the time of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []
        """Beginnings and ends by turns."""

    def __enter__(self) -> Self:
        if self._on_device:
            self._record()
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._on_device:
            self._record()
        else:
            self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        """Seconds since it was made or last read. Waits for the device."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._seconds = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
            self._events = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)


class Waiting:
    """Measures updates, each in a `with` block: how long they take, how long they wait for others.

    An event of CUDA costs microseconds, and a large model has a thousand collectives: there,
    measure some of the updates only.
    """

    def __init__(self, device: torch.device) -> None:
        self.total, self.waited = Stopwatch(device), Stopwatch(device)

    def __enter__(self) -> Self:
        global _stopwatch
        _stopwatch = self.waited
        self.total.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _stopwatch
        self.total.__exit__()
        _stopwatch = None


# Not a context variable: on a GPU the backward pass, with batch norm's sums, has a thread of its own.
_stopwatch: Stopwatch | None = None


def _timed() -> AbstractContextManager[object]:
    return _stopwatch or nullcontext()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up `tensor` over all ranks, in place, and returns it."""
    if world_size() > 1:
        with _timed():
            dist.all_reduce(tensor)
    return tensor


def gather(mine: Tensor) -> Tensor:
    """(N,) of every rank as (W, N)."""
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    with _timed():
        dist.all_gather(gathered, mine)
    return torch.stack(gathered)


def backward(loss: Tensor) -> None:
    """`loss.backward()`, at whose end gradients have been averaged where the model does that."""
    stopwatch = _stopwatch
    if stopwatch is None or world_size() == 1:
        loss.backward()  # type: ignore[no-untyped-call]
        return

    def last_gradient_is_there() -> None:
        stopwatch.__enter__()

    def begun(_: Tensor) -> None:
        # What is queued first is called first: DistributedDataParallel queues its waiting later.
        Variable._execution_engine.queue_callback(last_gradient_is_there)

    loss.register_hook(begun)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    stopwatch.__exit__()
