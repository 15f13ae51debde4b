"""Which published weight is which of ours: module by module, in the published order of parameters."""

from collections.abc import Iterator

from torch import nn

from nvae.cells import Cell, InvertedOperation, ResidualOperation
from nvae.layers import BilinearExpand, FactorizedReduce, SqueezeExcitation
from nvae.model import NVAE, DecoderGroup, EncoderGroup


def published_names(model: NVAE) -> dict[str, str]:
    """The published name of every entry of `model.state_dict()`, by ours; singular vectors have none."""
    names = {}
    if hasattr(model, "initial_state"):
        names["initial_state"] = "prior_ftr0"
    for ours, published in _modules(model):
        for entry in model.get_submodule(ours).state_dict():
            names[f"{ours}.{entry}"] = f"{published}.{entry}"
    return names


Names = Iterator[tuple[str, str]]
"""Pairs of module names: ours, published."""


def _modules(model: NVAE) -> Names:
    """Of every module that has weights, in the order of the published parameters."""
    yield "stem", "stem"
    yield from _cells(model.preprocess, "preprocess", "pre_process")
    yield from _encoder_tower(model)
    yield "encoder_head", "enc0.1"
    yield from ((f"posterior_heads.{i}", f"enc_sampler.{i}") for i in range(len(model.posterior_heads)))
    yield from ((f"prior_heads.{i}", f"dec_sampler.{i}.1") for i in range(len(model.prior_heads)))
    yield from _flows(model)
    if hasattr(model, "latent_projection"):
        yield "latent_projection", "stem_decoder"
    yield from _decoder_tower(model)
    yield from _cells(model.postprocess, "postprocess", "post_process")
    yield "image_head", "image_conditional.1"


def _encoder_tower(model: NVAE) -> Names:
    index = 0
    for position, group in enumerate(model.encoder_tower):
        assert isinstance(group, EncoderGroup)
        ours = f"encoder_tower.{position}"
        yield from _cells(group.cells, f"{ours}.cells", "enc_tower", first=index)
        index += len(group.cells)
        if group.combiner is not None:
            yield f"{ours}.combiner.convolution", f"enc_tower.{index}.conv"
            index += 1
        if group.down is not None:
            yield from _cell(group.down, f"{ours}.down", f"enc_tower.{index}")
            index += 1


def _decoder_tower(model: NVAE) -> Names:
    index = 0
    for position, group in enumerate(model.decoder_tower):
        assert isinstance(group, DecoderGroup)
        ours = f"decoder_tower.{position}"
        yield from _cells(group.cells, f"{ours}.cells", "dec_tower", first=index)
        index += len(group.cells)
        yield f"{ours}.combiner.convolution", f"dec_tower.{index}.conv"
        index += 1
        if group.up is not None:
            yield from _cell(group.up, f"{ours}.up", f"dec_tower.{index}")
            index += 1


def _flows(model: NVAE) -> Names:
    index = 0
    for group, pairs in enumerate(model.flows):
        assert isinstance(pairs, nn.Sequential)
        for pair in range(len(pairs)):
            for cell, name in (("first", "cell1"), ("second", "cell2")):
                ours, published = f"flows.{group}.{pair}.{cell}", f"nf_cells.{index}.{name}"
                yield f"{ours}.widen", f"{published}.conv.convz.0"
                yield f"{ours}.spatial", f"{published}.conv.convz.2"
                yield f"{ours}.shift", f"{published}.mu.conv_0"
            index += 1


def _cells(cells: nn.Sequential, ours: str, published: str, first: int = 0) -> Names:
    for index, cell in enumerate(cells):
        assert isinstance(cell, Cell)
        yield from _cell(cell, f"{ours}.{index}", f"{published}.{first + index}")


def _cell(cell: Cell, ours: str, published: str) -> Names:
    if isinstance(cell.skip, FactorizedReduce):
        yield from ((f"{ours}.skip.convolutions.{i}", f"{published}.skip.conv_{i + 1}") for i in range(4))
    elif isinstance(cell.skip, BilinearExpand):
        yield f"{ours}.skip.convolution", f"{published}.skip.1"
    for index, operation in enumerate(cell.operations):
        names = f"{ours}.operations.{index}", f"{published}._ops.{index}"
        if isinstance(operation, InvertedOperation):
            yield from _inverted(operation, *names)
        elif isinstance(operation, ResidualOperation):
            yield from _residual(operation, *names)
    if isinstance(cell.gate, SqueezeExcitation):
        yield f"{ours}.gate.squeeze", f"{published}.se.se.0"
        yield f"{ours}.gate.excite", f"{published}.se.se.2"


def _residual(operation: ResidualOperation, ours: str, published: str) -> Names:
    if operation.batch_norm is not None:
        # Batch norm with swish is one published module, with ELU a wrapped one.
        inner = "bn_act" if operation.batch_norm.activation == "swish" else "bn.bn"
        yield f"{ours}.batch_norm", f"{published}.{inner}"
    yield f"{ours}.convolution", f"{published}.conv_0"


def _inverted(operation: InvertedOperation, ours: str, published: str) -> Names:
    # In cells that double the resolution, the upsampling takes the first place.
    first = 1 if operation.direction == "up" else 0
    places = [f"{published}.conv.{first + place}" for place in range(5)]
    yield f"{ours}.input_norm", f"{places[0]}.bn"
    yield f"{ours}.expand", f"{places[1]}.conv.0"
    yield f"{ours}.expand_norm", f"{places[1]}.conv.1"
    yield f"{ours}.spatial", f"{places[2]}.conv.0"
    yield f"{ours}.spatial_norm", f"{places[2]}.conv.1"
    yield f"{ours}.project", places[3]
    yield f"{ours}.project_norm", f"{places[4]}.bn"
