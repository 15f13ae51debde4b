"""The Worker protocol implemented with Ray Train: what a training loop sees of the cluster.

Rank 0's lines of text, every rank's warnings, its marks and the driver's wishes travel by the
board (board.py) instead of Ray's forwarded logs: those prefix every line with a process, repeat
it once per node and cut progress off.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from cluster.board import REPORT_SECONDS, Report, Reporter
from nvae.model import NVAE
from nvae.parallel import data_parallel
from pipeline.training.watchdog import Phase, Pulse, end_process
from pipeline.training.worker import TRAINING_SECONDS

PATIENCE = timedelta(days=30)
"""How long a rank that trains waits for another: longer than storage.retry_seconds can be.

Torch's limit on collectives cannot tell a rank that hangs from one that waits for its bucket or
ends an upload; the watchdog can, and ends the group that stands still.
"""

_told_to_leave = threading.Event()
"""Set by the first SIGTERM of this process."""


def heed_sigterm() -> None:
    """From now on the first SIGTERM of this process is a wish to save and leave; the second ends it.

    Only the main thread of a worker process may call it; trainings run in another one.
    """
    previous = signal.getsignal(signal.SIGTERM)

    def heed(number: int, frame: FrameType | None) -> None:
        _told_to_leave.set()
        signal.signal(signal.SIGTERM, previous)

    signal.signal(signal.SIGTERM, heed)
    # A local Ray is started with the signal blocked (see nodes.py), which its processes inherit.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class RayWorker:
    """One rank of a Ray Train worker group; torch.distributed is set up by Ray."""

    def __init__(self, run_url: str, board: Any, group: str) -> None:
        """`board` and `group`: where to report, and as one of which start."""
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        runtime = ray.get_runtime_context()
        self.job = runtime.get_job_id()
        self.pulse = Pulse()
        self._node = runtime.get_node_id()
        self._run_url = run_url
        self._reporter = Reporter(board, group, self.rank)
        if self.world_size > 1:
            # Private, and the only way: a group is formed with the limit that it has from then on.
            _set_pg_timeout(PATIENCE)

    def wrap(self, model: NVAE) -> nn.Module:
        return model if self.world_size == 1 else data_parallel(model)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell the driver, and Ray, what an evaluation found. A barrier for Ray: all ranks call it.

        Checkpoints are uploaded by our own writer, which can verify and resume them without
        Ray, so that Ray is told the numbers only.
        """
        if self.rank == 0:
            self._reporter.tell({**metrics, TRAINING_SECONDS: self.pulse.training_seconds})
        ray.train.report(dict(metrics))

    def stop_wanted(self) -> bool:
        return self._reporter.wish == "leave" or _told_to_leave.is_set()

    def stop_requested(self) -> bool:
        """Whether any rank knows of a wish to stop. Collective."""
        self.pulse.alive()
        wanted = torch.tensor(float(self.stop_wanted()), device=self.device)
        return bool(self.all_reduce(wanted).item())

    def mark(self, phase: Phase, images_seen: int) -> None:
        self.pulse.mark(phase, images_seen)

    def alive(self) -> None:
        self.pulse.alive()

    def say(self, line: str) -> None:
        """Show a line to the user; rank 0 alone speaks."""
        if self.rank == 0:
            self._reporter.say(line)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Meanwhile the board knows of this rank, and its warnings are shown to the user.

        The last it hears is that the rank's work is over, if it ended well.
        """
        done = threading.Event()

        def report() -> None:
            while not done.is_set():
                self._report()
                done.wait(REPORT_SECONDS)

        handler, logger = _ToBoard(self.rank, self._reporter), logging.getLogger("pipeline")
        logger.addHandler(handler)
        thread = threading.Thread(target=report, name="report", daemon=True)
        thread.start()
        try:
            yield
            self.pulse.over()
        finally:
            logger.removeHandler(handler)
            done.set()
            thread.join()
            self._report()

    def _report(self) -> None:
        mark = self.pulse.read()
        self._reporter.send(Report(mark, self._node, _told_to_leave.is_set()))
        if self._reporter.wish == "end":
            end_process(self._run_url, self.rank, mark, linger_seconds=5 * REPORT_SECONDS)


class _ToBoard(logging.Handler):
    def __init__(self, rank: int, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._rank, self._reporter = rank, reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.say(f"Worker {self._rank}: {record.getMessage()}")


class TorchGroup(TorchConfig):  # type: ignore[misc]
    """Torch's process group, on workers whose processes heed SIGTERM."""

    @property
    def backend_cls(self) -> type[Any]:
        return _HeedingBackend


class _HeedingBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(heed_sigterm)
        super().on_start(worker_group, backend_config)
