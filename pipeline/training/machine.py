"""What a training takes of its machine: processors, memory, disks, network, GPU.

Every rank samples its own machine in a thread of its own: a disk that does not answer, as of a
network file system, then delays nobody, and the loop takes what is known without a wait. MLflow
has a monitor for this, too, which was rejected: it talks to the server past the journal, gives
up at the first failure of the server, and counts samples where curves count images. The names
begin as its do, so that MLflow's pages show them as system metrics.
"""

import logging
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import psutil
import torch

from pipeline import storage

NAMES = MappingProxyType(
    {
        "memory/process_gib/max": "GiB of memory that a rank's process holds; the largest",
        "memory/allocated_gib/max": "GiB of tensors on a CUDA device, at the peak; the fullest rank",
        "memory/reserved_gib/max": "the same with what torch keeps for later: what the device must have",
        "system/cpu_fraction": "share of a machine's processors in use, by whomever; mean over the ranks",
        "system/memory_fraction/max": "share of a machine's memory in use, by whomever; the fullest",
        "system/received_mib_per_second": "MiB/s that a machine receives, from others; mean over the ranks",
        "system/sent_mib_per_second": "MiB/s that it sends, likewise",
        "system/store_free_gib/min": "GiB left on the disk of the store, where that is a local folder",
        "system/cache_free_gib/min": "GiB left on the disk of data.cache_folder; the fullest",
        "system/temporary_free_gib/min": "GiB left on the disk for temporary files; the fullest",
        "system/gpu_fraction": "share of the time in which a GPU computed at all; mean over the ranks",
        "system/gpu_watts": "power that a GPU takes; mean over the ranks",
    }
)
"""A name's end says what becomes of several samples, and of several ranks' values (`fold`)."""

SAMPLE_SECONDS = 5.0
FIRST_SAMPLE_SECONDS = 1.0
GIB, MIB = 2**30, 2**20

Probe = Callable[[], Mapping[str, float]]

logger = logging.getLogger(__name__)


def fold(name: str, values: Iterable[float]) -> float:
    """One value from several: the highest if `name` ends in /max, the lowest if in /min, else the
    mean. Those that are nan were not measured and do not count; nan if there is no other."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan
    if name.endswith("/max"):
        return max(known)
    return min(known) if name.endswith("/min") else statistics.fmean(known)


def folders(run_url: str | None, cache_folder: str | None) -> dict[str, Path]:
    """What a training writes to on disks of its machine, by what NAMES calls it."""
    found = {"temporary": Path(tempfile.gettempdir())}
    if run_url is not None and storage.is_local(run_url):
        found["store"] = Path(storage.normalize(run_url))
    if cache_folder is not None:
        found["cache"] = Path(cache_folder).expanduser()
    return found


class Machine:
    """Samples the machine of this rank while it is entered as a context manager."""

    def __init__(
        self, device: torch.device, folders: Mapping[str, Path], sample_seconds: float = SAMPLE_SECONDS
    ) -> None:
        """`folders` are those whose disks are watched."""
        self._device, self._folders, self._seconds = device, folders, sample_seconds
        self._new: list[Mapping[str, float]] = []
        self._newest: Mapping[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # Not for ever: it may hang on a disk, and dies with the process.
        self._thread.join(timeout=self._seconds)

    def read(self) -> dict[str, float]:
        """What was found since the last call, by the names of NAMES; the newest sample again if there
        is no other since. What this machine does not have, or has not told yet, is left out."""
        with self._lock:
            samples, self._new = self._new or [self._newest], []
        names = {name for sample in samples for name in sample}
        found = {name: fold(name, (sample.get(name, math.nan) for sample in samples)) for name in names}
        return found | device_memory(self._device)

    def _run(self) -> None:
        probes = self._probes()
        # Rates are counted from here.
        self._sample(probes)
        wait = min(self._seconds, FIRST_SAMPLE_SECONDS)
        while not self._stop.wait(wait):
            sample = self._sample(probes)
            with self._lock:
                self._new.append(sample)
                self._newest = sample
            wait = self._seconds

    @staticmethod
    def _sample(probes: list[Probe]) -> dict[str, float]:
        """What the probes find; one that fails is taken out."""
        sample: dict[str, float] = {}
        for probe in tuple(probes):
            try:
                sample |= probe()
            except Exception as error:
                # Whatever a driver or a disk raises: the training can do without the number.
                logger.warning("Some system metrics are missing: %s: %s", type(error).__name__, error)
                probes.remove(probe)
        return sample

    def _probes(self) -> list[Probe]:
        probes: list[Probe] = [partial(_processors, psutil.Process()), _Network()]
        probes += [partial(free_space, name, folder) for name, folder in self._folders.items()]
        if self._device.type == "cuda":
            probes.append(partial(_gpu, self._device))
        return probes


def _processors(process: psutil.Process) -> Mapping[str, float]:
    """Processors and memory, of the machine and of this process."""
    return {
        "memory/process_gib/max": process.memory_info().rss / GIB,
        # Since the last call, which psutil remembers of each thread.
        "system/cpu_fraction": psutil.cpu_percent() / 100,
        "system/memory_fraction/max": psutil.virtual_memory().percent / 100,
    }


class _Network:
    """Bytes per second since the last call."""

    def __init__(self) -> None:
        self._before: tuple[float, int, int] | None = None

    def __call__(self) -> Mapping[str, float]:
        before, self._before = self._before, self._counted()
        if before is None:
            return {}
        seconds, received, sent = (now - then for now, then in zip(self._before, before, strict=True))
        return {
            "system/received_mib_per_second": received / seconds / MIB,
            "system/sent_mib_per_second": sent / seconds / MIB,
        }

    @staticmethod
    def _counted() -> tuple[float, int, int]:
        """The time, and bytes received and sent by all interfaces but the machine's own."""
        flags = {name: state.flags for name, state in psutil.net_if_stats().items()}
        counters = [
            counter
            for name, counter in psutil.net_io_counters(pernic=True).items()
            if "loopback" not in flags.get(name, "")
        ]
        received, sent = (sum(getattr(c, name) for c in counters) for name in ("bytes_recv", "bytes_sent"))
        return time.monotonic(), received, sent


def free_space(name: str, folder: Path) -> Mapping[str, float]:
    """Of the disk on which `folder` is, or will be once it is made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return {f"system/{name}_free_gib/min": shutil.disk_usage(there).free / GIB}


def total_memory() -> int:
    """Bytes of main memory that this machine has."""
    return int(psutil.virtual_memory().total)


def device_memory(device: torch.device) -> dict[str, float]:
    """Peaks since the last call, which torch counts without being asked; empty on a CPU."""
    if device.type != "cuda":
        return {}
    found = {
        "memory/allocated_gib/max": torch.cuda.max_memory_allocated(device) / GIB,
        "memory/reserved_gib/max": torch.cuda.max_memory_reserved(device) / GIB,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _gpu(device: torch.device) -> Mapping[str, float]:
    """By the driver's management library, which needs nvidia-ml-py. It does not wait for the device."""
    return {
        "system/gpu_fraction": torch.cuda.utilization(device) / 100,
        "system/gpu_watts": torch.cuda.power_draw(device) / 1000,
    }
