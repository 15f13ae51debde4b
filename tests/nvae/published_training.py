"""Resumes a recorded training of the published implementation and makes its three steps with ours."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nvae import objective
from nvae.distributions import Noise
from nvae.model import NVAE
from nvae.noise import by_group
from nvae.optimizer import make_optimizer
from nvae.pixels import to_model
from nvae.published import PublishedCheckpoint, published_names
from nvae.spectral import normalize
from nvae.step import Coefficients, StepResult, StepSettings, update
from pipeline.config import RunConfig
from pipeline.training.schedules import schedule
from tests.nvae.published_cases import Case, Comparison, absolute, recorded_noise, relative, stored

STEPS = 3
ULPS = 5e-7
"""Four units in the last place of fp32, relative: no recorded rounding error counts as smaller."""


@dataclass(frozen=True)
class Step:
    """One training step by ours. Names are the published ones."""

    coefficients: Coefficients
    per_image: Mapping[str, Tensor]
    """What the forward pass gives for each image, and the balance of the groups."""
    result: StepResult
    gradients: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    """Weights and batch norm statistics after the step."""


def run_config(checkpoint: PublishedCheckpoint, epoch_images: int) -> RunConfig:
    """The published arguments as our settings."""
    arguments = checkpoint.arguments
    annealed = arguments["weight_decay_norm_anneal"]
    return RunConfig.model_validate(
        {
            "data": {"root": "none"},
            "model": checkpoint.config,
            "objective": {
                "kl_warmup_fraction": arguments["kl_anneal_portion"],
                "kl_constant_fraction": arguments["kl_const_portion"],
                "kl_minimum_coefficient": arguments["kl_const_coeff"],
                "spectral_coefficient": arguments["weight_decay_norm"],
                "spectral_coefficient_initial": arguments["weight_decay_norm_init"] if annealed else None,
            },
            "optimizer": {
                "learning_rate": arguments["learning_rate"],
                "minimum_learning_rate": arguments["learning_rate_min"],
                "warmup_images": arguments["warmup_epochs"] * epoch_images,
                "weight_decay": arguments["weight_decay"],
            },
            "train": {
                "total_images": arguments["epochs"] * epoch_images,
                "batch_size": arguments["batch_size"],
            },
            "cadence": {"log_images": 1, "evaluate_images": 1, "checkpoint_images": 1},
        }
    )


def three_steps(case: Case) -> list[Step]:
    """Resume the case's checkpoint and train on its recorded images and noise."""
    checkpoint = case.load()
    epoch_images = case.meta["iterations_per_epoch"] * checkpoint.arguments["batch_size"]
    config = run_config(checkpoint, epoch_images)
    model = checkpoint.model.train()
    optimizer = make_optimizer(model, config.optimizer.weight_decay)
    for name, parameter in model.named_parameters():
        if name in checkpoint.optimizer_state:
            optimizer.state[parameter] = dict(checkpoint.optimizer_state[name])
    start_singular_vectors(case, model)
    return [
        one_step(case, number, model, optimizer, schedule(config, seen, epoch_images=epoch_images))
        for number in range(STEPS)
        for seen in [(checkpoint.global_step + number) * config.train.batch_size]
    ]


def one_step(
    case: Case, number: int, model: NVAE, optimizer: torch.optim.Optimizer, coefficients: Coefficients
) -> Step:
    names = published_names(model)
    images = case.train["x_uint8"][number]

    draws = recorded_noise(case.train, f"s{number}_eps")
    noise = torch.cat(
        [draws((len(images), *shape)).flatten(1) for shape in model.config.latent_shapes], dim=1
    )
    before = copy.deepcopy(model)
    result = update(model, optimizer, images, coefficients, StepSettings(), noise=noise)
    return Step(
        coefficients,
        per_image(before, to_model(images, model.config), by_group(noise, model.config), coefficients),
        result,
        {names[name]: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        {names[name]: v.clone() for name, v in model.state_dict().items() if name in names},
    )


@torch.no_grad()
def per_image(model: NVAE, images: Tensor, noise: Noise, coefficients: Coefficients) -> dict[str, Tensor]:
    output = model(images, noise)
    kl = objective.kl_per_group(output)
    gamma = torch.ones(kl.shape[1])
    if coefficients.kl < 1:
        gamma = objective.balance(kl, torch.ones(len(kl)), model.config)
    return {
        "logits": output.likelihood.logits,
        "kl_all": kl,
        "kl_coeffs": gamma,
        "balanced_kl": coefficients.kl * kl @ gamma,
        "recon": objective.reconstruction(output, images, model.config),
        "log_q": torch.stack([group.log_q for group in output.groups]).sum(0),
        "log_p": torch.stack([group.log_p for group in output.groups]).sum(0),
    }


def start_singular_vectors(case: Case, model: NVAE) -> None:
    """Where the published run started its power iteration: noise, of which 40 iterations follow."""
    assert {f"{rows}x{columns}" for rows, columns in model.spectral.layers} == {
        f"{rows}x{columns}" for rows, columns in (group["shape"] for group in case.meta["sr_groups"])
    }
    for rows, columns in model.spectral.layers:
        for side in "uv":
            start = normalize(case.train[f"sr_{side}0_{rows}x{columns}"])
            model.spectral.get_buffer(f"{side}_{rows}x{columns}").copy_(start)


# --- comparisons ------------------------------------------------------------------------------


def compare_step(case: Case, number: int, step: Step) -> list[Comparison]:
    """The coefficients and losses of a step. Bounds are ten times the published rounding errors."""
    recorded = {
        key.removeprefix(f"s{number}_"): value
        for key, value in case.train.items()
        if key.startswith(f"s{number}_")
    }
    coefficients, result, per_image = step.coefficients, step.result, step.per_image
    ours = {
        "loss_total": result.loss,
        "nelbo_train": (per_image["recon"] + per_image["balanced_kl"]).mean(),
        "norm_loss": result.spectral,
        "bn_loss": result.batch_norm_scale,
        **{name: per_image[name] for name in ("kl_all", "kl_coeffs", "balanced_kl", "recon")},
    }
    found = [
        relative(name, torch.tensor(value, dtype=torch.float64), recorded[name], 1e-12)
        for name, value in (
            ("lr", coefficients.learning_rate),
            ("kl_coeff", coefficients.kl),
            ("wdn_coeff", coefficients.spectral),
        )
    ]
    # Without batch norms, or after the KL's warm-up, some have no recorded value.
    for name, value in ours.items():
        if name not in recorded:
            continue
        floor = 1e-3 if name == "kl_all" else 1e-30
        tolerance = 10 * case.rounding["loss_rel"][number]
        if f"ref64_{name}" in recorded:
            tolerance = 10 * relative(name, recorded[name], recorded[f"ref64_{name}"], 0, floor).error
        found.append(relative(name, value, recorded[name], max(tolerance, ULPS), floor))
    images, kl = len(per_image["recon"]), per_image["kl_all"]
    found += [
        relative("recon, summed", result.reconstruction, recorded["recon"].sum(), images * ULPS),
        relative("kl_vals", result.kl_per_group / images, kl.mean(0), images * ULPS, floor=1e-3),
        # No fp64 values were recorded of these. They are sums over all latents.
        relative("log_q", per_image["log_q"], recorded["log_q"], 4 * ULPS),
        relative("log_p", per_image["log_p"], recorded["log_p"], 4 * ULPS),
    ]
    if kept := stored(recorded, "logits"):
        values, thin_out = kept
        tolerance = max(10 * case.rounding["logits_max_abs"], ULPS * values.abs().max().item())
        found.append(absolute("logits", thin_out(per_image["logits"]), values, tolerance))
    return found


def compare_gradients(case: Case, step: Step) -> list[Comparison]:
    """Each parameter's gradient at step 0, relative to its norm, or to 1e-4 of the total if larger."""
    tolerance = max(10 * case.rounding["grad_norms_max_rel"], ULPS)
    floor = 1e-4 * case.train["s0_ref64_grad_norm_total"].item()
    # A plain VAE has no use for the initial state, and ours has none.
    unused = set(case.meta["params_without_grad"]) | ({"prior_ftr0"} - step.gradients.keys())
    expected = {name: value for name, value in case.gradients_of_step_0.items() if name not in unused}
    assert set(step.gradients) == set(expected)
    norms = dict(zip(case.meta["param_names"], case.train["s0_ref64_grad_norms"], strict=True))
    found = []
    for name, ours in step.gradients.items():
        scale = max(norms[name].item(), floor)
        found.append(absolute(f"gradient of {name}", ours / scale, expected[name] / scale, tolerance))
        found.append(
            absolute(f"gradient norm of {name}", ours.norm() / scale, norms[name] / scale, tolerance)
        )
    total = case.train["s0_ref64_grad_norm_total"]
    return [*found, relative("gradient_norm", step.result.gradient_norm, total, tolerance)]


def compare_batch_norm(case: Case, step: Step) -> list[Comparison]:
    """Running statistics after step 0."""
    return [
        relative(name, step.state[name], recorded, 20 * ULPS, floor=1e-2)
        for name, recorded in case.batch_norm_after_step_0.items()
    ]


def compare_state(case: Case, step: Step) -> list[Comparison]:
    """The whole model after the third step."""
    tolerance = 10 * case.rounding["state_after_3_steps_max_abs"]
    return [
        absolute(name, ours, case.state_after_3_steps[name], tolerance * max(1.0, ours.double().abs().max()))
        for name, ours in step.state.items()
    ]
