"""Where the time of an update goes: a profile of a few updates, on request.

`train.profile_at_images` says when. torch's profiler then watches rank 0 for a few updates, and
leaves two files among those of the run: a trace, which https://ui.perfetto.dev and
chrome://tracing show as a picture, and a table of the operations that take longest. Nothing is
measured, and nothing costs time, before and after.
"""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.profiler import ProfilerActivity, profile

from pipeline.training.tracking import Tracker
from pipeline.training.worker import Worker

UPDATES = 2
"""A model of 1,000 convolutions has 300,000 operations in each, for which torch takes half a minute."""
OPERATIONS = 40
"""Lines of the table."""


class Profiling:
    """Profiles the updates that begin at `at_images`, once; a context manager around the loop.

    A training that continues behind `at_images` makes no profile; one that begins with less and
    comes to it does, also if an earlier one did.
    """

    def __init__(self, at_images: int | None, worker: Worker, tracker: Tracker, images_seen: int) -> None:
        """`images_seen` is where this launch begins."""
        self._worker, self._tracker = worker, tracker
        self._at_images = at_images if at_images is not None and at_images >= images_seen else None
        self._profiler: profile | None = None
        self._updates = 0
        """Profiled so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that ends amid a profile still leaves it; one that fails has other troubles.
        if self._profiler is not None:
            self._profiler.stop()
            if kind is None:
                self._write()

    def before_update(self, images_seen: int) -> None:
        """Begin or end what is due. Every rank must call it; when it ends, they meet."""
        if self._at_images is None or images_seen < self._at_images:
            return
        if self._updates == 0:
            self._begin(images_seen)
        elif self._updates == UPDATES:
            self._end(images_seen)
        self._updates += 1

    def _begin(self, images_seen: int) -> None:
        self._at_images = images_seen
        self._worker.say(f"Profiling {UPDATES} updates of rank 0 ...")
        if self._worker.rank == 0:
            activities = [ProfilerActivity.CPU]
            if self._worker.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def _end(self, images_seen: int) -> None:
        # Of a large model the files take a minute.
        self._worker.mark("profile", images_seen)
        if self._profiler is not None:
            self._profiler.stop()
            self._write()
            self._profiler = None
        self._at_images = None
        # Else the others' next update would seem to take as long as writing the files.
        self._worker.barrier()

    def _write(self) -> None:
        assert self._profiler is not None
        name = f"profile-{self._at_images:012d}"
        on_cuda = self._worker.device.type == "cuda"
        table = self._profiler.key_averages().table(
            sort_by="self_device_time_total" if on_cuda else "self_cpu_time_total",
            row_limit=OPERATIONS,
            max_name_column_width=60,
        )
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(trace))
            self._tracker.file(f"{name}.json.gz", trace.read_bytes())
        self._tracker.file(f"{name}.txt", table.encode())
        self._worker.say(
            f"Profiled: files/{name}.json.gz (a trace for https://ui.perfetto.dev) and files/{name}.txt "
            "(the operations that take longest) are in the run's folder."
        )
