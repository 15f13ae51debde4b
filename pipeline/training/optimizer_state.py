"""The optimizer's state as named tensors, for a checkpoint without pickle.

PyTorch's state_dict numbers the parameters; here they have their names in the model, so
that a checkpoint tells what is in it and a state for another model is noticed. Values are
kept bit for bit, step counters included.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.training.checkpoint import CheckpointError


def flatten_optimizer(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named PARAMETER/QUANTITY.

    Learning rates and the like are not in it: on resume the configuration and the
    schedules decide them.
    """
    names = _parameter_names(optimizer, model)
    return {
        f"{name}/{quantity}": value
        for parameter, name in names.items()
        for quantity, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `flatten_optimizer` gave, bit for bit, on the parameters' devices.

    Raises CheckpointError if the tensors belong to other parameters.
    """
    names = _parameter_names(optimizer, model)
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in by_name:
            raise CheckpointError(f"the optimizer state has {key}, the model has no parameter {name!r}.")
        by_name[name][quantity] = tensor
    for parameter, name in names.items():
        for quantity, tensor in by_name[name].items():
            if tensor.ndim and tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimizer state {name}/{quantity} is {tuple(tensor.shape)}, the parameter is "
                    f"{tuple(parameter.shape)}: the checkpoint is of another model."
                )
    optimizer.load_state_dict(
        {
            # The position of a parameter is its key in PyTorch's format.
            "state": {i: by_name[name] for i, name in enumerate(names.values()) if by_name[name]},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> dict[nn.Parameter, str]:
    """The optimizer's parameters in its own order, with their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {p: names[p] for group in optimizer.param_groups for p in group["params"]}
