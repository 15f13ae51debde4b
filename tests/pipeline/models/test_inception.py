"""Inception beside a second writing of it, as a table of branches, on narrow random weights."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.inception import Inception, InceptionError, with_weights
from tests.pipeline.models.narrow_inception import DIVISOR, narrow

# Of the branches that pad; from the drawings of the Inception v3 paper (figures 5 to 7).
CONVOLUTIONS = {
    "7x7_2": (0, 3),
    "7x7_3": (3, 0),
    "7x7dbl_2": (3, 0),
    "7x7dbl_3": (0, 3),
    "7x7dbl_4": (3, 0),
    "7x7dbl_5": (0, 3),
    "7x7x3_2": (0, 3),
    "7x7x3_3": (3, 0),
    "5x5_2": (2, 2),
    "3x3_2a": (0, 1),
    "3x3_2b": (1, 0),
    "3x3dbl_3a": (0, 1),
    "3x3dbl_3b": (1, 0),
    "3x3dbl_2": (1, 1),
}


def slow_features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    def unit(x: Tensor, name: str, stride: int = 1, pad: tuple[int, int] | None = None) -> Tensor:
        if pad is None:
            pad = CONVOLUTIONS.get(name.rpartition("branch")[2], (0, 0))
        x = functional.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=pad)
        bn = [
            weights[f"{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return ((x - bn[0]) / (bn[1] + 1e-3).sqrt() * bn[2] + bn[3]).clamp(min=0)

    def chain(x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = unit(x, f"{block}.branch{name}")
        return x

    def average(x: Tensor) -> Tensor:
        # The padding is not counted: sum of what is there over how much is there.
        there = functional.avg_pool2d(torch.ones_like(x), 3, 1, 1, divisor_override=1)
        return functional.avg_pool2d(x, 3, 1, 1, divisor_override=1) / there

    x = functional.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    x = unit(x, "Conv2d_1a_3x3", 2)
    x = unit(unit(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", pad=(1, 1))
    x = functional.max_pool2d(x, 3, 2)
    x = unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = functional.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        last = unit(chain(x, block, "3x3dbl_1", "3x3dbl_2"), f"{block}.branch3x3dbl_3", pad=(1, 1))
        branches = chain(x, block, "1x1"), chain(x, block, "5x5_1", "5x5_2"), last
        x = torch.cat([*branches, chain(average(x), block, "_pool")], 1)
    half = unit(chain(x, "Mixed_6a", "3x3dbl_1", "3x3dbl_2"), "Mixed_6a.branch3x3dbl_3", 2)
    x = torch.cat([unit(x, "Mixed_6a.branch3x3", 2), half, functional.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        double = chain(x, block, *(f"7x7dbl_{number}" for number in range(1, 6)))
        seven = chain(x, block, "7x7_1", "7x7_2", "7x7_3")
        x = torch.cat([chain(x, block, "1x1"), seven, double, chain(average(x), block, "_pool")], 1)
    three = unit(chain(x, "Mixed_7a", "3x3_1"), "Mixed_7a.branch3x3_2", 2)
    seven = unit(chain(x, "Mixed_7a", "7x7x3_1", "7x7x3_2", "7x7x3_3"), "Mixed_7a.branch7x7x3_4", 2)
    x = torch.cat([three, seven, functional.max_pool2d(x, 3, 2)], 1)
    for block, pooled in (("Mixed_7b", average), ("Mixed_7c", lambda x: functional.max_pool2d(x, 3, 1, 1))):
        single, double = chain(x, block, "3x3_1"), chain(x, block, "3x3dbl_1", "3x3dbl_2")
        parts = [chain(x, block, "1x1")]
        parts += [chain(single, block, "3x3_2a"), chain(single, block, "3x3_2b")]
        parts += [chain(double, block, "3x3dbl_3a"), chain(double, block, "3x3dbl_3b")]
        x = torch.cat([*parts, chain(pooled(x), block, "_pool")], 1)
    return x.mean((2, 3))


def test_features_are_those_of_a_second_writing() -> None:
    network, images = narrow(), torch.rand(1, 3, 64, 64)
    expected = slow_features(network.state_dict(), images)
    assert expected.std() > 0.01
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_the_network_has_the_parameters_of_the_published_one() -> None:
    with torch.device("meta"):
        network = Inception()
    # Known of Inception v3 without its auxiliary head and its classes.
    assert sum(each.numel() for each in network.parameters()) == 21_785_568
    assert network.features == 2048


def test_features_do_not_depend_on_the_other_images_and_grey_is_three_equal_colours() -> None:
    network, images = narrow(), torch.rand(2, 1, 32, 32)
    found = network(images)
    assert found.shape == (2, 2048 // DIVISOR)
    torch.testing.assert_close(network(images[:1].expand(-1, 3, -1, -1)), found[:1])


def test_all_that_is_wrong_with_weights_is_named_at_once() -> None:
    weights = dict(narrow().state_dict())
    del weights["Mixed_5b.branch1x1.bn.bias"]
    weights["extra"] = torch.zeros(1)
    weights["Conv2d_1a_3x3.bn.bias"] = torch.zeros(9)
    with pytest.raises(InceptionError) as error:
        with_weights(weights, "weights.safetensors")
    for part in (
        "weights.safetensors: these are not the weights",
        "3 differ",
        "Mixed_5b.branch1x1.bn.bias is missing",
        "extra is unknown",
        "Conv2d_1a_3x3.bn.bias is (9,), not (2,)",
    ):
        assert part in str(error.value)


def test_weights_that_are_no_numbers_are_refused_and_what_is_behind_the_features_is_left_out() -> None:
    weights = dict(narrow().state_dict())
    extra = {"fc.weight": torch.zeros(1008, 128), "AuxLogits.conv0.conv.weight": torch.zeros(1)}
    assert with_weights(weights | extra, "here").features == 2048 // DIVISOR
    weights["Conv2d_2a_3x3.bn.weight"][1] = torch.nan
    with pytest.raises(InceptionError, match=r"Conv2d_2a_3x3\.bn\.weight holds no finite float32 numbers"):
        with_weights(weights, "here")
