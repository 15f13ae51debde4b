"""Reads checkpoints of the published NVAE implementation into ours.

A published checkpoint is a pickle. It is opened by torch's restricted unpickler, which builds
tensors and plain containers and nothing else; besides these only argparse.Namespace is
allowed, which holds the training arguments. There is no fallback: a file that needs
more is refused, for unpickling it would run its author's code.

Module names differ (`published_names` is the dictionary), shapes and the order of parameters do
not. The model gets `published_compatibility=True`, since it was trained and measured with the published
code's peculiarities.
"""

import argparse
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvae.cells import Cell, InvertedOperation, ResidualOperation
from nvae.config import Likelihood, NVAEConfig, NVAEConfigError
from nvae.layers import BilinearExpand, FactorizedReduce, SqueezeExcitation
from nvae.model import NVAE, DecoderGroup, EncoderGroup


class PublishedCheckpointError(ValueError):
    """A file that is no checkpoint of the published implementation, or not one that fits."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A model and what its training needs to go on."""

    model: NVAE
    """In training mode, on the CPU, in fp32."""
    config: NVAEConfig
    optimizer_state: Mapping[str, Mapping[str, Tensor]]
    """Adamax's `step` (0-d, fp32), `exp_avg` and `exp_inf` of each parameter by our name."""
    optimizer_settings: Mapping[str, Any]
    """lr, initial_lr, betas, eps and weight_decay at the end of the last step."""
    scheduler: Mapping[str, Any]
    """State of the cosine schedule, which counts epochs."""
    grad_scaler: Mapping[str, Any]
    """State of the loss scaling that was used with fp16."""
    epoch: int
    """The epoch that comes next."""
    global_step: int
    """Updates made so far."""
    arguments: Mapping[str, Any]
    """The published command line arguments, defaults included."""


# Arguments that older checkpoints lack, with the values they were trained with.
_LATER_ARGUMENTS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}
_BINARY_DATASETS = ("mnist", "omniglot")
_ENTRIES = ("state_dict", "optimizer", "scheduler", "grad_scalar", "epoch", "global_step", "args")


def load_published(source: str | os.PathLike[str] | bytes) -> PublishedCheckpoint:
    """The checkpoint in a file, or in the bytes of one.

    Raises PublishedCheckpointError if it cannot be read, needs more than tensors and plain
    values, or does not fit the model that its arguments describe.
    """
    where = "checkpoint" if isinstance(source, bytes) else str(source)
    try:
        return _convert(_read(source))
    except PublishedCheckpointError as error:
        raise PublishedCheckpointError(f"{where}: {error}") from error


def _read(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise PublishedCheckpointError(f"cannot be read: {error.strerror}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Any error at all: torch's reader meets damaged files with whatever goes wrong first.
        raise PublishedCheckpointError(_why_unreadable(error)) from error
    if not isinstance(loaded, dict):
        raise PublishedCheckpointError(f"holds a {type(loaded).__name__} instead of a training state")
    missing = [entry for entry in _ENTRIES if entry not in loaded]
    if missing:
        raise PublishedCheckpointError(
            f"lacks {', '.join(missing)}; a checkpoint of the published train.py is needed"
        )
    return loaded


def _why_unreadable(error: Exception) -> str:
    """In our words: torch's advise to load the file without protection."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"needs the Python object {refused[1]} and was not opened, since that would run code from the "
            f"file; only tensors, plain values and argparse.Namespace are allowed"
        )
    return f"not a checkpoint, or damaged ({type(error).__name__} on reading)"


def _convert(loaded: Mapping[str, Any]) -> PublishedCheckpoint:
    if not isinstance(loaded["args"], argparse.Namespace):
        raise PublishedCheckpointError(
            f"its args are a {type(loaded['args']).__name__}, not an argparse.Namespace"
        )
    arguments = _LATER_ARGUMENTS | vars(loaded["args"])
    state: dict[str, Tensor] = loaded["state_dict"]
    config = config_from_arguments(arguments, state)
    model = NVAE(config)
    _load_state(model, state)
    optimizer = loaded["optimizer"]
    settings = dict(optimizer["param_groups"][0])
    order = settings.pop("params")
    return PublishedCheckpoint(
        model=model,
        config=config,
        optimizer_state=_optimizer_state(model, order, optimizer["state"]),
        optimizer_settings=settings,
        scheduler=loaded["scheduler"],
        grad_scaler=loaded["grad_scalar"],
        epoch=loaded["epoch"],
        global_step=loaded["global_step"],
        arguments=arguments,
    )


def config_from_arguments(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> NVAEConfig:
    """The model of a published command line.

    The image size is not among the arguments; it follows from the shape of the initial state.
    Raises PublishedCheckpointError if an argument is missing or the model cannot be built.
    """
    try:
        return _config(arguments, state)
    except KeyError as error:
        raise PublishedCheckpointError(f"lacks the training argument or weight {error}") from error
    except NVAEConfigError as error:
        raise PublishedCheckpointError(f"its arguments describe no model of ours: {error}") from error


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
        image_size=state["prior_ftr0"].shape[-1] << (blocks + scales - 1),
        image_channels=state["stem.weight"].shape[1],
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


def published_names(model: NVAE) -> dict[str, str]:
    """The published name of every entry of `model.state_dict()`, by ours; singular vectors have none."""
    names = {}
    if hasattr(model, "initial_state"):
        names["initial_state"] = "prior_ftr0"
    for ours, published in _modules(model):
        for entry in model.get_submodule(ours).state_dict():
            names[f"{ours}.{entry}"] = f"{published}.{entry}"
    return names


def _load_state(model: NVAE, state: Mapping[str, Tensor]) -> None:
    names = published_names(model)
    # Aliases of the unnormalized weights, and a parameter that a plain VAE has no use for.
    ignored = {name for name in state if name.endswith(".weight_normalized")} | {"prior_ftr0"}
    missing = sorted(set(names.values()) - set(state))
    unknown = sorted(set(state) - set(names.values()) - ignored)
    if missing or unknown:
        raise PublishedCheckpointError(
            f"its weights do not belong to its arguments: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
    try:
        # Not strict: the published code keeps no singular vectors. All other names are checked above.
        model.load_state_dict({ours: state[published] for ours, published in names.items()}, strict=False)
    except RuntimeError as error:
        raise PublishedCheckpointError(f"its weights do not fit its arguments: {error}") from error


def _optimizer_state(
    model: NVAE, order: list[int], state: Mapping[int, Mapping[str, Any]]
) -> dict[str, dict[str, Tensor]]:
    """By our names, from entries numbered in the order of the published parameters."""
    parameters: list[tuple[str, nn.Parameter] | None] = list(model.named_parameters())
    if not hasattr(model, "initial_state"):
        parameters.insert(0, None)
    if len(order) != len(parameters):
        raise PublishedCheckpointError(
            f"its optimizer has {len(order)} parameters, the model {len(parameters)}"
        )
    named = {}
    for index, parameter in zip(order, parameters, strict=True):
        if parameter is None or index not in state:
            continue
        name, value = parameter
        named[name] = _adamax_entry(name, value, state[index])
    return named


def _adamax_entry(name: str, parameter: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        found = {"step": torch.tensor(float(entry["step"]))}
        found |= {key: entry[key] for key in ("exp_avg", "exp_inf")}
    except KeyError as error:
        raise PublishedCheckpointError(f"its optimizer is not Adamax: {name} has no {error}") from error
    if any(found[key].shape != parameter.shape for key in ("exp_avg", "exp_inf")):
        raise PublishedCheckpointError(f"its optimizer state does not fit the parameter {name}")
    return found


Names = Iterator[tuple[str, str]]
"""Pairs of module names: ours, published."""


def _modules(model: NVAE) -> Names:
    """Of every module that has weights, in the order of the published parameters."""
    yield "stem", "stem"
    yield from _cells(model.preprocess, "preprocess", "pre_process")
    yield from _encoder_tower(model)
    yield "encoder_head", "enc0.1"
    yield from ((f"posterior_heads.{i}", f"enc_sampler.{i}") for i in range(len(model.posterior_heads)))
    yield from ((f"prior_heads.{i}", f"dec_sampler.{i}.1") for i in range(len(model.prior_heads)))
    yield from _flows(model)
    if hasattr(model, "latent_projection"):
        yield "latent_projection", "stem_decoder"
    yield from _decoder_tower(model)
    yield from _cells(model.postprocess, "postprocess", "post_process")
    yield "image_head", "image_conditional.1"


def _encoder_tower(model: NVAE) -> Names:
    index = 0
    for position, group in enumerate(model.encoder_tower):
        assert isinstance(group, EncoderGroup)
        ours = f"encoder_tower.{position}"
        yield from _cells(group.cells, f"{ours}.cells", "enc_tower", first=index)
        index += len(group.cells)
        if group.combiner is not None:
            yield f"{ours}.combiner.convolution", f"enc_tower.{index}.conv"
            index += 1
        if group.down is not None:
            yield from _cell(group.down, f"{ours}.down", f"enc_tower.{index}")
            index += 1


def _decoder_tower(model: NVAE) -> Names:
    index = 0
    for position, group in enumerate(model.decoder_tower):
        assert isinstance(group, DecoderGroup)
        ours = f"decoder_tower.{position}"
        yield from _cells(group.cells, f"{ours}.cells", "dec_tower", first=index)
        index += len(group.cells)
        yield f"{ours}.combiner.convolution", f"dec_tower.{index}.conv"
        index += 1
        if group.up is not None:
            yield from _cell(group.up, f"{ours}.up", f"dec_tower.{index}")
            index += 1


def _flows(model: NVAE) -> Names:
    index = 0
    for group, pairs in enumerate(model.flows):
        assert isinstance(pairs, nn.Sequential)
        for pair in range(len(pairs)):
            for cell, name in (("first", "cell1"), ("second", "cell2")):
                ours, published = f"flows.{group}.{pair}.{cell}", f"nf_cells.{index}.{name}"
                yield f"{ours}.widen", f"{published}.conv.convz.0"
                yield f"{ours}.spatial", f"{published}.conv.convz.2"
                yield f"{ours}.shift", f"{published}.mu.conv_0"
            index += 1


def _cells(cells: nn.Sequential, ours: str, published: str, first: int = 0) -> Names:
    for index, cell in enumerate(cells):
        assert isinstance(cell, Cell)
        yield from _cell(cell, f"{ours}.{index}", f"{published}.{first + index}")


def _cell(cell: Cell, ours: str, published: str) -> Names:
    if isinstance(cell.skip, FactorizedReduce):
        yield from ((f"{ours}.skip.convolutions.{i}", f"{published}.skip.conv_{i + 1}") for i in range(4))
    elif isinstance(cell.skip, BilinearExpand):
        yield f"{ours}.skip.convolution", f"{published}.skip.1"
    for index, operation in enumerate(cell.operations):
        names = f"{ours}.operations.{index}", f"{published}._ops.{index}"
        if isinstance(operation, InvertedOperation):
            yield from _inverted(operation, *names)
        elif isinstance(operation, ResidualOperation):
            yield from _residual(operation, *names)
    if isinstance(cell.gate, SqueezeExcitation):
        yield f"{ours}.gate.squeeze", f"{published}.se.se.0"
        yield f"{ours}.gate.excite", f"{published}.se.se.2"


def _residual(operation: ResidualOperation, ours: str, published: str) -> Names:
    if operation.batch_norm is not None:
        # Batch norm with swish is one published module, with ELU a wrapped one.
        inner = "bn_act" if operation.batch_norm.activation == "swish" else "bn.bn"
        yield f"{ours}.batch_norm", f"{published}.{inner}"
    yield f"{ours}.convolution", f"{published}.conv_0"


def _inverted(operation: InvertedOperation, ours: str, published: str) -> Names:
    # In cells that double the resolution, the upsampling takes the first place.
    first = 1 if operation.direction == "up" else 0
    places = [f"{published}.conv.{first + place}" for place in range(5)]
    yield f"{ours}.input_norm", f"{places[0]}.bn"
    yield f"{ours}.expand", f"{places[1]}.conv.0"
    yield f"{ours}.expand_norm", f"{places[1]}.conv.1"
    yield f"{ours}.spatial", f"{places[2]}.conv.0"
    yield f"{ours}.spatial_norm", f"{places[2]}.conv.1"
    yield f"{ours}.project", places[3]
    yield f"{ours}.project_norm", f"{places[4]}.bn"
