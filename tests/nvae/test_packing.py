"""Packed weights, gradients, moments and averages: the very values of those that are not packed."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from nvae.levers import PLAIN, Levers
from nvae.model import NVAE
from nvae.optimizer import PackedAdamax, make_ema, make_optimizer
from nvae.packing import Packed, pieces
from nvae.step import Coefficients, StepSettings, update
from tests.nvae.tiny import latent_noise, stored_images, tiny_model

PACKED = Levers(packed=True)


class Training:
    """A tiny model in training, and everything that an update changes."""

    def __init__(self, levers: Levers) -> None:
        self.model: NVAE = tiny_model(flow_pairs=1)
        self.model.use(levers)
        self.optimizer = make_optimizer(self.model, weight_decay=3e-4)
        self.ema = make_ema(self.model, decay=0.9)

    def update(self, number: int, *, clip: float | None = None, kl: float = 0.5) -> bool:
        result = update(
            self.model,
            self.optimizer,
            stored_images(self.model.config, 2, seed=number),
            Coefficients(1e-3, kl=kl, spectral=1e-2),
            StepSettings(gradient_clip_norm=clip, micro_batches=2),
            noise=latent_noise(self.model.config, 2, seed=number),
            ema=self.ema,
        )
        return result.reading.made

    def tensors(self) -> dict[str, Tensor]:
        state = {f"average of {name}": value for name, value in self.ema.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state |= {f"{what} of {name}": value for what, value in self.optimizer.state[parameter].items()}
        return {name: value.clone() for name, value in (state | self.model.state_dict()).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("clip", [None, 1e9])
def test_updates_are_the_same_to_the_last_bit(clip):
    packed, plain = Training(PACKED), Training(PLAIN)
    assert isinstance(packed.optimizer, PackedAdamax) and not isinstance(plain.optimizer, PackedAdamax)
    for number in range(4):
        assert packed.update(number, clip=clip) and plain.update(number, clip=clip)
        assert_same(packed.tensors(), plain.tensors())


def test_a_gradient_is_shortened_alike():
    packed, plain = Training(PACKED), Training(PLAIN)
    for number in range(2):
        assert packed.update(number, clip=1.0) and plain.update(number, clip=1.0)
    # The norm is summed in another order, and is a factor of everything.
    torch.testing.assert_close(packed.tensors(), plain.tensors(), rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_made_leaves_everything_as_it_was():
    training = Training(PACKED)
    training.update(0)
    before = training.tensors()
    assert not training.update(1, kl=float("nan"))
    assert_same(training.tensors(), before)


def test_state_goes_from_packed_to_plain_and_back():
    plain, packed = Training(PLAIN), Training(PACKED)
    plain.update(0)
    for number, (giver, taker) in enumerate([(plain, packed), (packed, plain)], start=1):
        taker.model.load_state_dict(giver.model.state_dict())
        taker.ema.load_state_dict(giver.ema.state_dict())
        taker.optimizer.load_state_dict(deepcopy(giver.optimizer.state_dict()))
        assert giver.update(number) and taker.update(number)
        assert_same(taker.tensors(), giver.tensors())


def test_parameters_updated_differently_often_are_refused():
    training = Training(PACKED)
    training.update(0)
    first = training.optimizer.param_groups[0]["params"][0]
    training.optimizer.state[first]["step"] += 1
    with pytest.raises(ValueError, match="differently often"):
        training.optimizer.step()


def test_tensors_stay_what_they_were_and_follow_each_other():
    tensors = [nn.Parameter(torch.randn(shape)) for shape in [(3, 5), (), (0,), (17, 1, 2)]]
    expected = [tensor.detach().clone() for tensor in tensors]
    packed = Packed(tensors)
    flat = packed.flat
    assert [tensor.shape for tensor in tensors] == [value.shape for value in expected]
    assert all(map(torch.equal, tensors, expected))
    assert flat.sum().isclose(sum(value.sum() for value in expected))
    flat.mul_(2)
    assert all(torch.equal(tensor, 2 * value) for tensor, value in zip(tensors, expected, strict=True))
    assert packed.flat is flat
    tensors[1].data = torch.tensor(7.0)
    assert packed.flat is not flat
    packed.flat.add_(1)
    assert tensors[1].item() == 8.0


def test_a_copy_of_a_packed_model_is_a_model_of_its_own():
    model = tiny_model()
    model.use(PACKED)
    packs = model.packs
    before = packs.weights.flat.clone()
    copy = deepcopy(model)
    copy.packs.weights.flat.zero_()
    for buffers in copy.packs.buffers:
        buffers.zero_()
    assert torch.equal(model.packs.weights.flat, before)
    assert model.stem.weight.any() and not copy.stem.weight.any()
    assert all(buffer.any() for name, buffer in model.named_buffers() if name.endswith("running_var"))


def test_pieces_are_everything_once():
    flat = torch.arange(300_000.0)
    assert torch.equal(torch.cat([piece for [piece] in pieces(flat)]), flat)
