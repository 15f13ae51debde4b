"""What one process of step.py measures: steps of one path, the work of a step, or the machine's ceilings.

    python tests/benchmarks/step_process.py measure|work|ceilings '{"preset": "mnist", ...}' STEPS

The last line of its output is JSON. The model settings are in presets.json beside it, since reading
configs/ needs YAML; a test holds both equal.

The stages are the profiler's ranges in nvae/step.py, replaced here by a stopwatch: profiling the tens
of thousands of operations of a step takes a GiB and most of a minute.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import nvae.step  # noqa: E402
from nvae.batch_norm import ActivationCheckpointing  # noqa: E402
from nvae.config import NVAEConfig  # noqa: E402
from nvae.levers import levers_for  # noqa: E402
from nvae.model import NVAE  # noqa: E402
from nvae.noise import by_group, image_noise  # noqa: E402
from nvae.optimizer import make_ema, make_optimizer  # noqa: E402
from nvae.step import Coefficients, StepSettings, update  # noqa: E402

PRESETS: dict[str, Any] = json.loads((Path(__file__).parent / "presets.json").read_text())
STAGES = ("data", "forward", "regularization", "backward", "optimizer", "rest")
_STAGE_OF = {"penalties": "regularization"}
UNTIMED = 2
"""Steps before those that count: the first touches memory for the first time, makes 40 power iterations
instead of 4, and its average is a copy."""


@dataclass(frozen=True)
class Case:
    """What is measured, by one path."""

    preset: str
    channels: int | None = None
    """Of the towers; None: the preset's."""
    batch: int = 1
    checkpointing: ActivationCheckpointing = "batch_norm"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    threads: int | None = None
    levers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.preset if self.channels is None else f"{self.preset} at {self.channels} channels"

    @property
    def config(self) -> NVAEConfig:
        settings = dict(PRESETS[self.preset])
        if self.channels is not None:
            settings |= {"encoder_channels": self.channels, "decoder_channels": self.channels}
        return NVAEConfig(**settings)


def device_of(case: Case) -> torch.device:
    return torch.device(case.device)


class Training:
    """A model in training on random images, which wait in the host's memory, as a loader leaves them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device_of(case)
        self.model = NVAE(case.config).to(self.device)
        self.model.set_activation_checkpointing(case.checkpointing)
        self.model.use(levers_for(self.device, case.levers))  # type: ignore[arg-type]
        self.optimizer = make_optimizer(self.model, weight_decay=3e-4)
        self.ema = make_ema(self.model, decay=0.9995)
        config = self.model.config
        shape = (case.batch, config.image_channels, config.image_size, config.image_size)
        levels = 2 if config.likelihood == "bernoulli" else 256
        images = torch.randint(0, levels, shape, dtype=torch.uint8)
        self.images = images.pin_memory() if self.device.type == "cuda" else images
        self.number = 0

    def step(self) -> float:
        """The loss of one more."""
        with nvae.step.record_function("step/data"):
            images = self.images.to(self.device, non_blocking=True)
            noise = image_noise(range(self.case.batch), self.model.config, self.device, seed=self.number)
        self.number += 1
        result = update(
            self.model,
            self.optimizer,
            images,
            Coefficients(learning_rate=1e-3, kl=0.5, spectral=1e-2),
            StepSettings(precision=self.case.precision),
            noise=noise,
            ema=self.ema,
        )
        wait_for(self.device)
        return result.reading.loss


def measure(case: Case, steps: int) -> dict[str, Any]:
    training = Training(case)
    first, seconds, losses = [], [], []
    for number in range(UNTIMED + steps):
        began = time.perf_counter()
        losses.append(training.step())
        (first if number < UNTIMED else seconds).append(time.perf_counter() - began)
    peak = peak_memory(training.device)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "losses": losses,
        "peak_memory_bytes": peak,
        "stages": stages(training),
        "device_name": device_name(training.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
    }


def stages(training: Training) -> dict[str, float]:
    """Seconds of each in the shorter of two steps."""
    found: list[dict[str, float]] = []
    plain = nvae.step.record_function
    for _ in range(2):
        clock: dict[str, float] = {}
        nvae.step.record_function = _stopwatch(training.device, clock)  # type: ignore[assignment, misc]
        began = time.perf_counter()
        training.step()
        whole = time.perf_counter() - began
        found.append(clock | {"rest": whole - sum(clock.values())})
    nvae.step.record_function = plain  # type: ignore[misc]
    return min(found, key=lambda clock: sum(clock.values()))


def _stopwatch(device: torch.device, seconds: dict[str, float]) -> Any:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        last = name.rpartition("/")[2]
        wait_for(device)
        began = time.perf_counter()
        yield
        wait_for(device)
        key = _STAGE_OF.get(last, last)
        seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began

    return stage


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def work(case: Case, steps: int) -> dict[str, Any]:
    """FLOPs and bytes of a step; see step.py."""
    config = case.config
    with torch.device("meta"):
        model = NVAE(config).eval().requires_grad_(False)
        image = torch.empty(1, config.image_channels, config.image_size, config.image_size)
        noise = torch.empty(1, config.num_latents)
    with FlopCounterMode(display=False) as counter:
        model(image, by_group(noise, config))
    training = Training(case)
    training.step()
    with _Traffic() as traffic:
        training.step()
    return {"flops": 3 * counter.get_total_flops() * case.batch, "bytes": traffic.bytes}


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operations read and write, but for those that only view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(map(_bytes, (*args, *(kwargs or {}).values(), result)))
        return result


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def ceilings(case: Case, steps: int) -> dict[str, Any]:
    """Of the machine, in the case's precision: the better of several."""
    device = device_of(case)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    big = device.type == "cuda"
    size = 8192 if big else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _shortest(lambda: a @ b, device)
    values = torch.ones(2**30 if big else 2**26, device=device)
    copy = torch.empty_like(values)
    copied = _shortest(lambda: copy.copy_(values), device)
    return {
        "flops_per_second": 2 * size**3 / product,
        "bytes_per_second": 2 * values.numel() * values.element_size() / copied,
    }


def _shortest(what: Any, device: torch.device) -> float:
    found = []
    for _ in range(6):
        began = time.perf_counter()
        what()
        wait_for(device)
        found.append(time.perf_counter() - began)
    return min(found)


WHAT = {"measure": measure, "work": work, "ceilings": ceilings}


def main(words: Sequence[str]) -> None:
    what, case, steps = words
    settings = json.loads(case)
    found = WHAT[what](Case(**settings | {"levers": tuple(settings["levers"])}), int(steps))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
