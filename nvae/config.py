"""The shape of an NVAE, as a frozen dataclass of the standard library.

Nothing but the standard library is needed, so that a checkpoint's configuration can be
read and checked anywhere. `problems` returns every mistake at once, each with the field
it belongs to; the configuration file reader merges them with its own.

Scales are listed coarsest first everywhere: in `groups_per_scale`, in the numbers of the
latent groups, in metrics. That is the order in which the model generates.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

Likelihood = Literal["bernoulli", "normal", "logistic_mixture"]
CellFamily = Literal[
    "res_elu",
    "res_bnelu",
    "res_bnswish",
    "mbconv_sep",
    "mbconv_sep11",
    "res_mbconv",
    "res53_mbconv",
    "res35_mbconv",
    "res55_mbconv",
    "mbconv_res",
    "mbconv_den",
    "res_mbconv9",
]


class NVAEConfigError(ValueError):
    """An NVAEConfig that cannot be built; `problems` holds every (field, message)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{field}: {message}" for field, message in problems))


@dataclass(frozen=True)
class NVAEConfig:
    """Everything that decides the shapes and the mathematics of an NVAE.

    Raises NVAEConfigError with all problems together if the values do not fit each other.
    """

    image_size: int = 32
    """Height and width of the images that the model sees, padding included, in pixels."""
    image_channels: int = 3
    """Colour planes of an image: 3, or 1 for grey."""
    pixel_bits: int = 8
    """Bits per colour value that are modelled: 8, or 5 as for the paper's 256x256 models."""
    border_pixels: int = 0
    """Rows and columns of padding on each side; they do not count in the likelihood."""
    likelihood: Likelihood = "logistic_mixture"
    """Distribution of the image given the latents: bernoulli (binary images), normal, or
    logistic_mixture (discretized, as in PixelCNN++)."""
    mixture_components: int = 10
    """Components of the logistic mixture."""
    groups_per_scale: tuple[int, ...] = (10,)
    """Latent groups of each scale, coarsest first. `[1]` alone is a plain VAE without towers."""
    latent_channels: int = 20
    """Channels of each latent group."""
    encoder_channels: int = 32
    """Channels of the encoder at full resolution; doubled at every halving."""
    decoder_channels: int = 32
    """Channels of the decoder at full resolution; doubled at every halving."""
    preprocess_blocks: int = 2
    """Blocks before the towers, each of which halves the resolution; as many after them
    double it again."""
    preprocess_cells: int = 3
    """Cells in each block before the towers."""
    postprocess_cells: int = 3
    """Cells in each block after the towers."""
    encoder_cells_per_group: int = 1
    """Bottom-up cells for each latent group."""
    decoder_cells_per_group: int = 1
    """Top-down cells for each latent group."""
    cell_family: CellFamily = "res_mbconv"
    """Which residual cells the towers are made of (the paper's ablation of cells)."""
    squeeze_excitation: bool = True
    """Whether each cell ends in a squeeze-and-excitation gate."""
    residual_posterior: bool = True
    """Whether posteriors are predicted relative to their priors (NVAE Sec. 3.2)."""
    flow_pairs: int = 0
    """Pairs of autoregressive flow cells after each posterior; the paper counts each pair as two."""
    published_compatibility: bool = False
    """Reproduce the published implementation where it is known to be wrong, for parity and for
    imported checkpoints. It switches:
    the probability of a pixel under the logistic mixture (8 bits: value 254 counts as open-ended,
    so that probabilities sum to more than 1; small ones are approximated by a density);
    the temperature of pixels (divides the logistic scales instead of multiplying them; ignored
    by the normal likelihood);
    cells of res_elu (initialize themselves from the first batch after every loading, in
    evaluation too, instead of once; and from the workers' mean spread, not that of the whole batch);
    KL balancing (by each worker's own images instead of the whole batch);
    the learning rate (constant within an epoch, and its cosine starts one step below the peak)."""

    def __post_init__(self) -> None:
        groups: Any = self.groups_per_scale
        if isinstance(groups, list):
            object.__setattr__(self, "groups_per_scale", tuple(groups))
        found = problems(dataclasses.asdict(self))
        if found:
            raise NVAEConfigError(found)

    @property
    def num_scales(self) -> int:
        return len(self.groups_per_scale)

    @property
    def num_groups(self) -> int:
        return sum(self.groups_per_scale)

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(Z, h, w) of each latent group, coarsest first."""
        finest = self.image_size >> self.preprocess_blocks
        return tuple(
            (self.latent_channels, size, size)
            for scale, groups in enumerate(self.groups_per_scale)
            for size in [finest >> (self.num_scales - 1 - scale)]
            for _ in range(groups)
        )

    @property
    def num_latents(self) -> int:
        """Of one image, all groups together."""
        return sum(math.prod(shape) for shape in self.latent_shapes)

    @property
    def dimensions(self) -> int:
        """Colour values per image that the likelihood counts: the D of bits per dimension."""
        return self.image_channels * (self.image_size - 2 * self.border_pixels) ** 2


RANGES: dict[str, tuple[int, int]] = {
    "image_size": (4, 4096),
    "pixel_bits": (1, 8),
    "border_pixels": (0, 512),
    "mixture_components": (1, 100),
    "latent_channels": (1, 4096),
    "encoder_channels": (2, 4096),
    "decoder_channels": (2, 4096),
    "preprocess_blocks": (0, 8),
    "preprocess_cells": (1, 100),
    "postprocess_cells": (1, 100),
    "encoder_cells_per_group": (1, 100),
    "decoder_cells_per_group": (1, 100),
    "flow_pairs": (0, 100),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "likelihood": get_args(Likelihood),
    "cell_family": get_args(CellFamily),
}
_FLAGS = ("squeeze_excitation", "residual_posterior", "published_compatibility")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_list_of_counts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(count) is int and count >= 1 for count in value)
    )


# Each field: its allowed values in words, and the test for them.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{
        name: (f"a whole number from {low} to {high}", partial(_is_whole, low=low, high=high))
        for name, (low, high) in RANGES.items()
    },
    **{name: (f"one of {', '.join(choices)}", choices.__contains__) for name, choices in _CHOICES.items()},
    **{name: ("true or false", lambda value: type(value) is bool) for name in _FLAGS},
    "image_channels": ("1 or 3", lambda value: type(value) is int and value in (1, 3)),
    "groups_per_scale": ("a list of whole numbers >= 1, coarsest scale first", _is_list_of_counts),
}


def allowed(field: str) -> str:
    """The values that a field takes, in words: "a whole number from 4 to 4096"."""
    return _ALLOWED[field][0]


def problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every reason why `NVAEConfig(**values)` would fail, as (field, message).

    Missing fields take their defaults. An empty list means that the values are fine.
    """
    known = {field.name: field.default for field in dataclasses.fields(NVAEConfig)}
    found = [(key, "unknown setting") for key in values if key not in known]
    given = known | {key: value for key, value in values.items() if key in known}
    for name, (words, is_allowed) in _ALLOWED.items():
        if not is_allowed(given[name]):
            found.append((name, f"must be {words}, not {given[name]!r}"))
    return found or _misfits(given)


def _misfits(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Problems between fields that are fine on their own."""
    found = []
    size, blocks, scales = given["image_size"], given["preprocess_blocks"], len(given["groups_per_scale"])
    halvings = blocks + scales - 1
    if size % (1 << halvings) or size >> halvings < 1:
        found.append(
            (
                "image_size",
                f"{size} cannot be halved {halvings} times "
                f"({blocks} preprocess_blocks and {scales} scales); use a multiple of {1 << halvings}",
            )
        )
    if 2 * given["border_pixels"] >= size:
        found.append(("border_pixels", f"leaves nothing of an image of {size} pixels"))
    if given["likelihood"] == "bernoulli" and given["image_channels"] != 1:
        found.append(("image_channels", "must be 1 with likelihood bernoulli (binary images)"))
    if given["likelihood"] == "logistic_mixture" and given["image_channels"] != 3:
        found.append(("image_channels", "must be 3 with likelihood logistic_mixture"))
    if tuple(given["groups_per_scale"]) == (1,) and given["encoder_channels"] != given["decoder_channels"]:
        found.append(
            ("decoder_channels", "must equal encoder_channels in a plain VAE (groups_per_scale [1])")
        )
    if given["cell_family"] == "mbconv_den" and blocks:
        # The grouped convolutions before and after the towers have 8 groups.
        narrowest = {
            "encoder_channels": given["encoder_channels"],
            "decoder_channels": given["decoder_channels"] * (2 if given["postprocess_cells"] == 1 else 1),
        }
        for name, channels in narrowest.items():
            if channels % 8:
                found.append((name, "must be a multiple of 8 with cell_family mbconv_den"))
    return found
