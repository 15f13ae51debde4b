"""Where a training runs, as the loop sees it: its rank, its device, its colleagues.

The loop knows this protocol alone, so that the same code runs in one process, under Ray
Train, and in tests. `LocalWorker` is one process without Ray; Ray's is in
cluster/ray_worker.py. Rejected: calling ray.train inside the loop and replacing it by
mocks in tests, which tests the mocks.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from nvae.model import NVAE
from pipeline import progress
from pipeline.training.watchdog import Phase, Pulse

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 2.0
TRAINING_SECONDS = "training_seconds"
"""Under this name a worker that tells others of an evaluation adds how long it has trained so far."""

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """One of `world_size` processes that train the same model on shares of each batch."""

    @property
    def rank(self) -> int:
        """0 .. world_size - 1; rank 0 writes checkpoints and curves."""

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def job(self) -> str:
        """What the cluster calls the job that started this worker; `local` without one."""

    def wrap(self, model: NVAE) -> nn.Module:
        """The model, on this worker's device, made to average gradients over all ranks."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place and returns it. Every rank must call it."""

    def barrier(self) -> None:
        """Returns when every rank has called it."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells whoever started the worker what an evaluation found.

        Every rank must call it equally often. It may last until the one who is told has decided
        whether the training is to go on.
        """

    def stop_wanted(self) -> bool:
        """Whether this rank knows of a wish that the training be saved and left.

        Costs nothing and asks nobody: ranks may learn of it at different times.
        """

    def stop_requested(self) -> bool:
        """Whether any rank knows of such a wish; the same answer on every rank.

        Every rank must call it equally often.
        """

    def mark(self, phase: Phase, images_seen: int) -> None:
        """This rank begins a phase of its work: how it is known to be alive, and where it is."""

    def alive(self) -> None:
        """A part of a long phase is done, such as a batch of an evaluation."""

    def say(self, line: str) -> None:
        """Shows a line to the user; of all ranks, 0 alone is heard."""


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a wish to stop, within a `with` block.

    Training then ends its step, writes a checkpoint and leaves cleanly. The second signal
    acts as it did before the block, so that an impatient Ctrl-C still interrupts. Only the
    main thread can receive signals: in any other the block changes nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()
        # Not through logging: the signal may have arrived in the middle of a line being logged.
        name = signal.Signals(number).name
        with suppress(OSError):  # nobody may be left to read it, as behind `| tee`
            os.write(2, f"{name}: stopping after a checkpoint; once more stops at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


class Poll:
    """Asks a question in a thread of its own, within a `with` block, until the answer is yes.

    Called, it says what is known, which costs nothing. A question that fails is asked again.
    """

    def __init__(self, question: Callable[[], bool], seconds: float = POLL_SECONDS) -> None:
        self._question, self._seconds = question, seconds
        self._yes, self._done = False, threading.Event()
        self._thread = threading.Thread(target=self._ask, name="poll", daemon=True)

    def __call__(self) -> bool:
        return self._yes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not joined: the question may be on its way to a store that does not answer.
        self._done.set()

    def _ask(self) -> None:
        while not self._yes and not self._done.is_set():
            try:
                self._yes = self._question()
            except Exception:
                # Of whatever kind: nobody would hear of a wish after it, nor see this thread end.
                logger.warning("a question failed and is asked again", exc_info=True)
            self._done.wait(self._seconds)


class LocalWorker:
    """The only worker of a training, in this process. Use it as a context manager."""

    rank = 0
    world_size = 1
    job = "local"

    def __init__(
        self, device: torch.device | None = None, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """`device`: by default the first CUDA device, or the CPU where there is none.

        `asked_to_stop` tells of wishes that come by other ways than a signal; it is called in
        every update.
        """
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._signals = StopSignals()
        self._asked_to_stop = asked_to_stop
        self.pulse = Pulse()

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)

    def wrap(self, model: NVAE) -> nn.Module:
        return model.to(self.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return None

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody started this worker but its own process, which knows everything already."""

    def stop_wanted(self) -> bool:
        return self._signals.received or self._asked_to_stop()

    def stop_requested(self) -> bool:
        self.pulse.alive()
        return self.stop_wanted()

    def mark(self, phase: Phase, images_seen: int) -> None:
        self.pulse.mark(phase, images_seen)

    def alive(self) -> None:
        self.pulse.alive()

    def say(self, line: str) -> None:
        progress.say(line)
