import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.training.checkpoint import CheckpointError
from pipeline.training.optimizer_state import flatten_optimizer, restore_optimizer


def make(seed: int, width: int = 3) -> tuple[nn.Module, torch.optim.Adamax]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))
    return model, torch.optim.Adamax(model.parameters(), eps=1e-3, weight_decay=3e-4, foreach=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    states = zip(one.state.values(), other.state.values(), strict=True)
    for mine, theirs in states:
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_inf"}
        for quantity, tensor in mine.items():
            assert isinstance(tensor, Tensor)
            assert tensor.dtype == theirs[quantity].dtype
            assert torch.equal(tensor, theirs[quantity])


def test_a_restored_optimizer_makes_the_steps_that_the_first_would_have_made() -> None:
    model, optimizer = make(0)
    train(model, optimizer, 3)
    state = load(save(flatten_optimizer(optimizer, model)))
    twin, twin_optimizer = make(1)
    twin.load_state_dict(model.state_dict())
    restore_optimizer(twin_optimizer, twin, state)
    assert_same_state(optimizer, twin_optimizer)
    train(model, optimizer, 2)
    train(twin, twin_optimizer, 2)
    assert_same_state(optimizer, twin_optimizer)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_tensors_are_named_after_their_parameters() -> None:
    model, optimizer = make(0)
    train(model, optimizer, 1)
    names = flatten_optimizer(optimizer, model)
    assert {name.rpartition("/")[0] for name in names} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert {name.rpartition("/")[2] for name in names} == {"step", "exp_avg", "exp_inf"}


def test_the_learning_rate_is_the_one_of_the_configuration_not_of_the_checkpoint() -> None:
    model, optimizer = make(0)
    train(model, optimizer, 1)
    twin, twin_optimizer = make(0)
    twin_optimizer.param_groups[0]["lr"] = 0.5
    restore_optimizer(twin_optimizer, twin, flatten_optimizer(optimizer, model))
    assert twin_optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_made_no_step_has_no_state() -> None:
    model, optimizer = make(0)
    assert flatten_optimizer(optimizer, model) == {}
    restore_optimizer(optimizer, model, {})
    train(model, optimizer, 1)


def test_the_state_of_another_model_is_refused() -> None:
    model, optimizer = make(0)
    train(model, optimizer, 1)
    state = flatten_optimizer(optimizer, model)
    wider, wider_optimizer = make(0, width=5)
    with pytest.raises(CheckpointError, match="another model"):
        restore_optimizer(wider_optimizer, wider, state)
    with pytest.raises(CheckpointError, match="no parameter"):
        restore_optimizer(optimizer, model, {"other/exp_avg": torch.ones(1)})
