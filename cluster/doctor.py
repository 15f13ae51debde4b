"""`nvae doctor`: what has to be right before a training starts, each with its remedy.

Every check does the real thing (writes to the store, starts Ray, asks MLflow) rather than
asking whether it looks possible.
"""

import importlib.util
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline import config_file, storage
from pipeline import store as stores
from pipeline.data.index import VALIDATION, load_index
from pipeline.data.loader import check_fits, training_batches
from pipeline.errors import InputError
from pipeline.preparation import settle

_DISK_GIB = 5
_SHM_GIB = 1
_RAY_SECONDS = 120


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class _FailedError(Exception):
    """A check that failed: what was found, and the remedy."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


def examine(config: str | None, store: str | None, tracking: str | None) -> Iterator[Result]:
    """The results of all checks, one by one."""
    located = stores.locate(store)
    yield _result("python", _python)
    yield _result("packages", _packages)
    yield _result("devices", _devices)
    yield _result("c compiler", _compiler)
    yield _result("disk", _disk)
    yield _result("shared memory", _shared_memory)
    yield _result("ray", _ray)
    yield _result("store", lambda: _store(located))
    yield _result("mlflow", lambda: _mlflow(located, tracking))
    if config is not None:
        yield _result("config", lambda: _config(config))
        yield _result("data", lambda: _data(config, located))


def _result(name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(name, True, check())
    except _FailedError as failure:
        return Result(name, False, str(failure), failure.remedy)
    except InputError as error:
        return Result(name, False, str(error), "the message says what to do")
    except Exception as error:  # A check that cannot be carried out has failed, whatever stopped it.
        return Result(
            name, False, f"{type(error).__name__}: {error}", "see what this check needs in the README"
        )


def _python() -> str:
    return f"{platform.python_version()} on {platform.machine()}"


def _packages() -> str:
    missing = [
        name for name in ("torch", "mlflow", "ray", "webdataset") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise _FailedError(f"{', '.join(missing)} missing", "pip install 'nvae-cluster[train]'")
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "mlflow", "webdataset"))


def _devices() -> str:
    import torch

    cores = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; {cores}"
    if shutil.which("nvidia-smi"):
        raise _FailedError(
            f"an NVIDIA driver, but torch {torch.__version__} sees no GPU",
            "install a CUDA build of torch that fits the driver (`nvidia-smi` names its CUDA version)",
        )
    return f"no GPU; {cores}"


def _compiler() -> str:
    import torch

    from nvae import depthwise

    if torch.cuda.is_available():
        return "of use on machines without a GPU only"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if depthwise.available():
            return "there, and builds what is faster in C"
    raise _FailedError("; ".join(str(warning.message) for warning in caught), "install gcc or clang")


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < _DISK_GIB:
        raise _FailedError(
            f"{free:.1f} GiB free here", "free some space, or put the store elsewhere with --store"
        )
    return f"{free:.0f} GiB free here"


def _shared_memory() -> str:
    if not Path("/dev/shm").is_dir():
        return "no /dev/shm on this system"
    size = shutil.disk_usage("/dev/shm").total / 2**30
    if size < _SHM_GIB:
        raise _FailedError(f"{size:.2f} GiB", "start the container with --shm-size=2g; Ray is slow without")
    return f"{size:.0f} GiB"


def _ray() -> str:
    import ray

    from cluster.nodes import ray_connection

    with ray_connection(workers=1):
        version = ray.get(ray.remote(platform.python_version).remote(), timeout=_RAY_SECONDS)
        resources = ray.cluster_resources()
    if version != platform.python_version():
        raise _FailedError(
            f"the cluster's workers have Python {version}, this machine {platform.python_version()}",
            "use the same version on both: what is sent between them cannot be read otherwise",
        )
    return f"{resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs; ran a task"


def _store(store: str) -> str:
    url = storage.join(store, f"doctor-{uuid.uuid4().hex}")
    content = os.urandom(1 << 16)
    storage.write_bytes(url, content)
    read = storage.read_bytes(url)
    storage.delete(url)
    if read != content:
        raise _FailedError(f"{store} gave back other bytes than were written", "use another store")
    return f"{store}: written, read and deleted 64 KiB"


def _mlflow(store: str, tracking: str | None) -> str:
    from cluster.models import tracking_uri
    from pipeline.models.names import MissingDatabaseError
    from pipeline.models.registry import Registry

    uri = tracking_uri(store, tracking)
    try:
        return f"{storage.shown(uri)}: {len(Registry(uri).names())} registered models"
    except MissingDatabaseError:
        return f"{storage.shown(uri)}: not there yet, the first training creates it"


def _config(name: str) -> str:
    return f"{len(config_file.leaves(config_file.load(name)))} settings in order"


def _data(name: str, store: str) -> str:
    config = settle(config_file.load(name), store)
    index = load_index(config.data.root)
    check_fits(config, index)
    size = config.train.batch_size
    with closing(training_batches(config, index, rank=0, world_size=1, start=0, stop=size)) as batches:
        images = next(batches).images
    return (
        f"{config.data.root}: {index.num_samples('train'):,} training and "
        f"{index.num_samples(VALIDATION):,} validation images; read a batch of {len(images)}"
    )
