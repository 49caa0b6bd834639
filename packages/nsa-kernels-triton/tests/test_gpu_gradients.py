"""Gradients by the compiled kernels on a GPU: exact enough at real lengths, the same in every run, within their memory.

Long sequences are compared with plain attention, in fp64 and in the kernels' dtype, some queries at a time over the
keys up to them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.ops import attention_gradients, selected_gradients
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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE, HALF = "cuda", torch.bfloat16
BLOCKS = BlockGeometry()
# Whole prefill, prefixes, decode steps, empty ones, more queries than keys.
RAGGED = [300, 77, 0, 1, 40, 9], [300, 650, 40, 500, 13, 0]
SHAPES = {"g16": (16, 1), "g4": (8, 2), "g1": (4, 4)}
NAMES = ("dq", "dk", "dv")


class Case(NamedTuple):
    """One branch over one sequence: its inputs, what else it takes, and which keys its queries see.

    Fields:
        op: the operation.
        q, k, v, grad_out: its inputs, and the gradient of its output.
        rest: its arguments before layout and blocks.
        seen: (first, end) of the queries -> (mask [end - first, Hk or 1, keys], which keys those are).
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    rest: tuple[Tensor, ...]
    seen: Callable[[int, int], tuple[Tensor, slice]]

    def gradients(self) -> tuple[Tensor, ...]:
        """By the kernels, repeatable ones."""
        return gradients(self.run, (self.q, self.k, self.v), self.grad_out)

    def run(self, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        """The forward by the kernels: (out, lse)."""
        found: tuple[Tensor, Tensor] = getattr(BACKEND, self.op)(
            *qkv, *self.rest, whole(len(self.q)), BLOCKS, deterministic=True
        )
        return found

    def plain(self, dtype: torch.dtype, first: int = 0, rows: int = 256) -> tuple[Tensor, ...]:
        """By plain torch in `dtype`, of queries from `first` on alone, `rows` of them at a time; sums of these in fp64.

        Keys and values that no earlier query sees have all of their gradient. The last queries see the most keys: they
        come first, and torch has memory for the others, which would otherwise fit into none that was freed.
        """
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (self.q, self.k, self.v))
        for begin in reversed(range(first, len(self.q), rows)):
            end = min(begin + rows, len(self.q))
            mask, keys = self.seen(begin, end)
            given = [x.to(dtype) for x in (self.q[begin:end], self.k[keys], self.v[keys])]
            found = gradients(lambda *x, m=mask: plain_attention(*x, m), given, self.grad_out[begin:end].to(dtype))
            dq[begin:end] = found[0]
            dk[keys] += found[1]
            dv[keys] += found[2]
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@cache
def whole(length: int) -> VarlenLayout:
    """One sequence. Made once: a graph can take in no copy from the host, nor can who must not wait."""
    return VarlenLayout.from_lengths([length], device=DEVICE)


def prefix(begin: int, end: int) -> VarlenLayout:
    """Queries `begin` to `end` of a sequence, over its keys up to them."""
    return VarlenLayout.from_lengths([end - begin], [end], device=DEVICE)


def chosen(length: int, kv_heads: int, repeated: int = 1) -> Tensor:
    """Blocks up to each query's own, at random, its own among them and some twice; the same for `repeated` queries."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    own = torch.arange(length, device=DEVICE) // BLOCKS.block_size
    numbers = torch.rand(length, kv_heads, BLOCKS.topk, generator=generator, device=DEVICE)
    numbers[..., -1] = 0.999999
    lists = (numbers * (own + 1)[:, None, None]).int()
    return lists[torch.arange(length, device=DEVICE) // repeated * repeated].contiguous()


def cases(length: int, heads: int, kv_heads: int, dim: int = 128) -> Iterator[Case]:
    """The three branches; selected attention with lists of unrelated neighbours and of neighbours that agree."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, dim, generator=generator, device=DEVICE).to(HALF)

    def window(begin: int, end: int) -> tuple[Tensor, slice]:
        keys = slice(max(0, begin + 1 - BLOCKS.window_size), end)
        return masks.window_mask(prefix(begin, end), BLOCKS)[:, None, keys], keys

    def compressed(begin: int, end: int) -> tuple[Tensor, slice]:
        return masks.compressed_mask(prefix(begin, end), BLOCKS)[:, None], slice(BLOCKS.num_compressed(end))

    q, grad_out = normal(length, heads), normal(length, heads)
    k, v = normal(length, kv_heads), normal(length, kv_heads)
    yield Case("window_attention", q, k, v, grad_out, (), window)
    rows = BLOCKS.num_compressed(length)
    yield Case("compressed_attention", q, normal(rows, kv_heads), normal(rows, kv_heads), grad_out, (), compressed)
    for repeated in (1, BLOCKS.block_size):
        indices = chosen(length, kv_heads, repeated)

        def selected(begin: int, end: int, indices: Tensor = indices) -> tuple[Tensor, slice]:
            return masks.selected_mask(indices[begin:end], prefix(begin, end), BLOCKS), slice(end)

        yield Case("selected_attention", q, k, v, grad_out, (indices,), selected)


def organised(parts: int) -> AbstractContextManager[None]:
    """dq of selected attention by block, or with parts = 0 by query."""
    return configurations.overridden("selected_attention_backward", parts=parts)


def attend(op: str, rest: tuple[Tensor, ...], layout: VarlenLayout, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by the kernels."""
    found: tuple[Tensor, Tensor] = getattr(BACKEND, op)(*qkv, *rest, layout, BLOCKS)
    return found


def check_ragged(heads: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """All branches over a ragged batch: fp32 within the derived bound, which is 0 for unseen keys, others' budget."""
    layout = VarlenLayout.from_lengths(*RAGGED, device=DEVICE)
    inputs = random_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    q, k, v, _ = inputs
    grad_out = random_inputs(layout, heads=heads, kv_heads=1, head_dim=dims[1], seed=1, dtype=dtype).q
    k_cmp, v_cmp = (reference.compress_mean(x.double(), layout, BLOCKS).to(dtype) for x in (k, v))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-2, 12, (layout.total_q, kv_heads, 9), generator=generator, dtype=torch.int32).to(DEVICE)
    for op, given, rest, mask in (
        ("window_attention", (q, k, v), (), masks.window_mask(layout, BLOCKS)[:, None]),
        ("compressed_attention", (q, k_cmp, v_cmp), (), masks.compressed_mask(layout, BLOCKS)[:, None]),
        ("selected_attention", (q, k, v), (indices,), masks.selected_mask(indices, layout, BLOCKS)),
    ):
        run = partial(attend, op, rest, layout)
        dense = partial(plain_attention, mask=mask)
        with poisoned_empty():
            found = gradients(run, given, grad_out)
        exact = gradients(dense, [x.double() for x in given], grad_out.double())
        plain = gradients(dense, given, grad_out)
        bounds = gradient_bounds(*given, grad_out, mask)
        for name, got, right, other, bound in zip(NAMES, found, exact, plain, bounds, strict=True):
            assert not got[bound == 0].any(), f"{op} {name}"
            if dtype == torch.float32:
                assert bool(((got.double() - right).abs() <= bound).all()), f"{op} {name}"
            else:
                assert_within_budget(got, other, right, f"{op} {name}")


@pytest.mark.parametrize(
    ("group", "dtype", "parts"),
    [
        (1, torch.bfloat16, 1),
        (3, torch.bfloat16, 0),
        (4, torch.float32, 0),
        (4, torch.float32, 1),
        (16, torch.float16, 1),
        (16, torch.bfloat16, 0),
        (64, torch.bfloat16, 1),
    ],
    ids=str,
)
def test_a_ragged_batch(group: int, dtype: torch.dtype, parts: int) -> None:
    with organised(parts):
        check_ragged(2 * group, 2, (64, 64), dtype)


@pytest.mark.usefixtures("known_spread")
@pytest.mark.parametrize("dims", [(192, 128), (96, 80), (128, 128), (128, 32)], ids=str)
def test_head_dims(dims: tuple[int, int]) -> None:
    check_ragged(8, 2, dims, torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("length", "parts"), [(4096, 0), (4096, 1), (32_768, None)], ids=["4k-by-query", "4k-by-block", "32k"]
)
def test_real_lengths(length: int, parts: int | None, shape: str) -> None:
    """Every value of every gradient; both organisations, and the one that is configured."""
    with organised(parts) if parts is not None else nullcontext():
        for case in cases(length, *SHAPES[shape]):
            check(case)


def check(case: Case, *, first: int = 0, rows: int = 256) -> None:
    """Within the budget, over queries from `first` on and the keys that they alone see."""
    found = case.gradients()
    keys = first if len(case.k) == len(case.q) else max(0, -(-(first + 1 - BLOCKS.kernel_size) // BLOCKS.kernel_stride))
    plain, exact = case.plain(HALF, first, rows), case.plain(torch.float64, first, rows)
    for name, begin, *both in zip(NAMES, (first, keys, keys), found, plain, exact, strict=True):
        assert_within_budget(*(x[begin:] for x in both), f"{case.op} {name}")


@pytest.mark.alone
def test_256k_tokens() -> None:
    """The last two blocks of queries and the keys that only they see: offsets of rows and heads are largest there."""
    for case in cases(262_144, 8, 2):
        check(case, first=262_144 - 128, rows=64)


@pytest.mark.parametrize("parts", [0, 1])
def test_keys_that_nobody_chose_get_zeros(parts: int) -> None:
    with organised(parts):
        check_left_out(4096, [0, 7, 40, 63])


def check_left_out(length: int, blocks: list[int]) -> None:
    """Everybody's own block is listed, so that all keys but those of `blocks` are seen."""
    *_, case = cases(length, 8, 2)
    (indices,) = case.rest
    left_out = torch.tensor(blocks, device=DEVICE)
    indices[torch.isin(indices, left_out)] = -1
    _, dk, dv = case.gradients()
    keys = (left_out[:, None] * BLOCKS.block_size + torch.arange(BLOCKS.block_size, device=DEVICE)).flatten()
    others = torch.ones(length, dtype=torch.bool, device=DEVICE).index_fill(0, keys, False)
    for x in (dk, dv):
        assert not x[keys].any()
        assert bool(x[others].any(-1).all())


@pytest.mark.parametrize("parts", [0, 1])
def test_100_runs_are_bitwise_the_same(parts: int) -> None:
    for heads, kv_heads in SHAPES.values():
        with organised(parts):
            for case in cases(2000, heads, kv_heads):
                first, *others = (case.gradients() for _ in range(100))
                for other in others:
                    assert all(map(torch.equal, first, other)), case.op


def test_100_runs_of_pooling_and_combination_are_bitwise_the_same() -> None:
    layout = VarlenLayout.from_lengths([3000, 1100], device=DEVICE)
    q, k, _, gates = random_inputs(layout, heads=8, kv_heads=2, head_dim=128, dtype=HALF)
    rows = layout.compressed(BLOCKS).total
    pooled = [gradients(lambda x: BACKEND.compress_mean(x, layout, BLOCKS), [k], k[:rows]) for _ in range(100)]
    combined = [gradients(BACKEND.combine, [gates, q, q + 1, q - 1], q) for _ in range(100)]
    for runs in (pooled, combined):
        assert all(all(map(torch.equal, runs[0], other)) for other in runs)


@pytest.mark.alone
@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("shape", [(64, 4), (32, 8), (16, 16)], ids=str)
def test_memory_at_64k_tokens(shape: tuple[int, int], parts: int) -> None:
    """Results, statistics of the rows, and the workspace that the operators say they take.

    That of selected attention also holds lists: 8 bytes for each entry of block_indices, and at most half as much again
    for a block's last tile, of 64 queries and fewer.
    """
    for case in cases(65_536, *shape):
        results = sum(x.nbytes for x in (case.q, case.k, case.v))
        statistics = 2 * 4 * case.q.shape[0] * case.q.shape[1]
        workspace = attention_gradients.SPLITS
        if case.rest:
            limits = selected_gradients.PARTS + selected_gradients.SUMS + selected_gradients.MARKS
            workspace = limits + 3 * case.rest[0].nbytes
        with organised(parts):
            assert allocated(case) <= results + statistics + workspace, case.op


def allocated(case: Case) -> int:
    """The most bytes that a backward has beside what its forward has left."""
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out, _ = case.run(*leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(out, leaves, case.grad_out)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert all(bool(x.isfinite().all()) for x in found)
    return taken


def test_nothing_waits_for_the_device() -> None:
    for case in cases(700, 8, 2):
        expected = case.gradients()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = case.gradients()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, found, expected)), case.op


@pytest.mark.parametrize("parts", [0, 1])
def test_a_cuda_graph_replays_with_new_numbers(parts: int) -> None:
    with organised(parts):
        for case in cases(700, 8, 2):
            case.gradients()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = case.gradients()
            for x in (case.q, case.k, case.v, case.grad_out):
                x.copy_(x.roll(1, 0))
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, case.gradients())), case.op
