"""The model that a published command line describes: published arguments to our configuration.

Arguments come from files of strangers, and are used in shifts and as lengths of lists. So they are
believed only within ranges that are far above whatever was trained.
"""

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from nvae.config import CellFamily, Likelihood, NVAEConfig, NVAEConfigError


class PublishedCheckpointError(ValueError):
    """A file that is no checkpoint of the published implementation, or not one that fits."""


_LATER_ARGUMENTS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}
_BINARY_DATASETS = ("mnist", "omniglot")
_COUNTS = {
    "num_x_bits": range(1, 9),
    "num_latent_scales": range(1, 11),
    "num_groups_per_scale": range(1, 4097),
    "min_groups_per_scale": range(4097),
    "num_latent_per_group": range(4097),
    "num_channels_enc": range(4097),
    "num_channels_dec": range(4097),
    "num_preprocess_blocks": range(9),
    "num_postprocess_blocks": range(9),
    "num_preprocess_cells": range(101),
    "num_postprocess_cells": range(101),
    "num_cell_per_cond_enc": range(101),
    "num_cell_per_cond_dec": range(101),
    "num_nf": range(101),
    "num_mixture_dec": range(101),
}
"""Arguments that are whole numbers, each with what is believed of it."""
_FLAGS = ("ada_groups", "use_se", "res_dist")


def with_later_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, and those that older checkpoints lack, with the values that these were trained with."""
    return _LATER_ARGUMENTS | dict(arguments)


def config_from_arguments(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> NVAEConfig:
    """The model of a published command line.

    The image size is not among the arguments; it follows from the shape of the initial state.
    Raises PublishedCheckpointError if an argument is missing or the model cannot be built.
    """
    arguments = with_later_arguments(arguments)
    try:
        _check_arguments(arguments)
        return _config(arguments, state)
    except KeyError as error:
        raise PublishedCheckpointError(f"lacks the training argument or weight {error}") from error
    except NVAEConfigError as error:
        raise PublishedCheckpointError(f"its arguments describe no model of ours: {error}") from error


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises PublishedCheckpointError for a value that is of another type, or that nobody trained with.

    The others are used as they are, in shifts and as lengths of lists.
    """
    for name, believed in _COUNTS.items():
        value = arguments[name]
        if type(value) is not int or value not in believed:
            raise PublishedCheckpointError(
                f"its training argument {name} is {_shortly(value)}, no whole number from "
                f"{believed[0]} to {believed[-1]}"
            )
    for name in _FLAGS:
        if type(arguments[name]) is not bool:
            raise PublishedCheckpointError(
                f"its training argument {name} is {_shortly(arguments[name])}, neither true nor false"
            )
    for name in ("dataset", "arch_instance"):
        if type(arguments[name]) is not str:
            raise PublishedCheckpointError(
                f"its training argument {name} is {_shortly(arguments[name])}, no text"
            )
    if arguments["arch_instance"] not in get_args(CellFamily):
        raise PublishedCheckpointError(
            f"its arguments describe no model of ours: cell_family: must be one of "
            f"{', '.join(get_args(CellFamily))}, not {_shortly(arguments['arch_instance'])}"
        )


def _shortly(value: Any) -> str:
    # Not the repr of whatever it is: a list can hold itself a billion times.
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _dimension(state: Mapping[str, Tensor], name: str, dimension: int, dimensions: int) -> int:
    """One length of a weight that has `dimensions` of them."""
    if state[name].dim() != dimensions:
        raise PublishedCheckpointError(
            f"its weight {name} has {state[name].dim()} dimensions, not {dimensions}"
        )
    return state[name].shape[dimension]


def _config(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> NVAEConfig:
    blocks, scales = arguments["num_preprocess_blocks"], arguments["num_latent_scales"]
    if arguments["num_postprocess_blocks"] != blocks:
        raise PublishedCheckpointError(
            f"{arguments['num_postprocess_blocks']} post-processing blocks do not undo "
            f"{blocks} pre-processing blocks"
        )
    binary = arguments["dataset"] in _BINARY_DATASETS
    likelihood: Likelihood = "logistic_mixture"
    if binary:
        likelihood = "bernoulli"
    elif arguments["num_mixture_dec"] == 1:
        likelihood = "normal"
    return NVAEConfig(
        image_size=_dimension(state, "prior_ftr0", -1, 3) << (blocks + scales - 1),
        image_channels=_dimension(state, "stem.weight", 1, 4),
        pixel_bits=arguments["num_x_bits"],
        border_pixels=2 if binary else 0,
        likelihood=likelihood,
        mixture_components=arguments["num_mixture_dec"],
        groups_per_scale=groups_per_scale(
            scales,
            arguments["num_groups_per_scale"],
            adaptive=arguments["ada_groups"],
            minimum=arguments["min_groups_per_scale"],
        ),
        latent_channels=arguments["num_latent_per_group"],
        encoder_channels=arguments["num_channels_enc"],
        decoder_channels=arguments["num_channels_dec"],
        preprocess_blocks=blocks,
        preprocess_cells=arguments["num_preprocess_cells"],
        postprocess_cells=arguments["num_postprocess_cells"],
        encoder_cells_per_group=arguments["num_cell_per_cond_enc"],
        decoder_cells_per_group=arguments["num_cell_per_cond_dec"],
        cell_family=arguments["arch_instance"],
        squeeze_excitation=arguments["use_se"],
        residual_posterior=arguments["res_dist"],
        flow_pairs=arguments["num_nf"],
        published_compatibility=True,
    )


def groups_per_scale(scales: int, finest: int, *, adaptive: bool, minimum: int) -> tuple[int, ...]:
    """Groups of each scale, coarsest first, from the published arguments.

    `finest` groups in the finest scale; the same in every other or, if `adaptive`, half as
    many as in the next finer one, but at least `minimum`.
    """
    counts = [finest]
    for _ in range(scales - 1):
        counts.append(max(minimum, counts[-1] // 2) if adaptive else counts[-1])
    return tuple(reversed(counts))
