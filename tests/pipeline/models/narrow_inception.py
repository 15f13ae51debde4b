"""Inception with a sixteenth of the channels and random weights."""

import torch
from torch import nn

from pipeline.models.inception import Inception

DIVISOR = 16


def narrow(seed: int = 0) -> Inception:
    """No layer is without an effect on it, and images of different colours have different features.

    Deep networks of random weights have nearly the same for all images, unless batch norm was of some.
    """
    torch.manual_seed(seed)
    network = Inception(DIVISOR)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 1, 1) + 0.3 * torch.rand(16, 3, 8, 8))
    return network.eval().requires_grad_(False)
