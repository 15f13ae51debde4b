"""What may be computed otherwise than the plain model says, for speed alone.

The plain path is the readable truth, and the oracle of every lever's test: a lever changes no
value but by rounding, and no error of a value to more than twice the plain path's. Each is here
because it pays, by `python tests/benchmarks/step.py --ablation`; what did not is named in the docstring
of the file it would have been in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch


@dataclass(frozen=True)
class Levers:
    """Which are on."""

    channels_last: bool = False
    """Activations with the channels of a pixel side by side."""
    depthwise: bool = False
    """The weight gradient of depthwise convolutions by depthwise.c; needs channels_last and fp32."""

    weights_by_shape: bool = False
    """Weight normalization of all layers of one shape at a time: a thirtieth of the operations. On a CPU
    it does not pay, since single weights stay in the cache, and large stacks do not."""

    packed: bool = False
    """Weights, gradients, averages and buffers each in one tensor, for what passes over all of them."""

    def names(self) -> tuple[str, ...]:
        """Of those that are on."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))


PLAIN = Levers()
ON_CPU = Levers(channels_last=True, depthwise=True, packed=True)


Lever = Literal["channels_last", "depthwise", "weights_by_shape", "packed"]
Choice = Literal["auto"] | Sequence[Lever]
"""Names of levers, or "auto": those that have been measured to pay on the device."""


def levers_for(device: torch.device, choice: Choice = "auto") -> Levers:
    """What is to be used on this kind of device. By "auto" it is nothing on GPUs, where nothing has been
    measured."""
    if choice == "auto":
        return ON_CPU if device.type == "cpu" else PLAIN
    return Levers(**dict.fromkeys(choice, True))
