"""Mean pooling against the oracle in fp64: ragged batches, views, both precisions, poisoned memory."""

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.ops import pooling
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.testing import gradients, poisoned_empty
from torch import Tensor

SMALL = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=32)
DISJOINT = BlockGeometry(kernel_size=5, kernel_stride=5, block_size=40)
PAPER = BlockGeometry()
LENGTHS = [[0], [1], [3], [4], [5], [75], [41, 0, 3, 38, 6], [4] * 5]
DTYPES = [torch.float32, torch.float16]


def rows(total: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(total + heads + dim)
    return torch.randn(total, heads, dim, generator=generator).to(device, dtype)


def pooled(x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    with poisoned_empty():
        return BACKEND.compress_mean(x, layout, blocks)


def assert_right(x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> None:
    """Summed in fp32 and rounded once.

    A sum of l terms is off by at most l u sum|x|, the mean by as much of the mean of |x|, and one more u for the
    division, u = 2^-24; then comes the rounding to the result's dtype, half a unit in the last place or half of the
    least number there is.
    """
    actual = pooled(x, layout, blocks)
    exact = reference.compress_mean(x.double(), layout, blocks)
    sizes = reference.compress_mean(x.double().abs(), layout, blocks)
    assert (actual.shape, actual.dtype, actual.is_contiguous()) == (exact.shape, x.dtype, True)
    kind = torch.finfo(x.dtype)
    bound = (blocks.kernel_size + 1) * 2.0**-24 * sizes
    if x.dtype != torch.float32:
        bound = bound + (exact.abs() + bound) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2
    assert bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL, DISJOINT, PAPER], ids=["overlapping", "disjoint", "paper"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_batches(lengths: list[int], blocks: BlockGeometry, dtype: torch.dtype, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths(lengths, device=device)
    assert_right(rows(layout.total_k, 2, 8, device, dtype), layout, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 24, 64, 96, 200, 256])
def test_head_dims(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([9, 7], device=device)
    assert_right(rows(16, 1, dim, device, dtype), layout, SMALL)


def test_bfloat16(device: torch.device) -> None:
    """Not in the interpreter, whose bfloat16 is none; the contract says so."""
    layout = VarlenLayout.from_lengths([41, 0, 38], device=device)
    x = rows(79, 2, 64, device, torch.bfloat16)
    if device.type == "cuda":
        assert_right(x, layout, SMALL)
    else:
        with pytest.raises(ValueError, match=r"not bfloat16$"):
            BACKEND.compress_mean(x, layout, SMALL)


def test_it_is_the_keys_that_are_pooled(device: torch.device) -> None:
    for q, k in (([1, 3], [9, 12]), ([12, 2], [5, 0]), ([0, 0], [7, 4])):
        layout = VarlenLayout.from_lengths(q, k, device=device)
        assert_right(rows(layout.total_k, 2, 8, device), layout, SMALL)


def view(kind: str, total: int, device: torch.device) -> Tensor:
    if kind == "heads-of-more":
        return rows(total, 6, 24, device)[:, 1::2, 4:20]
    if kind == "heads-first":
        return rows(3, total, 16, device).transpose(0, 1)
    if kind == "every-other-row":
        return rows(2 * total, 3, 16, device)[::2]
    if kind == "columns-apart":
        return rows(total, 3, 32, device)[..., ::2]
    if kind == "one-head-repeated":
        return rows(total, 1, 16, device).expand(-1, 3, -1)
    return rows(1, 3, 16, device).expand(total, -1, -1)


@pytest.mark.parametrize(
    "kind",
    ["heads-of-more", "heads-first", "every-other-row", "columns-apart", "one-head-repeated", "one-row-repeated"],
)
def test_views(kind: str, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([19, 0, 21], device=device)
    x = view(kind, layout.total_k, device)
    assert not x.is_contiguous()
    assert_right(x, layout, SMALL)


def test_nothing_but_its_own_tokens_is_read(device: torch.device) -> None:
    """NaN in the neighbours and in tokens after the last complete block."""
    layout = VarlenLayout.from_lengths([9, 7, 9], device=device)
    x = rows(25, 2, 8, device)
    x[:9], x[15], x[16:] = torch.nan, torch.nan, torch.nan
    out = pooled(x, layout, SMALL)
    assert out.isnan().all(-1).all(-1).tolist() == [True] * 3 + [False] * 2 + [True] * 3
    expected = reference.compress_mean(x[9:16].nan_to_num(), VarlenLayout.from_lengths([7], device=device), SMALL)
    torch.testing.assert_close(out[3:5], expected, rtol=0, atol=1e-6)


def test_equal_calls_give_equal_bits(device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([41, 38], device=device)
    x = rows(79, 2, 64, device, torch.float16)
    assert torch.equal(pooled(x, layout, PAPER), pooled(x, layout, PAPER))


@pytest.mark.parametrize("kind", ["contiguous", "columns-apart", "heads-first"])
def test_the_operator_is_well_registered(kind: str, device: torch.device) -> None:
    """Its schema is true to it, and its fake gives what it gives: shape, dtype, strides."""
    layout = VarlenLayout.from_lengths([9, 7], device=device)
    compressed = layout.compressed(SMALL)
    x = rows(16, 3, 16, device) if kind == "contiguous" else view(kind, 16, device)
    sizes = compressed.total, SMALL.kernel_size, SMALL.kernel_stride
    arguments = x, layout.cu_seqlens_k, compressed.cu_seqlens, *sizes
    torch.library.opcheck(pooling.compress_mean, arguments, test_utils=("test_schema", "test_faketensor"))


def unpooled(x: Tensor, grad_out: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    with poisoned_empty():
        (dx,) = gradients(lambda x: BACKEND.compress_mean(x, layout, blocks), [x], grad_out)
    return dx


def assert_gradient_right(x: Tensor, grad_out: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> None:
    """As `assert_right`: a token's gradient sums those of the l/d blocks that hold it, over l."""

    def oracle(grad_out: Tensor) -> Tensor:
        (dx,) = gradients(lambda x: reference.compress_mean(x, layout, blocks), [x.double()], grad_out)
        return dx

    actual = unpooled(x, grad_out, layout, blocks)
    exact, sizes = oracle(grad_out.double()), oracle(grad_out.double().abs())
    assert (actual.shape, actual.dtype, actual.is_contiguous()) == (x.shape, x.dtype, True)
    kind = torch.finfo(x.dtype)
    bound = (blocks.kernel_size // blocks.kernel_stride + 1) * 2.0**-24 * sizes
    if x.dtype != torch.float32:
        bound = bound + (exact.abs() + bound) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2
    assert bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL, DISJOINT, PAPER], ids=["overlapping", "disjoint", "paper"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients(lengths: list[int], blocks: BlockGeometry, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens that no complete block holds get 0."""
    layout = VarlenLayout.from_lengths(lengths, device=device)
    grad_out = rows(layout.compressed(blocks).total, 2, 8, device, dtype)
    assert_gradient_right(rows(layout.total_k, 2, 8, device, dtype), grad_out, layout, blocks)


@pytest.mark.parametrize("dim", [1, 24, 96, 256])
def test_gradients_of_head_dims(dim: int, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([9, 7], device=device)
    assert_gradient_right(rows(16, 1, dim, device), rows(5, 1, dim, device), layout, SMALL)


@pytest.mark.parametrize(
    "kind",
    ["heads-of-more", "heads-first", "every-other-row", "columns-apart", "one-head-repeated", "one-row-repeated"],
)
def test_views_of_gradients(kind: str, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([19, 0, 21], device=device)
    grad_out = view(kind, layout.compressed(SMALL).total, device)
    assert not grad_out.is_contiguous()
    assert_gradient_right(rows(layout.total_k, 3, 16, device), grad_out, layout, SMALL)


def test_no_gradients_but_those_of_its_own_blocks_are_read(device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([9, 7, 9], device=device)
    grad_out = rows(8, 2, 8, device)
    grad_out[:3], grad_out[5:] = torch.nan, torch.nan
    dx = unpooled(rows(25, 2, 8, device), grad_out, layout, SMALL)
    assert dx.isnan().all(-1).all(-1).tolist() == [True] * 8 + [False] * 8 + [True] * 8 + [False]
    assert not dx[15].any(), "the seventh token is in no block"
    assert not dx[24].any()


def test_gradients_repeat_and_have_none_themselves(device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([41, 38], device=device)
    x, grad_out = rows(79, 2, 64, device, torch.float16), rows(2, 2, 64, device, torch.float16)
    assert torch.equal(unpooled(x, grad_out, layout, PAPER), unpooled(x, grad_out, layout, PAPER))
    out = BACKEND.compress_mean(x.requires_grad_(), layout, PAPER)
    (dx,) = torch.autograd.grad(out, x, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["contiguous", "columns-apart", "heads-first"])
def test_the_backward_is_well_registered(kind: str, device: torch.device) -> None:
    layout = VarlenLayout.from_lengths([9, 7], device=device)
    compressed = layout.compressed(SMALL)
    sizes = SMALL.kernel_size, SMALL.kernel_stride
    offsets = layout.cu_seqlens_k, compressed.cu_seqlens
    grad_out = rows(compressed.total, 3, 16, device) if kind == "contiguous" else view(kind, compressed.total, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(pooling.compress_mean_backward, (grad_out, *offsets, 16, *sizes), test_utils=checks)
    x = rows(16, 3, 16, device).requires_grad_()
    learning = (*checks, "test_autograd_registration")
    torch.library.opcheck(pooling.compress_mean, (x, *offsets, compressed.total, *sizes), test_utils=learning)
