"""The Worker protocol implemented with Ray Train: what a training loop sees of the cluster.

Rank 0's lines of text, and every rank's warnings, travel to the driver through a queue instead
of Ray's forwarded logs: those prefix every line with a process, repeat it once per node and cut
progress off.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import run_folder
from pipeline.training.worker import Phase


class RayWorker:
    """One rank of a Ray Train worker group; torch.distributed is set up by Ray."""

    def __init__(self, run_url: str, console: Queue | None) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.job = ray.get_runtime_context().get_job_id()
        self._run_url = run_url
        self._console = console

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP; buffers are not broadcast, since batch norm synchronizes its own statistics."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell Ray that the run moved on. A barrier: all ranks call it equally often.

        Checkpoints are uploaded by our own writer, which can verify and resume them without
        Ray, so that Ray is told the numbers only.
        """
        ray.train.report(dict(metrics))

    def stop_wanted(self) -> bool:
        return self.rank == 0 and run_folder.stop_requested(self._run_url)

    def stop_requested(self) -> bool:
        """Whether the run was asked to stop, agreed by all ranks. Collective."""
        wanted = torch.tensor(float(self.stop_wanted()), device=self.device)
        return bool(self.all_reduce(wanted).item())

    def mark(self, phase: Phase, images_seen: int) -> None:
        """Nobody watches."""

    def say(self, line: str) -> None:
        """Show a line to the user; rank 0 alone speaks."""
        if self.rank == 0 and self._console is not None:
            self._console.put(line)

    @contextmanager
    def warnings_shown(self) -> Iterator[None]:
        """Meanwhile the pipeline's warnings on this rank are shown to the user, with the rank."""
        if self._console is None:
            yield
            return
        handler, logger = _ToConsole(self.rank, self._console), logging.getLogger("pipeline")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _ToConsole(logging.Handler):
    def __init__(self, rank: int, console: Queue) -> None:
        super().__init__(logging.WARNING)
        self._rank, self._console = rank, console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.put(f"Worker {self._rank}: {record.getMessage()}")
        except Exception:
            # As the logging module does: a message that cannot be passed on ends no training.
            self.handleError(record)
