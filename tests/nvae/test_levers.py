"""Every lever against the plain path, both against the same in float64."""

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from nvae.levers import ON_CPU, PLAIN, Lever, Levers, levers_for
from nvae.model import NVAE
from nvae.optimizer import make_ema, make_optimizer
from nvae.step import Coefficients, StepSettings, update
from tests.nvae.tiny import latent_noise, stored_images, tiny_model

MODELS = {
    "inverted": {"cell_family": "mbconv_sep"},
    "flows": {"flow_pairs": 1, "cell_family": "res_mbconv"},
    "residual": {"cell_family": "res_bnswish", "residual_posterior": False},
    "elu": {"cell_family": "res_elu"},
    "plain vae": {"groups_per_scale": (1,)},
}
EACH = {field.name: replace(Levers(channels_last=True), **{field.name: True}) for field in fields(Levers)}


def after_updates(model: NVAE, levers: Levers) -> dict[str, Tensor]:
    """Weights, buffers and averages after three updates, and the first one's gradients and losses."""
    model.use(levers)
    optimizer, ema = make_optimizer(model, weight_decay=3e-4), make_ema(model, decay=0.9)
    dtype = next(model.parameters()).dtype
    found: dict[str, Tensor] = {}
    for number in range(3):
        result = update(
            model,
            optimizer,
            stored_images(model.config, 3, seed=number),
            Coefficients(1e-3, kl=0.5, spectral=1e-2),
            StepSettings(),
            noise=latent_noise(model.config, 3, seed=number).to(dtype),
            ema=ema,
        )
        found |= {f"loss {number}": result.loss, f"kl {number}": result.kl_per_group}
        if number == 0:
            found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
    found |= {f"average of {name}": value for name, value in ema.module.state_dict().items()}
    return {name: value.detach().double() for name, value in (found | model.state_dict()).items()}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], prefix: str) -> float:
    """Of all values whose names begin so, relative to their size."""
    names = [name for name in exact if name.startswith(prefix)]
    off = torch.cat([(found[name] - exact[name]).flatten() for name in names])
    return (off.norm() / torch.cat([exact[name].flatten() for name in names]).norm()).item()


@pytest.mark.parametrize("levers", [*EACH.values(), ON_CPU], ids=[*EACH, "all"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_an_update_is_as_exact_as_the_plain_one(changes, levers):
    exact = after_updates(tiny_model(**changes).double(), PLAIN)
    plain = after_updates(tiny_model(**changes), PLAIN)
    found = after_updates(tiny_model(**changes), levers)
    assert found.keys() == exact.keys()
    for prefix in ("loss", "kl", "gradient of", "average of", ""):
        allowed = 2 * distance(plain, exact, prefix) + 1e-7
        assert distance(found, exact, prefix) <= allowed, prefix


def test_levers_that_are_on_have_names():
    assert PLAIN.names() == ()
    assert Levers(depthwise=True, packed=True).names() == ("depthwise", "packed")
    assert levers_for(torch.device("cpu")) == levers_for(torch.device("cpu"), ON_CPU.names()) == ON_CPU
    assert levers_for(torch.device("cpu"), []) == levers_for(torch.device("cuda")) == PLAIN
    assert get_args(Lever) == tuple(EACH)


def test_activations_keep_the_channels_side_by_side_all_the_way():
    model = tiny_model(cell_family="mbconv_sep", flow_pairs=1)
    model.use(ON_CPU)
    wrong = []

    def look(module, inputs, output):
        if output.dim() == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            wrong.append(module)

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(look) for leaf in leaves if leaf is not model.spectral]
    images = torch.zeros(2, 3, 16, 16)
    model(images, lambda shape: torch.zeros(shape))
    model.sample(2, lambda shape: torch.zeros(shape))
    for hook in hooks:
        hook.remove()
    assert not wrong
