import argparse
import functools
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nvae.cells import CELL_FAMILIES
from nvae.config import NVAEConfig
from nvae.model import NVAE
from nvae.published import PublishedCheckpointError, load_published, published_names
from nvae.published_arguments import groups_per_scale
from tests.nvae.test_model import VARIANTS, images_for
from tests.nvae.tiny import normal_noise, tiny_model

COMPATIBLE = {"published_compatibility": True}


def arguments_of(config: NVAEConfig) -> dict[str, Any]:
    """Published arguments that describe a model of ours."""
    dataset = "mnist" if config.likelihood == "bernoulli" else "cifar10"
    return {
        "dataset": dataset,
        "arch_instance": config.cell_family,
        "num_x_bits": config.pixel_bits,
        "num_latent_scales": config.num_scales,
        "num_groups_per_scale": config.groups_per_scale[-1],
        "num_latent_per_group": config.latent_channels,
        "ada_groups": True,
        "min_groups_per_scale": 1,
        "num_channels_enc": config.encoder_channels,
        "num_channels_dec": config.decoder_channels,
        "num_preprocess_blocks": config.preprocess_blocks,
        "num_postprocess_blocks": config.preprocess_blocks,
        "num_preprocess_cells": config.preprocess_cells,
        "num_postprocess_cells": config.postprocess_cells,
        "num_cell_per_cond_enc": config.encoder_cells_per_group,
        "num_cell_per_cond_dec": config.decoder_cells_per_group,
        "num_nf": config.flow_pairs,
        "num_mixture_dec": 1 if config.likelihood == "normal" else config.mixture_components,
        "use_se": config.squeeze_excitation,
        "res_dist": config.residual_posterior,
    }


def published_state(model: NVAE) -> dict[str, Tensor]:
    """Weights as the published code would save them, in its order."""
    names = published_names(model)
    ours = model.state_dict()
    state = {published: ours[name] for name, published in names.items()}
    if "prior_ftr0" not in state:
        size = model.config.latent_shapes[0][-1]
        state = {"prior_ftr0": torch.rand(8, size, size), **state}
    weights = [name for name in state if "._ops.0.conv." in name and name.endswith(".weight")]
    return state | {f"{name}_normalized": state[name] for name in weights if state[name].dim() == 4}


def training_state(model: NVAE, **changes: Any) -> dict[str, Any]:
    """A published checkpoint of a model that has not been trained."""
    state = published_state(model)
    names = {name for name, _ in model.named_parameters()}
    trained = [published for ours, published in published_names(model).items() if ours in names]
    parameters = [name for name in state if name in trained or name == "prior_ftr0"]
    entries = {
        index: {"step": index, "exp_avg": state[name] + 1, "exp_inf": state[name] + 2}
        for index, name in enumerate(parameters)
    }
    settings = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 3e-4}
    return {
        "state_dict": state,
        "optimizer": {"state": entries, "param_groups": [settings | {"params": list(entries)}]},
        "scheduler": {"last_epoch": 2},
        "grad_scalar": {"scale": 1024.0},
        "epoch": 3,
        "global_step": 12,
        "args": argparse.Namespace(**arguments_of(model.config)),
        "arch_instance": {},
    } | changes


def as_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_published_checkpoint_becomes_the_model_that_was_saved(changes: dict[str, Any]) -> None:
    saved = tiny_model(**COMPATIBLE | changes)
    checkpoint = load_published(as_bytes(training_state(saved)))
    assert checkpoint.config.groups_per_scale == saved.config.groups_per_scale
    images = images_for(saved)
    expected = saved.eval()(images, normal_noise(0)).likelihood.logits
    assert torch.equal(checkpoint.model.eval()(images, normal_noise(0)).likelihood.logits, expected)
    assert (checkpoint.epoch, checkpoint.global_step) == (3, 12)


@pytest.mark.parametrize("family", CELL_FAMILIES)
def test_every_cell_family_is_imported(family: Any) -> None:
    saved = tiny_model(cell_family=family, **COMPATIBLE)
    loaded = load_published(as_bytes(training_state(saved)))
    assert loaded.config == saved.config
    for name, value in loaded.model.state_dict().items():
        if not name.startswith("spectral."):
            assert torch.equal(value, saved.state_dict()[name])


@pytest.mark.parametrize("changes", [{}, {"groups_per_scale": (1,)}])
def test_optimizer_states_find_their_parameters(changes: dict[str, Any]) -> None:
    saved = tiny_model(**COMPATIBLE | changes)
    found = load_published(as_bytes(training_state(saved))).optimizer_state
    assert list(found) == [name for name, _ in saved.named_parameters()]
    for name, parameter in saved.named_parameters():
        assert_close(found[name]["exp_avg"], parameter.detach() + 1)
        assert_close(found[name]["exp_inf"], parameter.detach() + 2)
    steps = [entry["step"].item() for entry in found.values()]
    first = 0 if hasattr(saved, "initial_state") else 1
    assert steps == list(range(first, first + len(steps)))


def test_arguments_that_older_checkpoints_lack_get_the_values_they_were_trained_with() -> None:
    saved = tiny_model(groups_per_scale=(2, 2), mixture_components=10, **COMPATIBLE)
    arguments = arguments_of(saved.config)
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        del arguments[name]
    state = training_state(saved, args=argparse.Namespace(**arguments))
    assert load_published(as_bytes(state)).config == saved.config


@given(scales=st.integers(1, 6), finest=st.integers(1, 40), minimum=st.integers(1, 5))
def test_adaptive_groups_halve_towards_the_coarsest_scale(scales: int, finest: int, minimum: int) -> None:
    groups = groups_per_scale(scales, finest, adaptive=True, minimum=minimum)
    assert len(groups) == scales
    assert groups[-1] == finest
    for coarser, finer in itertools.pairwise(groups):
        assert coarser == max(finer // 2, minimum)
    assert groups_per_scale(scales, finest, adaptive=False, minimum=minimum) == (finest,) * scales


def test_the_published_256_pixel_models_have_36_groups() -> None:
    assert groups_per_scale(5, 16, adaptive=True, minimum=4) == (4, 4, 4, 8, 16)


# --- files that are refused --------------------------------------------------------------------


class Bomb:
    """Unpickled by Python's own unpickler, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path, protocol: str) -> None:
    target = tmp_path / "written"
    state = training_state(tiny_model(), extra=Bomb(target))
    data = as_bytes(state) if protocol == "torch" else pickle.dumps(state, protocol=2)
    with pytest.raises(PublishedCheckpointError, match="code from the file"):
        load_published(data)
    assert not target.exists()


@functools.cache
def corruptions() -> dict[str, tuple[Any, str]]:
    model = tiny_model(**COMPATIBLE)
    good = training_state(model)
    weights = good["state_dict"]
    arguments = arguments_of(model.config)
    settings = good["optimizer"]["param_groups"]
    fewer = {name: value for name, value in weights.items() if name != "stem.bias"}
    adam = {
        index: {"step": 1, "exp_avg": entry["exp_avg"]} for index, entry in good["optimizer"]["state"].items()
    }
    return {
        "a list": ([1, 2], "holds a list"),
        "no optimizer": ({key: good[key] for key in good if key != "optimizer"}, "lacks optimizer"),
        "weights missing": (good | {"state_dict": fewer}, "1 are missing"),
        "weights unknown": (good | {"state_dict": weights | {"new.weight": torch.ones(1)}}, "1 are unknown"),
        "another width": (
            good | {"args": argparse.Namespace(**arguments | {"num_channels_dec": 4})},
            "do not fit its arguments",
        ),
        "half precision": (
            good | {"state_dict": weights | {"stem.bias": weights["stem.bias"].half()}},
            r"stem.bias is float16 \(8,\), not float32",
        ),
        "a text among the weights": (
            good | {"state_dict": weights | {"stem.bias": "x"}},
            "no mapping of names to tensors",
        ),
        "a flat stem": (
            good | {"state_dict": weights | {"stem.weight": torch.ones(1)}},
            "stem.weight has 1 dimensions, not 4",
        ),
        **{
            f"{name} of {value!r:.20}": (
                good | {"args": argparse.Namespace(**arguments | {name: value})},
                f"training argument {name} is",
            )
            for name, value in [
                ("num_preprocess_blocks", 10**9),
                ("num_latent_scales", 10**9),
                ("num_latent_scales", 0),
                ("num_groups_per_scale", True),
                ("num_channels_enc", "8"),
                ("num_nf", [1]),
                ("use_se", 1),
                ("dataset", None),
            ]
        },
        "more cells than weights": (
            good | {"args": argparse.Namespace(**arguments | {"num_groups_per_scale": 4096})},
            "but it has",
        ),
        "another family": (
            good | {"args": argparse.Namespace(**arguments | {"arch_instance": "resnet"})},
            "cell_family: must be one of",
        ),
        "an argument missing": (
            good | {"args": argparse.Namespace(**{k: v for k, v in arguments.items() if k != "num_nf"})},
            "'num_nf'",
        ),
        "arguments of another kind": (good | {"args": arguments}, "args are a dict"),
        "unequal blocks": (
            good | {"args": argparse.Namespace(**arguments | {"num_postprocess_blocks": 2})},
            "do not undo",
        ),
        "another optimizer": (
            good | {"optimizer": {"state": adam, "param_groups": settings}},
            "not Adamax",
        ),
        "fewer parameters": (
            good | {"optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}},
            "has 2 parameters",
        ),
    }


@pytest.mark.parametrize("kind", corruptions())
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(kind: str) -> None:
    state, reason = corruptions()[kind]
    with pytest.raises(PublishedCheckpointError, match=reason):
        load_published(as_bytes(state))


@given(data=st.binary(max_size=200))
def test_no_file_content_whatsoever_raises_another_error(data: bytes) -> None:
    with pytest.raises(PublishedCheckpointError):
        load_published(data)


@given(data=st.data())
def test_a_cut_or_damaged_checkpoint_is_refused(data: st.DataObject) -> None:
    whole = as_bytes({"state_dict": {}, "args": argparse.Namespace(dataset="cifar10")})
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(PublishedCheckpointError):
        load_published(whole[:cut])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(PublishedCheckpointError, match=f"{path}: cannot be read: No such file"):
        load_published(path)
