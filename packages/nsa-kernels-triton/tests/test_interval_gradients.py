"""Gradients of compressed and window attention against the oracle's, and what such kernels get wrong.

The bound on each value is derived in `nsa_varlen.testing.gradient_bounds`: it is 0 for a query that sees nothing and
for a key that nobody sees.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import attention_gradients
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import assert_within_budget, gradient_bounds, gradients, plain_attention, poisoned_empty
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted(), reason="test_gpu.py runs the kernels themselves"),
]
BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=21)
BRANCHES = ("compressed_attention", "window_attention")
LAYOUTS = {
    "nothing": ([0], [0]),
    "no batch": ([], []),
    "one": ([1], [1]),
    "prefix": ([5], [70]),
    "more queries than keys": ([40], [30]),
    "no keys": ([3, 4], [0, 9]),
    "ragged": ([19, 0, 7, 26, 1], [40, 3, 2, 26, 60]),
}
MIXED = ([13, 0, 7, 20], [30, 3, 2, 50])
NAMES = ("dq", "dk", "dv")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Fewer rows and keys than a sequence has; products of fp32 in larger tiles would take the interpreter longer."""
    with tiles(16, 16):
        yield


def tiles(rows: int, keys: int, programs: int = 1, tma: int = 0) -> ExitStack:
    """`tma`: dq takes its keys and values through descriptors."""
    stack = ExitStack()
    for branch in BRANCHES:
        stack.enter_context(overridden(branch, rows=64, keys=64, tma=0))
        stack.enter_context(overridden(f"{branch}_dq", rows=rows, keys=keys, tma=tma))
        stack.enter_context(overridden(f"{branch}_dkdv", rows=rows, keys=keys, programs=programs))
    return stack


def make_layout(lengths: tuple[list[int], list[int]]) -> VarlenLayout:
    return VarlenLayout.from_lengths(*lengths)


def make_inputs(
    branch: str,
    layout: VarlenLayout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Unit normal q, k, v of one branch, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    keys = layout.compressed(BLOCKS).total if branch == "compressed_attention" else layout.total_k
    sizes = (
        (layout.total_q, heads, dims[0]),
        (keys, kv_heads, dims[0]),
        (keys, kv_heads, dims[1]),
        (layout.total_q, heads, dims[1]),
    )
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def make_mask(branch: str, layout: VarlenLayout) -> Tensor:
    mask = masks.compressed_mask if branch == "compressed_attention" else masks.window_mask
    return mask(layout, BLOCKS)[:, None]


def backward(branch: str, inputs: list[Tensor], layout: VarlenLayout, **options: float) -> tuple[Tensor, ...]:
    with poisoned_empty():
        found = gradients(lambda *x: getattr(BACKEND, branch)(*x, layout, BLOCKS, **options), inputs[:3], inputs[3])
    for x, got in zip(inputs, found, strict=False):
        assert (got.dtype, got.shape, got.is_contiguous()) == (x.dtype, x.shape, True)
    return found


def exact_gradients(branch: str, inputs: list[Tensor], layout: VarlenLayout, **options: float) -> tuple[Tensor, ...]:
    q, k, v, grad_out = (x.double() for x in inputs)
    return gradients(lambda *x: getattr(reference, branch)(*x, layout, BLOCKS, **options), (q, k, v), grad_out)


def assert_right(branch: str, inputs: list[Tensor], layout: VarlenLayout, **options: float) -> tuple[Tensor, ...]:
    """As the oracle in fp64: fp32 to the derived bound, half precision to the error budget."""
    found, exact = backward(branch, inputs, layout, **options), exact_gradients(branch, inputs, layout, **options)
    mask = make_mask(branch, layout)
    if inputs[0].dtype == torch.float32:
        bounds = gradient_bounds(*inputs, mask, **options)
        for name, got, right, bound in zip(NAMES, found, exact, bounds, strict=True):
            assert bool(((got.double() - right).abs() <= bound).all()), name
    else:
        plain = gradients(lambda *x: plain_attention(*x, mask, **options), inputs[:3], inputs[3])
        for name, got, right, other in zip(NAMES, found, exact, plain, strict=True):
            assert_within_budget(got, other, right, name)
    return found


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(branch: str, lengths: tuple[list[int], list[int]], tma: int) -> None:
    layout = make_layout(lengths)
    with tiles(16, 16, tma=tma):
        dq, dk, dv = assert_right(branch, make_inputs(branch, layout), layout)
    mask = make_mask(branch, layout)[:, 0]
    assert not dq[~mask.any(1)].any()
    assert not dk[~mask.any(0)].any()
    assert not dv[~mask.any(0)].any()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dims"),
    [
        (torch.float32, 2, 2, (8, 8)),
        (torch.float32, 4, 2, (96, 16)),
        (torch.float32, 3, 1, (16, 72)),
        (torch.float32, 4, 1, (24, 40)),
        (torch.float32, 16, 1, (16, 1)),
        (torch.float16, 3, 1, (16, 72)),
        (torch.float16, 4, 2, (32, 32)),
    ],
    ids=str,
)
def test_heads(branch: str, dtype: torch.dtype, heads: int, kv_heads: int, dims: tuple[int, int]) -> None:
    layout = make_layout(MIXED)
    assert_right(branch, make_inputs(branch, layout, heads=heads, kv_heads=kv_heads, dims=dims, dtype=dtype), layout)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_group_of_64(branch: str) -> None:
    layout = make_layout(([4, 2], [30, 2]))
    with tiles(16, 16):
        assert_right(branch, make_inputs(branch, layout, heads=64, kv_heads=1, dims=(8, 16)), layout)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("rows", "keys"), [(16, 64), (64, 16), (32, 32)])
def test_sizes_of_tiles(branch: str, rows: int, keys: int) -> None:
    """Also rows that are no multiple of the group: what is left must not pass for the next tile's first query."""
    layout = make_layout(MIXED)
    with tiles(rows, keys):
        assert_right(branch, make_inputs(branch, layout, heads=6), layout)


@pytest.mark.parametrize("lengths", [MIXED, ([40], [200])], ids=str)
def test_splits(lengths: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs share the rows that see a tile of keys: more of them than most tiles have rows to share."""
    branch = "compressed_attention"
    layout = make_layout(lengths)
    inputs = make_inputs(branch, layout)
    wanted: list[int] = []
    splits = attention_gradients._splits
    monkeypatch.setattr(attention_gradients, "_splits", lambda *args: wanted.append(splits(*args)) or wanted[-1])
    with tiles(16, 16, programs=24):
        found = assert_right(branch, inputs, layout)
        monkeypatch.setattr(attention_gradients, "SPLITS", 1)
        alone = assert_right(branch, inputs, layout)
    assert wanted[0] >= 5
    assert wanted[1] == 1
    assert torch.equal(found[0], alone[0])


@pytest.mark.parametrize("branch", BRANCHES)
def test_strides(branch: str) -> None:
    layout = make_layout(MIXED)
    q, k, v, grad_out = make_inputs(branch, layout, dims=(24, 24))
    q_view = torch.cat((q, q + 1), -1)[..., :24]
    k_view = k.transpose(0, 1).contiguous().transpose(0, 1)
    v_spread = torch.stack((v, v + 1), -1)[..., 0]
    one = grad_out[:1, :1, :1].expand_as(grad_out)
    by_head = grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    for values, grads in ((v_spread, by_head), (v[:, :1].expand(-1, 2, -1), one)):
        expected = backward(branch, [q, k, values.contiguous(), grads.contiguous()], layout)
        assert all(map(torch.equal, backward(branch, [q_view, k_view, values, grads], layout), expected))
        assert all(bool(x.any()) for x in expected)


@pytest.mark.parametrize("branch", BRANCHES)
def test_scale(branch: str) -> None:
    layout = make_layout(MIXED)
    assert_right(branch, make_inputs(branch, layout), layout, scale=1.5)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    ("rows", "keys", "tma"),
    [
        pytest.param(16, 16, 0, marks=pytest.mark.slow),
        (64, 64, 0),
        (16, 16, 1),
        pytest.param(16, 64, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")  # numpy's, of the rows that do hold NaN
def test_other_sequences_may_be_nan(branch: str, rows: int, keys: int, tma: int) -> None:
    """NaN there would show: 0 * NaN is NaN."""
    layout = make_layout(([9, 0, 20, 9], [40, 40, 70, 40]))
    inputs = make_inputs(branch, layout)
    third = slice(9, 29)
    own_keys = slice(80, 150)
    if branch == "compressed_attention":
        own_keys = slice(18, 34)  # 9 blocks of 40 tokens, 16 of 70
    with tiles(rows, keys, tma=tma):
        expected = backward(branch, inputs, layout)
        for x, own in zip(inputs, (third, own_keys, own_keys, third), strict=True):
            kept = x[own].clone()
            x.fill_(torch.nan)
            x[own] = kept
        found = backward(branch, inputs, layout)
    for name, got, right, own in zip(NAMES, found, expected, (third, own_keys, own_keys), strict=True):
        assert torch.equal(got[own], right[own]), name
        assert bool(got[own].any()), name


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("branch", BRANCHES)
def test_unseen_keys_may_be_nan(branch: str, tma: int) -> None:
    """Keys that a prefix has left behind the window, or that lie in sequences without queries."""
    layout = make_layout(([0, 20, 0, 9, 0], [40, 70, 40, 9, 40]))
    inputs = make_inputs(branch, layout)
    unseen = ~make_mask(branch, layout)[:, 0].any(0)
    assert int(unseen.sum()) > 20
    with tiles(16, 16, tma=tma):
        expected = backward(branch, inputs, layout)
        inputs[1][unseen] = torch.nan
        inputs[2][unseen] = torch.nan
        dq, dk, dv = backward(branch, inputs, layout)
    assert torch.equal(dq, expected[0])
    assert torch.equal(dk[~unseen], expected[1][~unseen])
    assert torch.equal(dv[~unseen], expected[2][~unseen])


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_logits_that_overflow_are_no_nan(branch: str) -> None:
    """-1e20 * 1e20 is -inf in fp32: keys of such logits weigh nothing and get nothing."""
    layout = make_layout(([20], [40]))
    q, k, v, grad_out = make_inputs(branch, layout, heads=1, kv_heads=1)
    q[:], k[:] = 1e20, 0.0
    k[::2] = -1e20
    found = backward(branch, [q, k, v, grad_out], layout)
    assert all(bool(x.isfinite().all()) for x in found)
    dq, dk, dv = found
    assert not dq.any(), "every key with a weight is 0"
    assert not dk[::2].any()
    mask = make_mask(branch, layout)
    mask[..., ::2] = False
    exact = gradients(lambda x: plain_attention(0 * q.double(), k.double(), x, mask), [v.double()], grad_out.double())
    *_, bound = gradient_bounds(0 * q, k, v, grad_out, mask)
    assert bool(((dv - exact[0]).abs() <= bound).all())


@pytest.mark.parametrize("branch", BRANCHES)
def test_only_what_is_asked_for(branch: str) -> None:
    layout = make_layout(MIXED)
    *inputs, grad_out = make_inputs(branch, layout)
    expected = backward(branch, [*inputs, grad_out], layout)
    for place, right in enumerate(expected):
        given = [x.clone().requires_grad_(i == place) for i, x in enumerate(inputs)]
        out, lse = getattr(BACKEND, branch)(*given, layout, BLOCKS)
        assert out.requires_grad
        assert not lse.requires_grad
        out.backward(grad_out)
        assert torch.equal(given[place].grad, right)
        assert [x.grad is None for x in given] == [i != place for i in range(3)]


@pytest.mark.parametrize("branch", BRANCHES)
def test_runs_are_equal(branch: str) -> None:
    layout = make_layout(MIXED)
    *inputs, grad_out = make_inputs(branch, layout)
    leaves = [x.requires_grad_() for x in inputs]
    with tiles(16, 16, programs=20):
        out, _ = getattr(BACKEND, branch)(*leaves, layout, BLOCKS)
        first, second = (torch.autograd.grad(out, leaves, grad_out, retain_graph=True) for _ in range(2))
        other = backward(branch, [*inputs, grad_out], layout)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_of_gradients_are_refused(branch: str) -> None:
    layout = make_layout(([5], [9]))
    q, k, v, grad_out = make_inputs(branch, layout)
    out, _ = getattr(BACKEND, branch)(q.requires_grad_(), k, v, layout, BLOCKS)
    (dq,) = torch.autograd.grad(out, q, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@pytest.mark.parametrize("branch", BRANCHES)
def test_operators(branch: str) -> None:
    """torch.library's own checks: schema, registration, and that fakes have the real ones' shapes and strides."""
    layout = make_layout(([5, 4], [9, 20]))
    q, k, v, grad_out = make_inputs(branch, layout, dims=(8, 24))
    out, lse = getattr(BACKEND, branch)(q, k, v, layout, BLOCKS, scale=0.5)
    offsets = [layout.cu_seqlens_q, layout.cu_seqlens_k]
    if branch == "compressed_attention":
        offsets.append(layout.compressed(BLOCKS).cu_seqlens)
        sizes, all_sizes = [BLOCKS.kernel_size, BLOCKS.kernel_stride], [BLOCKS.kernel_size, BLOCKS.kernel_stride, 1]
        all_offsets = offsets
    else:
        sizes, all_sizes = [BLOCKS.window_size], [1, 1, BLOCKS.window_size]
        all_offsets = [*offsets, None]
    operators = torch.ops.nsa_kernels_triton
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(operators, branch).default, (*leaves, *offsets, *sizes, 0.5), test_utils=checks)
    torch.library.opcheck(
        operators.interval_attention_backward.default,
        (grad_out, q, k, v, out, lse, *all_offsets, *all_sizes, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )


def check_window(window: int, lengths: tuple[list[int], list[int]]) -> None:
    layout = make_layout(lengths)
    blocks = BlockGeometry(window_size=window)
    inputs = make_inputs("window_attention", layout)
    found = gradients(lambda *x: BACKEND.window_attention(*x, layout, blocks), inputs[:3], inputs[3])
    doubles = [x.double() for x in inputs]
    exact = gradients(lambda *x: reference.window_attention(*x, layout, blocks), doubles[:3], doubles[3])
    bounds = gradient_bounds(*inputs, masks.window_mask(layout, blocks)[:, None])
    for name, got, right, bound in zip(NAMES, found, exact, bounds, strict=True):
        assert bool(((got.double() - right).abs() <= bound).all()), name


@pytest.mark.parametrize("window", [1, 22, 23, 24])
def test_where_a_window_ends(window: int) -> None:
    """8 queries see 16 keys wholly where the last is no nearer than 15 and the first no farther than 22."""
    check_window(window, ([40], [40]))


@pytest.mark.parametrize("lengths", [([20], [10]), ([10], [30])], ids=str)
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_windows_of_any_size(window: int, lengths: tuple[list[int], list[int]]) -> None:
    """A position before the first key, less the window, must not come out beyond the last."""
    check_window(window, lengths)
