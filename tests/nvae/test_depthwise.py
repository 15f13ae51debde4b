import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nvae import depthwise, native
from tests.nvae.tiny import seeded


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    assert depthwise.available()


def case(
    batch: int, channels: int, height: int, width: int, size: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and the gradient of the output."""
    draws = seeded(batch + channels + height + width + size + stride)
    x = torch.randn(batch, channels, height, width, generator=draws)
    weight = torch.randn(channels, 1, size, size, generator=draws)
    y = F.conv2d(x, weight, stride=stride, padding=size // 2, groups=channels)
    return x.contiguous(memory_format=torch.channels_last), weight, torch.randn(y.shape, generator=draws)


def gradients(x: Tensor, weight: Tensor, grad: Tensor, stride: int, ours: bool) -> list[Tensor]:
    """Output and both gradients, by torch or by ours."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    if ours:
        y = depthwise.convolve(x, weight, stride)
    else:
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight))
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).norm().item()


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(depthwise.SIZES),
    st.sampled_from((1, 2)),
)
def test_gradients_are_exact_for_every_shape(batch, channels, height, width, size, stride):
    x, weight, grad = case(batch, channels, height, width, size, stride)
    exact = gradients(x.double(), weight.double(), grad.double(), stride, ours=False)
    plain = gradients(x, weight, grad, stride, ours=False)
    for ours, torchs, right in zip(gradients(x, weight, grad, stride, ours=True), plain, exact, strict=True):
        assert ours.shape == right.shape
        assert error(ours, right) <= 2 * error(torchs, right) + 1e-6 * right.norm()


def test_the_weight_gradient_of_a_large_image_has_no_larger_error_than_torchs():
    x, weight, grad = case(1, 24, 128, 128, 5, 1)
    [_, _, right] = gradients(x.double(), weight.double(), grad.double(), 1, ours=False)
    [_, _, torchs] = gradients(x, weight, grad, 1, ours=False)
    assert error(depthwise.weight_gradient(x, grad, 5, 1), right) <= error(torchs, right)


def test_the_weight_gradient_is_the_same_for_any_number_of_threads():
    x, _, grad = case(2, 20, 9, 7, 5, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(depthwise.weight_gradient(x, grad, 5, 1))
    finally:
        torch.set_num_threads(before)
    assert all(each.equal(found[0]) for each in found)


def test_what_it_is_not_made_for_is_left_to_torch():
    x, weight, _ = case(2, 8, 6, 6, 5, 1)
    assert depthwise.applies(x, weight, 1, 1)
    assert not depthwise.applies(x.contiguous(), weight, 1, 1)
    assert not depthwise.applies(x.double(), weight.double(), 1, 1)
    assert not depthwise.applies(x, weight, 1, 2)
    assert not depthwise.applies(x, weight, 3, 1)
    assert not depthwise.applies(x, torch.zeros(8, 1, 7, 7), 1, 1)
    assert not depthwise.applies(x, torch.zeros(8, 2, 5, 5), 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not depthwise.applies(x, weight, 1, 1)
    with pytest.raises(ValueError, match="7x7"):
        depthwise.weight_gradient(x, x, 7, 1)


# --- building ----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def test_what_was_built_is_kept_for_this_user_alone_and_built_once(machine: Path):
    assert native.load("depthwise") is not None
    [library] = (machine / "cache" / "nvae" / "native").iterdir()
    assert library.parent.stat().st_mode & 0o77 == 0
    built = library.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load("depthwise") is not None
    assert library.stat().st_mtime_ns == built


def test_a_folder_that_others_can_write_to_is_not_trusted(machine: Path):
    folder = machine / "cache" / "nvae" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.load("depthwise") is not None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_it_says_so_and_torch_computes(machine, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=r"depthwise\.c is not used.*"):
        assert not depthwise.available()
    x, weight, _ = case(1, 4, 4, 4, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not depthwise.applies(x, weight, 1, 1)


def test_processes_that_build_at_once_all_get_a_whole_library(machine: Path):
    program = "from nvae import depthwise; raise SystemExit(not depthwise.available())"
    building = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ, cwd=Path(__file__).parents[2])
        for _ in range(4)
    ]
    assert [each.wait() for each in building] == [0] * 4
    assert len(list((machine / "cache" / "nvae" / "native").iterdir())) == 1


def test_the_gradient_is_that_of_the_definition():
    """Written out: every tap's products, added up."""
    x, _, grad = case(2, 3, 5, 6, 3, 2)
    padded = F.pad(x, [1] * 4)
    expected = torch.zeros(3, 1, 3, 3)
    for i in range(3):
        for j in range(3):
            seen = padded[:, :, i : i + 2 * grad.shape[2] : 2, j : j + 2 * grad.shape[3] : 2]
            seen = seen[:, :, : grad.shape[2], : grad.shape[3]]
            expected[:, 0, i, j] = (grad * seen).sum(dim=(0, 2, 3))
    assert_close(depthwise.weight_gradient(x, grad, 3, 2), expected)
