"""Our model computes what the published implementation computed, case by case.

Two kinds of comparison. In fp32 the bound is ten times the published code's own rounding error,
which every case records. In fp64, where reference values exist, hardly any rounding is left:
a wrong formula cannot hide there.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvae.distributions import Likelihood, image_likelihood
from nvae.layers import Conv2d
from nvae.model import NVAE, Output
from nvae.objective import (
    importance_weighted_bound,
    kl_per_group,
    log_importance_weight,
    nelbo,
    reconstruction,
)
from nvae.pixels import to_model
from nvae.published import PublishedCheckpoint, published_names
from tests.nvae.published_cases import (
    Case,
    Comparison,
    absolute,
    cases,
    in_turn,
    model_images,
    recorded_noise,
    relative,
    stored,
    summary,
)
from tests.nvae.published_training import (
    compare_batch_norm,
    compare_gradients,
    compare_state,
    compare_step,
    three_steps,
)

EVERY_CASE = pytest.mark.parametrize("case", cases())
ULPS = 5e-7
"""Four units in the last place of fp32, relative: no recorded rounding error counts as smaller."""
FP64 = 1e-11


def logits_tolerance(case: Case, logits: Tensor) -> float:
    return max(10 * case.rounding["logits_max_abs"], ULPS * logits.abs().max().item())


def rounding_of(recorded: Tensor, reference: Tensor) -> float:
    """Ten times the rounding error of a recorded fp32 value, given the fp64 one."""
    error = (recorded.double() - reference).abs().max().item()
    return max(10 * error, 2 * ULPS * reference.abs().max().item())


def sensitivity(
    function: Callable[[Likelihood], Tensor], logits: Tensor, checkpoint: PublishedCheckpoint
) -> float:
    """By how much `function` of a likelihood can move, at most, when every logit moves by one."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(image_likelihood(logits, checkpoint.config)).sum(), logits)
    return gradient.abs().sum(dim=1).max().item()


def big_array(name: str, recorded: dict[str, Tensor], ours: Tensor, tolerance: float) -> list[Comparison]:
    """Comparisons of an array of which values or some of them are recorded, and of its summary."""
    found = []
    if kept := stored(recorded, name):
        values, thin_out = kept
        found.append(absolute(name, thin_out(ours), values, tolerance))
    for part, value in summary(ours).items():
        if f"{name}__{part}" in recorded:
            # Errors of single values add up in a sum and, at worst, in a norm.
            count = {"sum": ours.numel(), "l2": ours.numel() ** 0.5}.get(part, 1.0)
            found.append(absolute(f"{name} ({part})", value, recorded[f"{name}__{part}"], tolerance * count))
    return found


# --- evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(case: Case, dtype: torch.dtype) -> tuple[PublishedCheckpoint, Tensor, list[Output]]:
    """Every recorded draw of the evaluation batch, the encoder being run once."""
    checkpoint = case.load()
    model = checkpoint.model.eval().to(dtype)
    images = model_images(case.eval["x_uint8"], checkpoint.config, dtype)
    features = model.encode(images)
    draws = case.eval["nelbo_draws"].shape[1]
    outputs = [model.decode(features, recorded_noise(case.eval, f"eps_{k}")) for k in range(draws)]
    return checkpoint, images, outputs


def small_values(checkpoint: PublishedCheckpoint, images: Tensor, outputs: list[Output]) -> dict[str, Tensor]:
    """The recorded quantities that are small, by their names."""
    reconstructions = [reconstruction(output, images, checkpoint.config) for output in outputs]
    pairs = list(zip(outputs, reconstructions, strict=True))
    nelbos = torch.stack([nelbo(r, kl_per_group(output)) for output, r in pairs], dim=1)
    log_weights = torch.stack([log_importance_weight(output, r) for output, r in pairs], dim=1)
    groups = outputs[0].groups
    values = {
        "log_q": torch.stack([group.log_q for group in groups]).sum(0),
        "log_p": torch.stack([group.log_p for group in groups]).sum(0),
        "kl_all": kl_per_group(outputs[0]),
        "kl_diag": torch.stack([group.kl_per_channel.mean(0) for group in groups]),
        "recon": reconstructions[0],
        "nelbo": nelbos[:, 0],
        "log_iw0": log_weights[:, 0],
        "nelbo_draws": nelbos,
        "log_iw_draws": log_weights,
        "test_nelbo": nelbos.mean(),
        "test_neg_log_p": -importance_weighted_bound(log_weights.T).mean(),
        "z_l2": torch.stack([group.z.double().norm() for group in groups]),
        "z_sum": torch.stack([group.z.double().sum() for group in groups]),
    }
    per_nat = 1 / (math.log(2) * checkpoint.config.dimensions)
    return values | {
        "bpd_coeff": torch.tensor(per_nat, dtype=torch.float64),
        "test_bpd_elbo": values["test_nelbo"] * per_nat,
        "test_bpd_log_p": values["test_neg_log_p"] * per_nat,
    }


def small_value_tolerance(case: Case, name: str, recorded: Tensor) -> float:
    """Absolute; from the fp64 value where there is one."""
    if f"ref64_{name}" in case.eval:
        return rounding_of(recorded, case.eval[f"ref64_{name}"])
    return max(10 * case.rounding["nelbo_max_rel"], ULPS) * recorded.abs().max().item()


def evaluation(case: Case) -> list[Comparison]:
    checkpoint, images, outputs = evaluate(case, torch.float32)
    config, likelihood, recorded = checkpoint.config, outputs[0].likelihood, case.eval
    tolerance = logits_tolerance(case, likelihood.logits)
    stored_images = to_model(recorded["x_uint8"], config)
    found = [absolute("images", stored_images, images, 0.0)]
    found += big_array("logits", recorded, likelihood.logits, tolerance)
    found += per_pixel(recorded, checkpoint, likelihood, images, tolerance)
    found += [
        absolute(f"z of group {g}", group.z, recorded[f"z_{g:02d}"], 10 * ULPS * group.z.abs().max().item())
        for g, group in enumerate(outputs[0].groups)
        if f"z_{g:02d}" in recorded
    ]
    small = small_values(checkpoint, images, outputs)
    kl_tolerance = max(10 * case.rounding["kl_all_max_rel"], ULPS)
    found.append(relative("kl_all", small.pop("kl_all"), recorded["kl_all"], kl_tolerance, floor=1e-3))
    for name, value in small.items():
        found.append(absolute(name, value, recorded[name], small_value_tolerance(case, name, recorded[name])))
    return found


def per_pixel(
    recorded: dict[str, Tensor],
    checkpoint: PublishedCheckpoint,
    likelihood: Likelihood,
    images: Tensor,
    logits_tolerance: float,
) -> list[Comparison]:
    """The likelihood of every pixel, and the image of means."""
    log_prob = likelihood.log_prob(images).unsqueeze(1)
    moves = sensitivity(lambda of: of.log_prob(images), likelihood.logits, checkpoint)
    tolerance = logits_tolerance * moves + ULPS * log_prob.abs().max().item()
    found = []
    if checkpoint.config.likelihood == "normal":
        # Recorded colour by colour, and without a mean.
        if kept := stored(recorded, "pixel_log_prob"):
            values, thin_out = kept
            summed = values.sum(dim=1, keepdim=True)
            found.append(absolute("pixel_log_prob", thin_out(log_prob), summed, 3 * tolerance))
        return found
    found += big_array("pixel_log_prob", recorded, log_prob, tolerance)
    moves = sensitivity(lambda of: of.mean(), likelihood.logits, checkpoint)
    return found + big_array("recon_mean", recorded, likelihood.mean(), logits_tolerance * moves + ULPS)


def evaluation_in_fp64(case: Case) -> list[Comparison]:
    checkpoint, images, outputs = evaluate(case, torch.float64)
    values = small_values(checkpoint, images, outputs)
    values |= {f"logits__{part}": value for part, value in summary(outputs[0].likelihood.logits).items()}
    found = []
    for name, value in values.items():
        if (reference := case.eval.get(f"ref64_{name}")) is not None:
            tolerance = FP64 * max(reference.abs().max().item(), 1.0)
            found.append(absolute(f"fp64 {name}", value, reference, tolerance))
    return found


# --- sampling and re-estimated batch norms -----------------------------------------------------


def histories(case: Case) -> list[PublishedCheckpoint]:
    """The checkpoint, in the states that it may have been in when the samples were drawn.

    Published cells without batch norm initialize themselves anew on the first batch that they
    meet after loading; whether that was the evaluation batch was not recorded.
    """
    fresh = case.load()
    if fresh.config.cell_family != "res_elu":
        return [fresh]
    return [fresh, evaluate(case, torch.float32)[0]]


@torch.no_grad()
def sampling(case: Case) -> list[Comparison]:
    alternatives = [sampling_after(case, checkpoint) for checkpoint in histories(case)]
    return min(alternatives, key=lambda found: sum(not comparison.good for comparison in found))


def sampling_after(case: Case, checkpoint: PublishedCheckpoint) -> list[Comparison]:
    recorded, model, found = case.sample, checkpoint.model.eval(), []
    count = len(recorded["eps_t1.0_00"])
    for temperature in (1.0, 0.7):
        suffix = f"t{temperature}"
        noise = recorded_noise(recorded, f"eps_{suffix}")
        likelihood = model.sample(count, noise, temperature)
        tolerance = logits_tolerance(case, likelihood.logits)
        found += big_array(f"logits_{suffix}", recorded, likelihood.logits, tolerance)
        found += pixels(recorded, checkpoint, likelihood, temperature, tolerance)
    return found


@torch.enable_grad()
def pixels(
    recorded: dict[str, Tensor],
    checkpoint: PublishedCheckpoint,
    likelihood: Likelihood,
    temperature: float,
    logits_tolerance: float,
) -> list[Comparison]:
    """The mean image and the drawn image, where they were recorded."""
    suffix = f"t{temperature}"

    def compare(name: str, function: Callable[[Likelihood], Tensor]) -> list[Comparison]:
        moves = sensitivity(function, likelihood.logits, checkpoint)
        tolerance = logits_tolerance * moves + 2 * ULPS
        return big_array(f"{name}_{suffix}", recorded, function(likelihood), tolerance)

    def drawn(of: Likelihood) -> Tensor:
        if checkpoint.config.likelihood == "bernoulli":
            return of.mean()
        if checkpoint.config.likelihood == "normal":
            # Ours turns uniform draws into normal ones.
            eps = recorded[f"imgeps_{suffix}"].double()
            return of.sample(in_turn(torch.special.ndtr(eps)), temperature)
        uniform = in_turn(recorded[f"u_mix_{suffix}"], recorded[f"u_pix_{suffix}"])
        return of.sample(uniform, temperature)

    found = []
    if checkpoint.config.likelihood != "normal":
        found += compare("mean", lambda of: of.mean())
    if any(name in recorded for name in (f"u_pix_{suffix}", f"imgeps_{suffix}")) or (
        checkpoint.config.likelihood == "bernoulli"
    ):
        found += compare("img", drawn)
    return found


@torch.no_grad()
def recalibration(case: Case) -> list[Comparison]:
    """Batch norms re-estimated on prior samples: every statistic, and a sample afterwards."""
    alternatives = [recalibration_after(case, checkpoint) for checkpoint in histories(case)]
    return min(alternatives, key=lambda found: sum(not comparison.good for comparison in found))


def recalibration_after(case: Case, checkpoint: PublishedCheckpoint) -> list[Comparison]:
    recorded, settings, model = case.sample, case.meta["bnadj"], checkpoint.model
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    for iteration in range(settings["iters"]):
        noise = recorded_noise(recorded, f"bnadj_eps_{iteration}")
        model.sample(settings["num_samples"], noise, settings["t"])
    moved = moved_statistics(model, before)
    assert {f"bnadj/{name}" for name in moved} == {name for name in recorded if name.startswith("bnadj/")}
    found = []
    for name, value in moved.items():
        expected = recorded[f"bnadj/{name}"]
        tolerance = 10 * case.rounding["logits_max_abs"] * max(1.0, expected.abs().max().item())
        found.append(absolute(f"bnadj/{name}", value, expected, tolerance))
    temperature = settings["t"]
    noise = recorded_noise(recorded, f"eps_t{temperature}")
    likelihood = model.eval().sample(settings["num_samples"], noise, temperature)
    name = f"bnadj_logits_t{temperature}"
    return found + big_array(name, recorded, likelihood.logits, logits_tolerance(case, likelihood.logits))


def moved_statistics(model: NVAE, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running means and variances that differ from those before, by their published names."""
    names = published_names(model)
    return {
        names[name]: value
        for name, value in model.named_buffers()
        if name.endswith(("running_mean", "running_var")) and not torch.equal(value, before[name])
    }


# --- tests -------------------------------------------------------------------------------------


def assert_all_good(comparisons: list[Comparison]) -> None:
    bad = [str(comparison) for comparison in comparisons if not comparison.good]
    assert comparisons
    assert not bad, "\n".join(bad)


@EVERY_CASE
def test_names_and_order_of_the_published_parameters_are_known(case: Case) -> None:
    checkpoint = case.load()
    names = published_names(checkpoint.model)
    parameters = [names[name] for name, _ in checkpoint.model.named_parameters()]
    # A plain VAE has no use for the initial state, ours has none.
    expected = [name for name in case.meta["param_names"] if name in set(names.values())]
    assert parameters == expected
    assert set(case.meta["param_names"]) - set(parameters) <= {"prior_ftr0"}
    shapes = dict(map(tuple, case.meta["state_dict_keys"]))
    assert all(
        list(parameter.shape) == shapes[names[name]]
        for name, parameter in checkpoint.model.named_parameters()
    )


@EVERY_CASE
def test_convolutions_are_met_in_the_published_order(case: Case) -> None:
    model = case.load().model
    names = published_names(model)
    for group in case.meta["sr_groups"]:
        ours = [
            names[f"{name}.weight"].removesuffix(".weight")
            for name, module in model.named_modules()
            if isinstance(module, Conv2d) and list(module.weight.flatten(1).shape) == group["shape"]
        ]
        assert ours == group["layers"]


@EVERY_CASE
def test_the_evaluation_is_the_published_one(case: Case) -> None:
    assert_all_good(evaluation(case))


@EVERY_CASE
def test_the_evaluation_in_fp64_is_the_published_one(case: Case) -> None:
    comparisons = evaluation_in_fp64(case)
    if not comparisons:
        pytest.skip("the case has no fp64 values")
    assert_all_good(comparisons)


@EVERY_CASE
def test_prior_samples_are_the_published_ones(case: Case) -> None:
    assert_all_good(sampling(case))


@EVERY_CASE
def test_batch_norms_are_re_estimated_as_in_the_published_code(case: Case) -> None:
    assert_all_good(recalibration(case))


@EVERY_CASE
def test_three_resumed_training_steps_are_the_published_ones(case: Case) -> None:
    steps = three_steps(case)
    for number, step in enumerate(steps):
        assert_all_good(compare_step(case, number, step))
    assert_all_good(compare_gradients(case, steps[0]))
    assert_all_good(compare_state(case, steps[-1]))
    if case.meta["num_bn_layers"]:
        assert_all_good(compare_batch_norm(case, steps[0]))
