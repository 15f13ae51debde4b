"""Reads checkpoints of the published NVAE implementation into ours.

A published checkpoint is a pickle. It is opened by torch's restricted unpickler, which builds
tensors and plain containers and nothing else; besides these only argparse.Namespace is
allowed, which holds the training arguments. There is no fallback: a file that needs
more is refused, for unpickling it would run its author's code.

Module names differ (published_names.py is the dictionary), shapes and the order of parameters do
not. Names, shapes and types are compared with a model that has no memory yet: what a file promises
is not allocated. The model gets `published_compatibility=True`, since it was trained and measured
with the published code's peculiarities.
"""

import argparse
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from nvae.config import NVAEConfig
from nvae.model import NVAE
from nvae.published_arguments import PublishedCheckpointError as PublishedCheckpointError
from nvae.published_arguments import config_from_arguments, with_later_arguments
from nvae.published_names import published_names as published_names


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


_ENTRIES = ("state_dict", "optimizer", "scheduler", "grad_scalar", "epoch", "global_step", "args")


def load_published(source: str | os.PathLike[str] | bytes) -> PublishedCheckpoint:
    """The checkpoint in a file, or in the bytes of one.

    Raises PublishedCheckpointError if it cannot be read, needs more than tensors and plain
    values, or does not fit the model that its arguments describe.
    """
    where = "checkpoint" if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            return _convert(read_published(file))
    except OSError as error:
        raise PublishedCheckpointError(f"{where}: cannot be read: {error.strerror}") from error
    except PublishedCheckpointError as error:
        raise PublishedCheckpointError(f"{where}: {error}") from error


def read_published(file: BinaryIO) -> dict[str, Any]:
    """The training state in an open file: tensors and plain values, not yet looked at.

    Raises PublishedCheckpointError if it cannot be read, needs more than these, or is something else.
    """
    loaded = _unpickled(file, [argparse.Namespace])
    if not isinstance(loaded, dict):
        raise PublishedCheckpointError(f"holds a {type(loaded).__name__} instead of a training state")
    missing = [entry for entry in _ENTRIES if entry not in loaded]
    if missing:
        raise PublishedCheckpointError(
            f"lacks {', '.join(missing)}; a checkpoint of the published train.py is needed"
        )
    if not isinstance(loaded["args"], argparse.Namespace):
        raise PublishedCheckpointError(
            f"its args are a {type(loaded['args']).__name__}, not an argparse.Namespace"
        )
    if not _is_state(loaded["state_dict"]):
        raise PublishedCheckpointError("its state_dict is no mapping of names to tensors")
    return loaded


def read_weights(file: BinaryIO) -> dict[str, Tensor]:
    """The tensors in an open file that somebody's `torch.save(model.state_dict(), ...)` wrote.

    Raises PublishedCheckpointError if it cannot be read, or holds anything else.
    """
    loaded = _unpickled(file, [])
    if not _is_state(loaded):
        raise PublishedCheckpointError("holds no mapping of names to tensors")
    return dict(loaded)


def _unpickled(file: BinaryIO, allowed: list[type]) -> Any:
    """What torch's restricted unpickler makes of a file: tensors, plain values, and what is allowed."""
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Any error at all: torch's reader meets damaged files with whatever goes wrong first.
        raise PublishedCheckpointError(_why_unreadable(error)) from error


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items()
    )


def is_alias(name: str) -> bool:
    """Whether a published weight is one that the checkpoint has under another name, too."""
    return name.endswith(".weight_normalized")


def _why_unreadable(error: Exception) -> str:
    """In our words: torch's advise to load the file without protection."""
    if isinstance(error, MemoryError):
        return "needs more memory than there is for it"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"needs the Python object {refused[1]} and was not opened, since that would run code from the "
            f"file; only tensors, plain values and argparse.Namespace are allowed"
        )
    return f"not a checkpoint, or damaged ({type(error).__name__} on reading)"


def _convert(loaded: Mapping[str, Any]) -> PublishedCheckpoint:
    arguments = with_later_arguments(vars(loaded["args"]))
    model = build_published(arguments, loaded["state_dict"])
    optimizer = loaded["optimizer"]
    settings = dict(optimizer["param_groups"][0])
    order = settings.pop("params")
    return PublishedCheckpoint(
        model=model,
        config=model.config,
        optimizer_state=_optimizer_state(model, order, optimizer["state"]),
        optimizer_settings=settings,
        scheduler=loaded["scheduler"],
        grad_scaler=loaded["grad_scalar"],
        epoch=loaded["epoch"],
        global_step=loaded["global_step"],
        arguments=arguments,
    )


def build_published(arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> NVAE:
    """The model of a published command line, with these weights by their published names; in training
    mode, on the CPU.

    Raises PublishedCheckpointError if an argument or a weight is missing or wrong.
    """
    config = config_from_arguments(arguments, weights)
    cells = config.num_groups * (config.encoder_cells_per_group + config.decoder_cells_per_group)
    if cells > 2 * len(weights):
        # Even the tensorless model would take too long to write down.
        raise PublishedCheckpointError(
            f"its arguments describe {cells} cells in {config.num_groups} groups, but it has "
            f"{len(weights)} weights"
        )
    with torch.device("meta"):
        names = _checked_names(NVAE(config), weights)
    model = NVAE(config)
    # Not strict: the published code keeps no singular vectors. All other names are checked above.
    model.load_state_dict({ours: weights[published] for ours, published in names.items()}, strict=False)
    return model


def _checked_names(model: NVAE, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our names of the weights of `model`, which needs no memory, to those in `state`.

    Raises PublishedCheckpointError unless every weight is there, fits, and is nobody's who is unknown.
    """
    names, expected = published_names(model), model.state_dict()
    # A plain VAE has no use for the initial state.
    ignored = {name for name in state if is_alias(name)} | {"prior_ftr0"}
    missing = sorted(set(names.values()) - set(state))
    unknown = sorted(set(state) - set(names.values()) - ignored)
    if missing or unknown:
        raise PublishedCheckpointError(
            f"its weights do not belong to its arguments: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
    misfits = [
        f"{published} is {_described(state[published])}, not {_described(expected[ours])}"
        for ours, published in names.items()
        if (state[published].shape, state[published].dtype) != (expected[ours].shape, expected[ours].dtype)
    ]
    if misfits:
        raise PublishedCheckpointError(
            f"{len(misfits)} of its weights do not fit its arguments: {'; '.join(misfits[:3])}"
        )
    return names


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


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
