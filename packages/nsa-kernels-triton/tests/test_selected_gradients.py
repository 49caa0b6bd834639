"""Gradients of selected attention, dq by block and by query, over lists of blocks as anybody may write them.

The bound on each value is derived in `nsa_varlen.testing.gradient_bounds`: it is 0 for a query that sees nothing and
for a key that nobody chose.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import selected_gradients, spread
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import (
    assert_within_budget,
    gradient_bounds,
    gradients,
    plain_attention,
    poisoned_empty,
    random_inputs,
)
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted(), reason="test_gpu.py runs the kernels themselves"),
]

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5)
RAGGED = [19, 0, 3, 6], [19, 5, 130, 2]  # whole, empty, prefixed, more queries than keys
LONGER = [35, 0, 3], [20, 5, 70]  # queries of two cells, of which the first ones see nothing
NUMBERS = {"rows": 16, "keys": 16, "chunk_rows": 1 << 20, "programs": 2, "turns": 2}
ORGANISATIONS = {"by-block": {"parts": 1}, "by-query": {"parts": 0}}
NAMES = ("dq", "dk", "dv")


@contextmanager
def configured(*, tma: int = 0, **numbers: int) -> Iterator[None]:
    """Small tiles, so that there are several, and these numbers; `tma` is that of dq by query."""
    dq = {"rows": 16, "keys": 16, "tma": tma}
    with ExitStack() as stack:
        for name, own in (
            ("selected_attention", {"by_block": 0, "rows": 64, "keys": 64, "tma": 0}),
            ("selected_attention_backward", NUMBERS | numbers),
            ("selected_attention_dq", dq),
        ):
            stack.enter_context(configurations.overridden(name, **own))
        yield


@pytest.fixture(params=ORGANISATIONS)
def organisation(request: pytest.FixtureRequest) -> Iterator[dict[str, int]]:
    with configured(**ORGANISATIONS[request.param]):
        yield ORGANISATIONS[request.param]


def listed(layout: VarlenLayout, heads: int, entries: int, blocks: BlockGeometry = BLOCKS) -> Tensor:
    """Entries in any order: blocks of the sequence and beyond it, negative ones, some twice."""
    generator = torch.Generator().manual_seed(0)
    most = blocks.num_blocks(layout.max_seqlen_k) + 1
    return torch.randint(-2, most, (layout.total_q, heads, entries), generator=generator, dtype=torch.int32)


def make_inputs(
    layout: VarlenLayout,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Unit normal q, k, v and the gradient of the output."""
    inputs = random_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    grad_out = torch.randn(layout.total_q, heads, dims[1], generator=torch.Generator().manual_seed(1))
    return [*inputs[:3], grad_out.to(dtype)]


def backward(
    inputs: list[Tensor], indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry = BLOCKS, scale: float = 0.25
) -> tuple[Tensor, ...]:
    """By the operator, after the oracle's forward: the interpreter's would take as long again."""
    q, k, v, grad_out = inputs
    known = (x.nan_to_num(0.0).to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    out, lse = reference.selected_attention(*known, indices, layout, blocks, scale=scale)
    offsets = layout.cu_seqlens_q, layout.cu_seqlens_k
    with poisoned_empty():
        found = selected_gradients.selected_attention_backward(
            grad_out, q, k, v, out.to(q.dtype), lse.float(), indices, *offsets, blocks.block_size, scale, True
        )
    for x, got in zip(inputs, found, strict=False):
        assert (got.dtype, got.shape, got.is_contiguous()) == (x.dtype, x.shape, True)
    return found


def assert_right(
    inputs: list[Tensor], indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry = BLOCKS, scale: float = 0.25
) -> tuple[Tensor, ...]:
    """As the oracle in fp64: fp32 to the derived bound, half precision to the error budget."""

    def oracle(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.selected_attention(*x, indices, layout, blocks, scale=scale)

    found = backward(inputs, indices, layout, blocks, scale)
    q, k, v, grad_out = (x.double() for x in inputs)
    exact = gradients(oracle, (q, k, v), grad_out)
    mask = masks.selected_mask(indices, layout, blocks)
    if inputs[0].dtype == torch.float32:
        for name, got, right, bound in zip(
            NAMES, found, exact, gradient_bounds(*inputs, mask, scale=scale), strict=True
        ):
            assert bool(((got.double() - right).abs() <= bound).all()), name
    else:
        plain = gradients(lambda *x: plain_attention(*x, mask, scale), inputs[:3], inputs[3])
        for name, got, right, other in zip(NAMES, found, exact, plain, strict=True):
            assert_within_budget(got, other, right, name)
    return found


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize(
    "heads, kv_heads", [(4, 2), (2, 2), (3, 1), pytest.param(4, 1, marks=pytest.mark.slow), (16, 1)]
)
def test_any_list_over_a_ragged_batch(heads: int, kv_heads: int) -> None:
    layout = VarlenLayout.from_lengths(*RAGGED)
    assert_right(make_inputs(layout, heads, kv_heads, (24, 40)), listed(layout, kv_heads, 6), layout)


@pytest.mark.parametrize("heads", [(4, 2), (16, 1)], ids=str)
def test_descriptors(heads: tuple[int, int]) -> None:
    """Where the copy engine could load k and v: heads side by side, whose width is a power of two."""
    layout = VarlenLayout.from_lengths([17, 9], [40, 30])
    with configured(parts=0, tma=1):
        assert_right(make_inputs(layout, *heads, (16, 32)), listed(layout, heads[1], 4), layout)


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("dims", [(8, 8), (96, 16), (16, 72)])
def test_head_dims(dims: tuple[int, int]) -> None:
    layout = VarlenLayout.from_lengths([33, 2], [70, 2])
    assert_right(make_inputs(layout, 2, 1, dims), listed(layout, 1, 3), layout)


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("block_size, keys", [(32, 64), (64, 32), (128, 64)])
@pytest.mark.parametrize("entries", [1, 7])
def test_block_sizes_and_counts(parts: int, block_size: int, keys: int, entries: int) -> None:
    blocks = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=block_size)
    layout = VarlenLayout.from_lengths([9, 8], [300, 170])
    with configured(parts=parts, keys=keys):
        assert_right(make_inputs(layout, 2, 1), listed(layout, 1, entries, blocks), layout, blocks)


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("lengths", [([0], [0]), ([1], [1]), ([4], [0]), ([1, 1], [90, 64]), ([], [])], ids=str)
def test_small_batches(lengths: tuple[list[int], list[int]]) -> None:
    layout = VarlenLayout.from_lengths(*lengths)
    assert_right(make_inputs(layout, 2, 1), listed(layout, 1, 2), layout)


@pytest.mark.usefixtures("organisation")
def test_a_group_of_64_fits_any_tile() -> None:
    layout = VarlenLayout.from_lengths([5], [70])
    assert_right(make_inputs(layout, 64, 1), listed(layout, 1, 3), layout)


@pytest.mark.usefixtures("organisation")
def test_no_entries_give_zeros() -> None:
    layout = VarlenLayout.from_lengths([3], [40])
    for indices in (torch.empty(3, 2, 0, dtype=torch.int32), torch.full((3, 2, 4), -1, dtype=torch.int32)):
        found = backward(make_inputs(layout), indices, layout)
        assert not any(bool(x.any()) for x in found)


@pytest.mark.usefixtures("organisation")
def test_half_precision_within_its_budget() -> None:
    layout = VarlenLayout.from_lengths([40, 10], [40, 70])
    inputs = make_inputs(layout, dims=(32, 32), dtype=torch.float16)
    assert_right(inputs, listed(layout, 2, 4), layout)


@pytest.mark.usefixtures("organisation")
def test_a_scale_of_its_own() -> None:
    layout = VarlenLayout.from_lengths([20], [50])
    assert_right(make_inputs(layout), listed(layout, 2, 4), layout, scale=1.5)


@pytest.mark.usefixtures("organisation")
def test_strided_inputs() -> None:
    layout = VarlenLayout.from_lengths([11], [50])
    *inputs, grad_out = make_inputs(layout)
    indices = listed(layout, 2, 3)
    spread_out = indices.transpose(0, 1).contiguous().transpose(0, 1)
    one = grad_out[:1, :1, :1].expand_as(grad_out)
    usual = backward([*inputs, grad_out], indices, layout)
    for grads, i, j in ((grad_out, 0, 1), (grad_out, 1, 2), (one, 0, 1)):
        expected = usual if grads is grad_out else backward([*inputs, grads.contiguous()], indices, layout)
        views = [x.transpose(i, j).contiguous().transpose(i, j) for x in (*inputs, grads)]
        views[3] = grads if grads is one else views[3]
        assert all(map(torch.equal, backward(views, spread_out, layout), expected))
        assert all(bool(x.any()) for x in expected)


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")  # numpy's, of the rows that do hold NaN
@pytest.mark.parametrize("keys", [40, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts, tma", [(0, 0), (0, 1), (1, 0)])
def test_other_sequences_may_be_nan(parts: int, tma: int, keys: int) -> None:
    """NaN there would show: 0 * NaN is NaN. The last block is not full, and of 9 keys not even a tile."""
    layout = VarlenLayout.from_lengths([2, 10, 3], [keys] * 3)
    inputs = make_inputs(layout)
    indices = listed(layout, 2, 3)
    own = [slice(2, 12), *[slice(keys, 2 * keys)] * 2, slice(2, 12)]
    with configured(parts=parts, tma=tma):
        expected = backward(inputs, indices, layout)
        for x, rows in zip(inputs, own, strict=True):
            kept = x[rows].clone()
            x.fill_(torch.nan)
            x[rows] = kept
        found = backward(inputs, indices, layout)
    for name, got, right, rows in zip(NAMES, found, expected, own, strict=False):
        assert torch.equal(got[rows], right[rows]), name
        assert bool(got[rows].any()), name


@pytest.mark.usefixtures("organisation")
def test_keys_that_nobody_chose_get_zeros() -> None:
    """Whole blocks of them, and those of a chosen block behind every query that chose it."""
    layout = VarlenLayout.from_lengths([20, 3], [150, 40])
    indices = torch.tensor([[3, 1, -1], [1, 4, 9]], dtype=torch.int32).expand(23, 2, 3).clone()
    indices[:, 1, 1] = -1
    indices[10:15, :, 1] = 4  # positions 140 to 144 of 150
    _, dk, dv = backward(make_inputs(layout), indices, layout)
    unseen = ~masks.selected_mask(indices, layout, BLOCKS).any(0).T
    assert unseen.sum(0).tolist() == [64 + 5 + 32, 96 + 5 + 32]  # the second sequence's block 0 among them
    for x in (dk, dv):
        assert not x[unseen].any()
        assert bool((x[~unseen] != 0).all(-1).all())


@pytest.mark.parametrize("parts, kv_heads", [pytest.param(0, 1, marks=pytest.mark.slow), (1, 3)])
def test_chunks(parts: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell and one head at a time, whatever asks for it; some numbers that cells may have are of none."""
    layout = VarlenLayout.from_lengths(*LONGER)
    inputs = make_inputs(layout, 2 * kv_heads, kv_heads)
    indices = listed(layout, kv_heads, 3)
    turns: list[tuple[int, int]] = []
    run = selected_gradients._BlockGradients._chunk

    def noted(self: object, own: slice, first: int, end: int, *sums: Tensor) -> None:
        turns.append((own.stop - own.start, end - first))
        run(self, own, first, end, *sums)

    monkeypatch.setattr(selected_gradients._BlockGradients, "_chunk", noted)
    cells = layout.total_q // selected_gradients.CELL + len(LONGER[0])
    with configured(parts=parts):
        whole = assert_right(inputs, indices, layout)
        assert turns == [(kv_heads, cells)]
        turns.clear()
        with monkeypatch.context() as patch:
            patch.setattr(selected_gradients, "PARTS" if parts else "MARKS", 1)
            found = assert_right(inputs, indices, layout)
        assert turns == [(1, 1)] * (kv_heads * cells)
        assert torch.equal(found[0], whole[0])
    with configured(parts=parts, chunk_rows=1):
        turns.clear()
        assert_right(inputs, indices, layout)
        assert turns == [(kv_heads, 1)] * cells
    # Those of two heads, and room for what is shared in a cell, little where an item is as long as here.
    monkeypatch.setattr(selected_gradients, "SUMS", 3 * 4 * layout.total_k * 32 - 1)
    with configured(parts=parts, chunk_rows=1, turns=64):
        turns.clear()
        assert_right(inputs, indices, layout)
        assert [heads for heads, _ in turns] == ([1] * cells if kv_heads == 1 else [2] * cells + [1] * cells)


def test_ranks_go_on_from_segment_to_segment() -> None:
    """Of one cell each, and of four blocks at a time: queries of every segment chose the same ones."""
    layout = VarlenLayout.from_lengths([100], [130])
    indices = torch.tensor([1, 0], dtype=torch.int32).expand(100, 1, 2).contiguous()
    with configured(parts=1), configurations.overridden("ranking", depth=1, width=4):
        assert_right(make_inputs(layout, 2, 1), indices, layout)


@pytest.mark.parametrize("chunk_rows", [1, 1 << 20], ids=["chunks", "whole"])
@pytest.mark.parametrize("turns", [1, 50])
def test_blocks_that_many_chose(turns: int, chunk_rows: int) -> None:
    """Their tiles are shared among programs, which leave sums of their own, or one takes all."""
    layout = VarlenLayout.from_lengths([70], [90])
    indices = torch.tensor([2, 0], dtype=torch.int32).expand(70, 1, 2).clone()
    indices[::3, :, 0] = 1
    with configured(parts=1, turns=turns, chunk_rows=chunk_rows):
        assert_right(make_inputs(layout, 2, 1, (24, 40)), indices, layout)


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("entry", [2**25, 2**26, 2**26 + 1, 2**31 - 1, -(2**31)])
def test_entries_of_any_size_are_ignored(entry: int) -> None:
    """64 * 2^26 is 0 in 32 bits: such an entry must not become block 0."""
    layout = VarlenLayout.from_lengths([3], [200])
    indices = torch.tensor([1, entry, -1], dtype=torch.int32).expand(3, 1, 3).contiguous()
    assert_right(make_inputs(layout, 2, 1), indices, layout, BlockGeometry())


@pytest.mark.usefixtures("organisation")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_logits_that_overflow_are_no_nan() -> None:
    """-1e20 * 1e20 is -inf in fp32: a block of such logits weighs nothing and gets nothing."""
    layout = VarlenLayout.from_lengths([2], [200])
    q, k, v, grad_out = make_inputs(layout, 1, 1)
    q[:], k[:] = 1e20, 0.0
    k[32:64] = -1e20
    indices = torch.tensor([1, 6], dtype=torch.int32).expand(2, 1, 2).contiguous()
    found = backward([q, k, v, grad_out], indices, layout)
    assert all(bool(x.isfinite().all()) for x in found)
    dq, dk, dv = found
    assert not dq.any(), "every key with a weight is 0"
    assert not dk[32:64].any()
    assert not dv[32:64].any()
    indices[:, :, 0] = -1
    mask = masks.selected_mask(indices, layout, BLOCKS)
    exact = gradients(lambda x: plain_attention(0 * q.double(), k.double(), x, mask), [v.double()], grad_out.double())
    *_, bound = gradient_bounds(0 * q, k, v, grad_out, mask)
    assert bool(((dv - exact[0]).abs() <= bound).all())


@pytest.mark.usefixtures("organisation")
def test_only_what_is_asked_for() -> None:
    layout = VarlenLayout.from_lengths([11], [50])
    *inputs, grad_out = make_inputs(layout)
    indices = listed(layout, 2, 3)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return BACKEND.selected_attention(*x, indices, layout, BLOCKS, scale=0.25)

    expected = gradients(run, inputs, grad_out)
    for got, right in zip(expected, backward([*inputs, grad_out], indices, layout), strict=True):
        torch.testing.assert_close(got, right)  # forward and backward by the kernels
    for place, right in enumerate(expected):
        given = [x.clone().requires_grad_(i == place) for i, x in enumerate(inputs)]
        out, lse = run(*given)
        assert out.requires_grad
        assert not lse.requires_grad
        out.backward(grad_out)
        assert torch.equal(given[place].grad, right)
        assert [x.grad is None for x in given] == [i != place for i in range(3)]


def test_the_choice_of_blocks_has_no_gradient() -> None:
    layout = VarlenLayout.from_lengths([20], [50])
    q, k, *_ = (x.requires_grad_() for x in make_inputs(layout))
    k_cmp = BACKEND.compress_mean(k, layout, BLOCKS)
    assert k_cmp.requires_grad
    _, lse = BACKEND.compressed_attention(q, k_cmp, k_cmp, layout, BLOCKS)
    chosen = BACKEND.select_blocks(q, k_cmp, lse, layout, BLOCKS)
    assert not chosen.requires_grad
    assert chosen.grad_fn is None


@pytest.mark.parametrize(("parts", "chunk_rows"), [(0, 1), (1, 1), (1, 1 << 20)], ids=str)
def test_runs_are_equal(parts: int, chunk_rows: int) -> None:
    layout = VarlenLayout.from_lengths(*RAGGED)
    *inputs, grad_out = make_inputs(layout, 2, 1)
    indices = listed(layout, 1, 5)
    leaves = [x.requires_grad_() for x in inputs]
    with configured(parts=parts, turns=1, chunk_rows=chunk_rows):
        out, _ = BACKEND.selected_attention(*leaves, indices, layout, BLOCKS, deterministic=True)
        first, second = (torch.autograd.grad(out, leaves, grad_out, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(bool(x.any()) for x in first)


def test_gradients_of_gradients_are_refused() -> None:
    layout = VarlenLayout.from_lengths([5], [40])
    q, k, v, grad_out = make_inputs(layout)
    out, _ = BACKEND.selected_attention(q.requires_grad_(), k, v, listed(layout, 2, 2), layout, BLOCKS)
    (dq,) = torch.autograd.grad(out, q, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@pytest.mark.usefixtures("organisation")
def test_operators() -> None:
    """torch.library's own checks: schema, registration, and that fakes have the real ones' shapes and strides."""
    layout = VarlenLayout.from_lengths([5, 4], [9, 70])
    q, k, v, grad_out = make_inputs(layout, dims=(8, 24))
    indices = listed(layout, 2, 3)
    out, lse = BACKEND.selected_attention(q, k, v, indices, layout, BLOCKS, scale=0.25)
    rest = indices, layout.cu_seqlens_q, layout.cu_seqlens_k, BLOCKS.block_size, 0.25, True
    operators = torch.ops.nsa_kernels_triton
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.selected_attention.default, (*leaves, *rest), test_utils=checks)
    torch.library.opcheck(
        operators.selected_attention_backward.default,
        (grad_out, q, k, v, out, lse, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_rule_by_spread_is_obeyed_unless_results_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"num_warps": 4, "num_stages": 1} | NUMBERS
    rules = [{"up_to": {"spread": 200}, "parts": 0} | common, {"parts": 1} | common]
    table = configurations.table("sm90") | {"selected_attention_backward": rules}
    monkeypatch.setattr(configurations, "table", lambda name: table)
    taken: list[int] = []
    monkeypatch.setattr(selected_gradients, "dq_by_query", lambda *args: None)
    monkeypatch.setattr(
        *(selected_gradients, "_BlockGradients"),
        lambda call, config, *args: SimpleNamespace(run=lambda: taken.append(config["parts"])),
    )
    layout = VarlenLayout.from_lengths([16], [32 * 64])
    *inputs, grad_out = make_inputs(layout)
    indices = torch.arange(4, dtype=torch.int32).expand(16, 2, 4).contiguous()
    leaves = [x.requires_grad_() for x in inputs]
    monkeypatch.setattr(spread, "_known", {})
    for deterministic in (False, True):
        out, _ = BACKEND.selected_attention(*leaves, indices, layout, BLOCKS, deterministic=deterministic)
        out.backward(grad_out)
    assert taken == [0, 1]


def test_the_workspace_is_no_larger_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts may exceed their bytes by a tile that is not full for every block that was chosen."""
    layout = VarlenLayout.from_lengths([100])
    *inputs, grad_out = make_inputs(layout)
    indices = listed(layout, 2, 4)
    cell = 32 * 2 * 4 * 2 * 16 * 4  # bytes of a cell's parts: rows, entries, halves of a block, columns
    shared = 2 * 32 * 4 * 32 * 32 * 4 // 16  # bytes of sums that items of 16 queries may leave in a cell
    monkeypatch.setattr(selected_gradients, "PARTS", 2 * cell)
    monkeypatch.setattr(selected_gradients, "SUMS", 2 * shared + 100 * 32 * 4)
    monkeypatch.setattr(selected_gradients, "MARKS", 2 * 8 * 4)
    made: list[selected_gradients._BlockGradients] = []
    prepare = selected_gradients._BlockGradients.__init__

    def noted(self: selected_gradients._BlockGradients, *args: object) -> None:
        prepare(self, *args)
        made.append(self)

    monkeypatch.setattr(selected_gradients._BlockGradients, "__init__", noted)
    with configured(parts=1):
        assert_right([*inputs, grad_out], indices, layout)
    (call,) = made
    assert (call.chunk, call.heads) == (2, 1)
    assert call.choosers._marks.nbytes == selected_gradients.MARKS
    assert sum(x.nbytes for x in call.slots) <= 2 * shared
    assert 2 * cell <= call.parts.nbytes <= 2 * cell + 4 * 2 * 16 * 16 * 4
