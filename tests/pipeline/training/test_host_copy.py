import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from pipeline.training.host_copy import HostCopy

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
)
KINDS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))


def tensors(kinds: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
    return {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in kinds.items()}


def contents(copy: HostCopy) -> dict[str, bytes]:
    return {name: bytes(content) for name, content in copy.contents()}


@given(st.dictionaries(st.text(st.characters(exclude_categories=["C"]), min_size=1), KINDS, max_size=6))
def test_a_file_is_what_the_safetensors_library_would_write(
    kinds: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    given_tensors, copy = tensors(kinds), HostCopy()
    copy.take({"a": given_tensors})
    assert contents(copy) == {"a": save(given_tensors)}


def test_tensors_need_not_be_contiguous_and_may_share_memory() -> None:
    weight, copy = torch.arange(12.0).view(3, 4), HostCopy()
    copy.take({"a": {"whole": weight, "turned": weight.t(), "part": weight[1:, ::2]}})
    found = load(contents(copy)["a"])
    assert torch.equal(found["whole"], weight)
    assert torch.equal(found["turned"], weight.t())
    assert torch.equal(found["part"], weight[1:, ::2])


def test_memory_is_used_again_for_tensors_of_the_same_kind_and_taken_anew_for_others() -> None:
    copy, addresses = HostCopy(), []
    # At first an optimizer has no state.
    for state in ({}, {"step": torch.ones(64)}, {"step": torch.zeros(64)}, {"step": torch.ones(65)}):
        copy.take({"model": {"weight": torch.full((64,), len(state))}, "optimizer": state})
        model, optimizer = (content for _, content in copy.contents())
        assert load(bytes(optimizer)).keys() == state.keys()
        addresses.append(
            [torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block in (model, optimizer)]
        )
    models, optimizers = zip(*addresses, strict=True)
    assert len(set(models)) == 1
    assert optimizers[1] == optimizers[2]
