"""The published command line as settings of ours: what a published checkpoint was trained with.

The model is read off the checkpoint and cannot be otherwise. The rest of its command line becomes the
settings of the same meaning, so that an imported model can be found by them; what they cannot say (a
published KL that never reached its full weight, a warm-up longer than the training) is left out. What
the command line does not say (cadences, pictures) comes from a preset or from our defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nvae.config import NVAEConfig
from pipeline import config_file
from pipeline.config import RunConfig
from pipeline.config_file import ConfigError
from pipeline.errors import InputError

# The published names of data sets, and those of our presets.
_DATA = {
    "cifar10": "cifar10",
    "mnist": "mnist",
    "celeba_64": "celeba64",
    "imagenet_32": "imagenet32",
    "celeba_256": "celebahq256",
    "ffhq": "ffhq256",
}
_NEVER_FLIPPED = ("mnist", "omniglot", "stacked_mnist")
_SAME = {
    "kl_anneal_portion": "objective.kl_warmup_fraction",
    "kl_const_portion": "objective.kl_constant_fraction",
    "kl_const_coeff": "objective.kl_minimum_coefficient",
    "weight_decay_norm": "objective.spectral_coefficient",
    "learning_rate": "optimizer.learning_rate",
    "learning_rate_min": "optimizer.minimum_learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "seed": "train.seed",
}
"""Arguments that are settings of another name."""
_CHOICE = "model.published_compatibility"
"""The one setting of the model that a checkpoint does not decide: how it is used."""


class DisagreementError(InputError):
    """Settings that were asked for and are not those of the checkpoint."""


def run_config(
    arguments: Mapping[str, Any], model: NVAEConfig, preset: str | None, overrides: Sequence[str]
) -> tuple[RunConfig, list[str]]:
    """The settings that `model` was trained with, and the paths of those that could not be said.

    Of a preset the model must be the checkpoint's; what else it says holds where the command line is
    silent. Overrides may decide only what the checkpoint does not. Raises DisagreementError with all
    that differs, ConfigError if a preset or an override is wrong in itself.
    """
    stated = {f"model.{name}": value for name, value in asdict(model).items()}
    stated["model.groups_per_scale"] = list(model.groups_per_scale)
    training = _training(arguments)
    start = config_file.load(preset) if preset else _start(training, str(arguments.get("dataset")))
    if preset:
        there = config_file.leaves(start)
        _agree(stated, {path: there[path] for path in stated if path != _CHOICE}, preset)
    config, left_out = _with_training(start, stated, training)
    wanted = config_file.overridden(config, {}, overrides)
    given = {override.partition("=")[0].strip() for override in overrides} - {_CHOICE}
    fixed = stated.keys() | (training.keys() - set(left_out))
    asked, found = config_file.leaves(wanted), config_file.leaves(config)
    _agree(found, {path: asked[path] for path in sorted(given & fixed)}, "the command line")
    return wanted, left_out


def _agree(stated: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    differing = [
        f"  {path}: {config_file.as_text(value)} in {where}, "
        f"{config_file.as_text(stated[path])} in the checkpoint"
        for path, value in asked.items()
        if value != stated[path] and not _is_unused(path, stated)
    ]
    if differing:
        raise DisagreementError(
            "the checkpoint was trained with other settings:\n"
            + "\n".join(differing)
            + "\nLeave these out, or name another preset, or none."
        )


def _is_unused(path: str, stated: Mapping[str, Any]) -> bool:
    """Whether a setting of the model means nothing for this one."""
    return path == "model.mixture_components" and stated.get("model.likelihood") != "logistic_mixture"


def _training(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the training by their paths, as far as they are in the command line."""
    found: dict[str, Any] = {path: arguments[name] for name, path in _SAME.items() if name in arguments}
    found["optimizer.ema_decay"] = 0.0
    found["data.horizontal_flip"] = arguments.get("dataset") not in _NEVER_FLIPPED
    if arguments.get("weight_decay_norm_anneal") is True and "weight_decay_norm_init" in arguments:
        found["objective.spectral_coefficient_initial"] = arguments["weight_decay_norm_init"]
    batch_size = global_batch_size(arguments)
    if batch_size is not None:
        found["train.batch_size"], found["train.micro_batch_size"] = batch_size, arguments["batch_size"]
        iterations, epochs, warmup = (
            _count(arguments.get(name)) for name in ("num_total_iter", "epochs", "warmup_epochs")
        )
        if iterations:
            found["train.total_images"] = iterations * batch_size
        if iterations and epochs and warmup is not None:
            found["optimizer.warmup_images"] = warmup * (iterations // epochs) * batch_size
    return found


def global_batch_size(arguments: Mapping[str, Any]) -> int | None:
    """Images per update over all processes; None if the arguments do not say."""
    names = "batch_size", "num_process_per_node", "num_proc_node"
    per_process, processes, nodes = (_count(arguments.get(name, 1)) for name in names)
    if "batch_size" not in arguments or not (per_process and processes and nodes):
        return None
    return per_process * processes * nodes


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**40 else None


def _start(training: Mapping[str, Any], dataset: str) -> RunConfig:
    """What must be said and is not in a checkpoint, where no preset says it."""
    total, batch_size = training.get("train.total_images") or 1, training.get("train.batch_size") or 1
    name = _DATA.get(dataset) or "".join(each for each in dataset.lower() if each.isalnum())[:40]
    return config_file.from_mapping(
        {
            "data": {"root": f"store:{name or 'unknown'}"},
            "train": {"total_images": max(total, batch_size), "batch_size": batch_size},
            "cadence": {
                "log_images": 100 * batch_size,
                "evaluate_images": max(total // 20, batch_size),
                "checkpoint_images": max(total // 100, batch_size),
            },
        }
    )


def _with_training(
    start: RunConfig, stated: Mapping[str, Any], training: Mapping[str, Any]
) -> tuple[RunConfig, list[str]]:
    """With what a checkpoint says, less what a configuration of ours cannot say: that is named."""
    left = dict(training)
    while True:
        try:
            return config_file.overridden(start, {**stated, **left}), sorted(training.keys() - left.keys())
        except ConfigError as error:
            wrong = {problem.path for problem in error.problems} & left.keys()
            if not wrong:
                raise
            left = {path: value for path, value in left.items() if path not in wrong}
