"""Under autocast the operations do with dtypes what torch's scaled_dot_product_attention does, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa import nsa_attention, ops
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.op_inputs import op_inputs
from torch import Tensor
from torch.nn import functional as F

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
LAYOUT = VarlenLayout.from_lengths([50, 9])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INDICES = torch.arange(4, dtype=torch.int32).expand(59, 2, 4)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k_cmp, v_cmp = (ops.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    gates = torch.full((59, 4, 3), 0.25)  # fp32, as a gate computed outside of autocast may be
    return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, LAYOUT, BLOCKS)


def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k_cmp, v_cmp = (ops.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    return ops.compressed_attention(q, k_cmp, v_cmp, LAYOUT, BLOCKS)[0]


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "compressed": compressed,
    "selected": lambda q, k, v: ops.selected_attention(q, k, v, INDICES, LAYOUT, BLOCKS)[0],
    "window": lambda q, k, v: ops.window_attention(q, k, v, LAYOUT, BLOCKS)[0],
    "whole": whole,
}


def leaves(*dtypes: torch.dtype) -> list[Tensor]:
    shapes = (59, 4, 8), (59, 2, 8), (59, 2, 8)
    return [torch.randn(s).to(dtype).requires_grad_() for s, dtype in zip(shapes, dtypes, strict=True)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))


def dtypes_of(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[torch.dtype]:
    """Of the output and the gradients."""
    out = attend(*inputs)
    return [out.dtype, *(x.dtype for x in torch.autograd.grad(out.sum(), inputs))]


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_dtypes_are_those_of_torchs_attention(name: str, dtype: torch.dtype, region: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=region):
        expected = dtypes_of(dense, leaves(dtype, dtype, dtype))
        assert dtypes_of(ATTENTIONS[name], leaves(dtype, dtype, dtype)) == expected
    assert expected[0] == (dtype if dtype == torch.float64 else region)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_are_those_of_inputs_cast_by_hand(name: str) -> None:
    inputs = leaves(torch.float32, torch.float32, torch.float32)
    by_hand = [x.detach().bfloat16() for x in inputs]
    # What is compressed is cast after that: a mean runs in its own dtype.
    k_cmp, v_cmp = (ops.compress_mean(x.detach(), LAYOUT, BLOCKS).bfloat16() for x in inputs[1:])
    q, k, v = by_hand
    if name == "compressed":
        expected = ops.compressed_attention(q, k_cmp, v_cmp, LAYOUT, BLOCKS)[0]
    elif name == "whole":
        expected = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, torch.full((59, 4, 3), 0.25), LAYOUT, BLOCKS)
    else:
        expected = ATTENTIONS[name](*by_hand)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ATTENTIONS[name](*inputs), expected)


@pytest.mark.parametrize("name", ["selected", "window"])
def test_inputs_of_several_dtypes_meet_in_the_regions(name: str) -> None:
    inputs = leaves(torch.float32, torch.bfloat16, torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtypes_of(ATTENTIONS[name], inputs) == dtypes_of(dense, inputs)
        with (
            torch.autocast("cpu", enabled=False),
            pytest.raises(TypeError, match=r"k: expected dtype torch.float32 of q"),
        ):
            ATTENTIONS[name](*inputs)
    with pytest.raises(TypeError, match=r"k: expected dtype torch.float32 of q, got torch.bfloat16"):
        ATTENTIONS[name](*inputs)


def test_blocks_are_selected_from_what_the_attention_saw() -> None:
    q, k, _ = (x.detach() for x in leaves(torch.float32, torch.float32, torch.float32))
    k_cmp = ops.compress_mean(k, LAYOUT, BLOCKS)
    half = q.bfloat16(), k_cmp.bfloat16()
    _, lse = ops.compressed_attention(half[0], half[1], half[1], LAYOUT, BLOCKS)
    expected = ops.select_blocks(*half, lse, LAYOUT, BLOCKS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse_under = ops.compressed_attention(q, k_cmp, k_cmp, LAYOUT, BLOCKS)
        assert (lse_under.dtype, torch.equal(lse_under, lse)) == (torch.float32, True)
        assert torch.equal(ops.select_blocks(q, k_cmp, lse, LAYOUT, BLOCKS), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_products_and_sums_keep_their_dtype(dtype: torch.dtype) -> None:
    """As torch's do: autocast leaves mean alone, and mul and add but promote. The output's dtype is the outputs'."""
    x, gates = torch.randn(59, 2, 8).to(dtype), torch.rand(59, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.compress_mean(x, LAYOUT, BLOCKS).dtype == x.mean(0).dtype == dtype
        assert ops.combine(gates.to(dtype), x, x, x).dtype == (gates.to(dtype)[..., :1] * x + x).dtype == dtype
        assert ops.combine(gates, x, x, x).dtype == dtype


def test_pages_are_not_converted() -> None:
    pages = torch.randn(1, 16, 1, 8)
    kv = PagedKV(pages, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32))
    layout = VarlenLayout.from_lengths([1], [9])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"k: expected dtype torch.bfloat16 of q, got torch.float32"):
            ops.window_attention(torch.randn(1, 2, 8), kv, kv, layout, BLOCKS)
        kv = PagedKV(pages.bfloat16(), kv.block_table, kv.lengths)
        assert ops.window_attention(torch.randn(1, 2, 8), kv, kv, layout, BLOCKS)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_and_its_gradients(region: torch.dtype, variant: dict, make_layer: Callable) -> None:
    """Output in the region's dtype; parameters and their gradients stay fp32, near those of fp64.

    All blocks are selected in 50 tokens (4 blocks of topk 4), so rounding moves no index.
    """
    layer, x = make_layer(**variant), torch.randn(2, 50, 24, dtype=torch.float64)

    def gradients(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = layer(x)
        return out, list(torch.autograd.grad(out.double().square().mean(), tuple(layer.parameters())))

    exact_out, exact = gradients(x)
    layer.float()
    with torch.autocast("cpu", dtype=region):
        out, found = gradients(x.float())
    assert out.dtype == region
    assert {x.dtype for x in found} == {torch.float32}
    # Forward: see test_layer.py. Backward: as many roundings again, and those of the forward enter it. All gradients as
    # one vector: that of a bias of the compressed keys is 0 where a softmax takes it out again.
    flat, exact_flat = (torch.cat([x.double().flatten() for x in part]) for part in (found, exact))
    for got, expected, units in ((out.double(), exact_out, 30), (flat, exact_flat, 60)):
        assert (got - expected).norm() < units * torch.finfo(region).eps * expected.norm()


def decoding(dtype: torch.dtype) -> dict[str, Any]:
    """q in fp32, pages in `dtype`: the new tokens of two sequences of 50 and 9."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "device": "cpu"}
    args, _ = op_inputs("decode_attention", [3, 1], [50, 9], **sizes, dtype=dtype)
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates", "counts", "blocks")
    given = dict(zip(names, args, strict=True))
    return given | {"q": given["q"].float(), "q_cmp": given["q"].float() / 2, "gates": given["gates"].float()}


def test_a_decode_takes_its_queries_in_the_regions_dtype_and_its_gates_in_theirs() -> None:
    given = decoding(torch.bfloat16)
    by_hand = given | {name: given[name].bfloat16() for name in ("q", "q_cmp")}
    expected = ops.decode_attention(**by_hand)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, block_indices = ops.decode_attention(**given)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected[0])
    assert torch.equal(block_indices, expected[1])
    with pytest.raises(TypeError, match=r"^k_cmp: expected dtype torch.float32 of q, got torch.bfloat16$"):
        ops.decode_attention(**given)


def test_the_pages_of_a_decode_are_not_converted() -> None:
    given = decoding(torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"^k_cmp: expected dtype torch.bfloat16 of q, got torch.float32$"),
    ):
        ops.decode_attention(**given)
