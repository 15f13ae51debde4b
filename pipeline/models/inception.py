# B images, D features (2048), H x W pixels.
"""The Inception v3 whose features FID, precision and recall are measured in.

Figures of FID in papers are of one certain network: TensorFlow's Inception of 2015-12-05, which
differs from torchvision's in its pools (averages that leave the padding out, one maximum instead of an
average) and has 1008 classes. Names and shapes are those of pytorch-fid's file, which holds that
network's weights; they are not ours to hand out (pipeline/inception_weights.py takes the user's).

Images are brought to 299 x 299 as pytorch-fid does: bilinear, without antialiasing, in [-1, 1].

`divisor` makes the same network with fewer channels, for tests: loading, names and shapes are the real ones.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import storage
from pipeline.artifacts import (
    ArtifactError,
    Manifest,
    read_manifest,
    read_verified,
    tensors_from_bytes,
    tensors_to_bytes,
    write_directory,
)
from pipeline.errors import InputError

_FORMAT, _FORMAT_VERSION, _FILE = "nvae-inception", 1, "inception.safetensors"
_SIZE = 299
_UNUSED = ("fc.", "AuxLogits.")
"""Weights behind the features."""


class InceptionError(InputError):
    """Weights that are not those of the network, or not the ones that were meant."""


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], **how: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, bias=False, **how)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.relu(self.bn(self.conv(x)))
        return y


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int, d: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(inputs, 64 // d, 1)
        self.branch5x5_1 = Unit(inputs, 48 // d, 1)
        self.branch5x5_2 = Unit(48 // d, 64 // d, 5, padding=2)
        self.branch3x3dbl_1 = Unit(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = Unit(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96 // d, 96 // d, 3, padding=1)
        self.branch_pool = Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(inputs, 384 // d, 3, stride=2)
        self.branch3x3dbl_1 = Unit(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = Unit(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96 // d, 96 // d, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    def __init__(self, inputs: int, middle: int, d: int) -> None:
        super().__init__()
        row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
        out = 192 // d
        self.branch1x1 = Unit(inputs, out, 1)
        self.branch7x7_1 = Unit(inputs, middle, 1)
        self.branch7x7_2 = Unit(middle, middle, (1, 7), **row)
        self.branch7x7_3 = Unit(middle, out, (7, 1), **column)
        self.branch7x7dbl_1 = Unit(inputs, middle, 1)
        self.branch7x7dbl_2 = Unit(middle, middle, (7, 1), **column)
        self.branch7x7dbl_3 = Unit(middle, middle, (1, 7), **row)
        self.branch7x7dbl_4 = Unit(middle, middle, (7, 1), **column)
        self.branch7x7dbl_5 = Unit(middle, out, (1, 7), **row)
        self.branch_pool = Unit(inputs, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(inputs, 192 // d, 1)
        self.branch3x3_2 = Unit(192 // d, 320 // d, 3, stride=2)
        self.branch7x7x3_1 = Unit(inputs, 192 // d, 1)
        self.branch7x7x3_2 = Unit(192 // d, 192 // d, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192 // d, 192 // d, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192 // d, 192 // d, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, seven, functional.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    def __init__(self, inputs: int, d: int, *, maximum: bool) -> None:
        super().__init__()
        self._maximum = maximum
        self.branch1x1 = Unit(inputs, 320 // d, 1)
        self.branch3x3_1 = Unit(inputs, 384 // d, 1)
        self.branch3x3_2a = Unit(384 // d, 384 // d, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384 // d, 384 // d, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(inputs, 448 // d, 1)
        self.branch3x3dbl_2 = Unit(448 // d, 384 // d, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384 // d, 384 // d, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384 // d, 384 // d, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(inputs, 192 // d, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        # The last block takes the maximum: a slip of the original that its weights were trained with.
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self._maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """Images to the 2048 features before the classes. In eval mode only."""

    def __init__(self, divisor: int = 1) -> None:
        super().__init__()
        d = divisor
        self.Conv2d_1a_3x3 = Unit(3, 32 // d, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32 // d, 32 // d, 3)
        self.Conv2d_2b_3x3 = Unit(32 // d, 64 // d, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64 // d, 80 // d, 1)
        self.Conv2d_4a_3x3 = Unit(80 // d, 192 // d, 3)
        self.Mixed_5b = BlockA(192 // d, 32 // d, d)
        self.Mixed_5c = BlockA(256 // d, 64 // d, d)
        self.Mixed_5d = BlockA(288 // d, 64 // d, d)
        self.Mixed_6a = BlockB(288 // d, d)
        self.Mixed_6b = BlockC(768 // d, 128 // d, d)
        self.Mixed_6c = BlockC(768 // d, 160 // d, d)
        self.Mixed_6d = BlockC(768 // d, 160 // d, d)
        self.Mixed_6e = BlockC(768 // d, 192 // d, d)
        self.Mixed_7a = BlockD(768 // d, d)
        self.Mixed_7b = BlockE(1280 // d, d, maximum=False)
        self.Mixed_7c = BlockE(2048 // d, d, maximum=True)
        self.features = 2048 // d

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) in [0, 1] -> (B, D) float32. Grey images have three equal colours."""
        x = images.float().expand(-1, 3, -1, -1)
        x = 2 * functional.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2))
        x = functional.max_pool2d(self.Conv2d_4a_3x3(x), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        last: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return last.mean(dim=(2, 3))


def write_inception(url: str, network: Inception, source_sha256: str) -> None:
    """Writes its weights into the folder `url`, as safetensors; the hash is that of where they came from."""
    state, fields = tensors_to_bytes(network.state_dict()), {"source_sha256": source_sha256}
    write_directory(url, [(_FILE, state)], format=_FORMAT, version=_FORMAT_VERSION, fields=fields)


def inception_manifest(url: str) -> Manifest:
    """The manifest of such a folder, with a field `source_sha256`; raises ArtifactError if it has none."""
    return read_manifest(url, format=_FORMAT, version=_FORMAT_VERSION)


def load_inception(url: str, manifest_sha256: str) -> Inception:
    """The network whose weights were written there; raises ArtifactError if they were changed."""
    manifest = inception_manifest(url)
    if manifest.sha256 != manifest_sha256:
        raise ArtifactError(f"{storage.shown(url)}: the weights of Inception were changed meanwhile.")
    return with_weights(tensors_from_bytes(read_verified(manifest, _FILE), url), url)


def with_weights(weights: Mapping[str, Tensor], source: str) -> Inception:
    """The network with these weights; raises InceptionError with what does not fit."""
    weights = {
        # The counters of training are of no use, and files of before torch 0.4 lack them.
        name: value
        for name, value in weights.items()
        if not name.startswith(_UNUSED) and not name.endswith("num_batches_tracked")
    }
    first = weights.get("Conv2d_1a_3x3.conv.weight")
    outputs = first.shape[0] if first is not None and first.dim() == 4 else 32
    network = Inception(32 // outputs if outputs in (2, 4, 8, 16) else 1)
    expected = network.state_dict()
    wrong = _misfits({name: expected[name] for name in expected if "num_batches" not in name}, weights)
    if wrong:
        raise InceptionError(
            f"{source}: these are not the weights of the Inception that FID is measured with; "
            f"{len(wrong)} differ: {'; '.join(wrong[:3])}."
        )
    network.load_state_dict(weights, strict=False)
    return network.eval().requires_grad_(False)


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}")
        elif found[name].dtype != torch.float32 or not torch.isfinite(found[name]).all():
            wrong.append(f"{name} holds no finite float32 numbers")
    return sorted(wrong)
