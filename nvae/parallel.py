"""A model on several ranks, whose gradients are added up in one way from the first update on.

DistributedDataParallel adds gradients up bucket by bucket: in its first update all in one bucket,
from then on in buckets filled in the order in which the gradients arrived. From three ranks on a
gradient's place in its bucket decides in which order the ranks are added, and so how the sum is
rounded: the first update of a resumed run would not be that of the uninterrupted one. So one
small update is made and undone before the training, which settles the buckets.

Rejected: find_unused_parameters=True (keeps its first buckets, but searches the graph and adds a
collective in every update), one large bucket (nothing is sent before the backward pass ends, and
its order changes all the same), a backward pass through nothing but the parameters, in the order
of the model (cheaper, but then buckets are not full before 79% of the gradients are there, on the
average of `celeba64`, instead of 71%).
"""

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from nvae.model import NVAE
from nvae.step import Coefficients, StepSettings, update

_IMAGES = 2


def data_parallel(model: NVAE) -> DistributedDataParallel:
    """The model, made to average gradients over all ranks. Every rank must call it.

    Buffers are not broadcast, since batch norm synchronizes its own statistics.
    """
    device, config = next(model.parameters()).device, model.config
    parallel = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    # Not its state_dict, which leaves out whether a layer was initialized from data.
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    shape = (_IMAGES, config.image_channels, config.image_size, config.image_size)
    update(
        parallel,
        SGD(model.parameters(), lr=0.0),
        torch.zeros(shape, dtype=torch.uint8, device=device),
        Coefficients(learning_rate=0.0, kl=1.0, spectral=1.0),
        StepSettings(),
        noise=torch.zeros(_IMAGES, config.num_latents, device=device),
    )
    with torch.no_grad():
        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)
    model.zero_grad()
    return parallel
