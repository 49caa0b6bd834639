"""Does the backend compute what the oracle computes, forward and backward, for every shape, tiling and loop order?"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, masks, reference
from nsa_varlen.sdpa import BACKEND, _backend, _interval, _selected, _tiles
from nsa_varlen.testing import (
    Inputs,
    Results,
    certified_inputs,
    plain_attention,
    poisoned_empty,
    random_inputs,
    run_ops,
    selection_margin,
    to_pages,
)
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=5, window_size=7)
DENSE = BlockGeometry(kernel_size=1, kernel_stride=1, block_size=3, topk=6, init_blocks=2, window_size=1)
WIDE = BlockGeometry(kernel_size=6, kernel_stride=3, block_size=12, topk=3, init_blocks=0, window_size=70)
# The name says what the batch is about: queries and keys of each sequence.
LAYOUTS = {
    "prefill": ([67], [67]),
    "ragged": ([33, 5, 18], [33, 5, 18]),
    "chunked": ([20, 9], [61, 40]),
    "decode": ([1, 1, 1], [50, 1, 29]),
    "no-keys-no-queries": ([0, 7, 3, 5], [6, 0, 0, 31]),
    "more-queries-than-keys": ([12, 30], [5, 25]),
    "no-keys-at-the-end": ([4, 3], [9, 0]),
    "one-token": ([1], [1]),
    "nothing": ([0, 0], [0, 0]),
    "no-sequence": ([], []),
}
HEADS = {"g1": (2, 2), "g3": (3, 1), "g2-hk3": (6, 3)}
# Unit-scale fp32: at most 5e-5. In fp64 the same sums leave 5e-5 * 2^-29 = 1e-13, but LSEs are rounded to fp32.
MAX_ABS = {torch.float32: 5e-5, torch.float64: 1e-12}
LSE_ABS = {torch.float32: 5e-5, torch.float64: 2e-6}


def layout_named(name: str) -> VarlenLayout:
    return VarlenLayout.from_lengths(*LAYOUTS[name])


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float, name: str = "") -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_results(got: Results, expected: Results, dtype: torch.dtype) -> None:
    for name, x, y in zip(Results._fields, got, expected, strict=True):
        if name == "block_indices":
            assert torch.equal(x, y), name
        else:
            assert x.shape == y.shape, name
            close(x, y, (LSE_ABS if name.startswith("lse") else MAX_ABS)[dtype], name)


def gradients(backend: Any, inputs: Inputs, layout: VarlenLayout, blocks: BlockGeometry, indices: torch.Tensor) -> list:
    """Gradients of q, k, v and the gates through all branches, one fixed random direction per output."""
    leaves = inputs.leaves()
    out = run_ops(backend, leaves, layout, blocks, block_indices=indices).out
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    return [x.grad for x in leaves]


@pytest.fixture(params=["by-query", "by-block"])
def loop_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selected attention always in one of its two loop orders."""
    monkeypatch.setattr(_selected, "ROWS_PER_BLOCK", {"by-query": 1 << 40, "by-block": 0}[request.param])


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("blocks", "heads"),
    [(SMALL, "g3"), (DENSE, "g2-hk3"), (WIDE, "g1"), (WIDE, "g3")],
    ids=["small-g3", "dense-g2-hk3", "wide-g1", "wide-g3"],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_and_backward_are_the_oracles(name: str, blocks: BlockGeometry, heads: str, dtype: torch.dtype) -> None:
    layout, (q_heads, kv_heads) = layout_named(name), HEADS[heads]
    inputs, _ = certified_inputs(layout, blocks, heads=q_heads, kv_heads=kv_heads, head_dim=5, v_head_dim=3)
    exact = run_ops(reference, inputs, layout, blocks)
    got = run_ops(BACKEND, inputs.to(dtype), layout, blocks)
    assert_results(got, exact, dtype)
    assert got.lse_cmp.dtype == got.lse_slc.dtype == got.lse_win.dtype == torch.float32
    assert got.block_indices.dtype == torch.int32
    wanted = gradients(reference, inputs, layout, blocks, exact.block_indices)
    for field, x, y in zip(
        Inputs._fields, gradients(BACKEND, inputs.to(dtype), layout, blocks, exact.block_indices), wanted, strict=True
    ):
        # A key's gradient sums over up to 67 queries of unit scale: the bound of one output, times sqrt(67).
        close(x, y, 8 * MAX_ABS[dtype], f"gradient of {field}")


@st.composite
def problems(draw: st.DrawFn) -> tuple[VarlenLayout, BlockGeometry, dict[str, int]]:
    """Ragged batches, geometries, group sizes and dims, odd ones included."""
    stride = draw(st.integers(1, 4))
    width = draw(st.integers(1, 4))
    block = draw(st.integers(width, 6))
    init, local, free = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 5))
    topk = init + local + free
    window = draw(st.integers(1, 40))
    blocks = BlockGeometry(width * stride, stride, block * stride, topk, init, local, window)
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=4))
    layout = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    kv_heads = draw(st.integers(1, 3))
    sizes = {"heads": kv_heads * draw(st.integers(1, 5)), "kv_heads": kv_heads}
    return layout, blocks, sizes | {"head_dim": draw(st.integers(1, 9)), "v_head_dim": draw(st.integers(1, 9))}


def check_problem(problem: tuple[VarlenLayout, BlockGeometry, dict[str, int]]) -> None:
    layout, blocks, sizes = problem
    inputs = random_inputs(layout, **sizes)
    exact = run_ops(reference, inputs, layout, blocks)
    margin, error = selection_margin(inputs.q, exact.k_cmp, layout, blocks)
    safe = margin > 2 * error
    got = run_ops(BACKEND, inputs, layout, blocks)
    assert torch.equal(got.block_indices[safe], exact.block_indices[safe])
    got = run_ops(BACKEND, inputs, layout, blocks, block_indices=exact.block_indices)
    assert_results(got, exact, torch.float64)


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(problems())
def test_any_problem_agrees_in_fp64(problem: tuple[VarlenLayout, BlockGeometry, dict[str, int]]) -> None:
    check_problem(problem)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, database=None, max_examples=2000)
@given(problems())
def test_any_problem_agrees_in_fp64_at_length(problem: tuple[VarlenLayout, BlockGeometry, dict[str, int]]) -> None:
    check_problem(problem)


CONSTANTS = {
    "tile-rows-1": (_interval, "CPU_TILE_ROWS", 1),
    "tile-rows-5": (_interval, "CPU_TILE_ROWS", 5),
    "tile-rows-4096": (_interval, "CPU_TILE_ROWS", 4096),
    "short-keys-0": (_interval, "CPU_SHORT_KEYS", 0),
    "short-keys-20": (_interval, "CPU_SHORT_KEYS", 20),
    "batch-keys-1": (_tiles, "BATCH_KEYS", 1),
    "choices-1": (_selected, "CHOICES_AT_ONCE", 1),
    "choices-3": (_selected, "CHOICES_AT_ONCE", 3),
    "choices-1M": (_selected, "CHOICES_AT_ONCE", 1 << 20),
    "gather-1": (_selected, "GATHER_ELEMENTS", 1),
    "gather-5000": (_selected, "GATHER_ELEMENTS", 5000),
}


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("constant", CONSTANTS)
def test_tile_sizes_change_nothing(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CONSTANTS[constant])
    for name in ("ragged", "chunked", "more-queries-than-keys"):
        layout = layout_named(name)
        inputs, _ = certified_inputs(layout, SMALL, head_dim=5)
        exact = run_ops(reference, inputs, layout, SMALL)
        assert_results(run_ops(BACKEND, inputs, layout, SMALL), exact, torch.float64)
        wanted = gradients(reference, inputs, layout, SMALL, exact.block_indices)
        for x, y in zip(gradients(BACKEND, inputs, layout, SMALL, exact.block_indices), wanted, strict=True):
            close(x, y, 8 * MAX_ABS[torch.float64])


def test_both_loop_orders_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill on a CPU goes by block, a decode by query: the tests above patch a choice that exists."""
    went = []
    for name in ("_by_block", "_by_query"):
        order = getattr(_selected, name)
        monkeypatch.setattr(_selected, name, lambda *args, o=order, n=name: (went.append(n), o(*args))[1])
    for name in ("prefill", "decode"):
        layout = layout_named(name)
        run_ops(BACKEND, random_inputs(layout), layout, SMALL)
    assert went == ["_by_block", "_by_query"]


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("block_size", [64, 128, 640])
def test_blocks_larger_than_a_tile(block_size: int) -> None:
    blocks = BlockGeometry(kernel_size=32, kernel_stride=32, block_size=block_size, topk=3, window_size=100)
    layout = VarlenLayout.from_lengths([5, 700], [650, 700])
    inputs, _ = certified_inputs(layout, blocks, heads=2, kv_heads=1, head_dim=4)
    exact = run_ops(reference, inputs, layout, blocks)
    assert_results(run_ops(BACKEND, inputs, layout, blocks), exact, torch.float64)


@pytest.mark.parametrize("backend", [reference, BACKEND], ids=["oracle", "sdpa"])
@pytest.mark.parametrize("name", ["prefill", "ragged", "chunked", "decode", "one-token", "more-queries-than-keys"])
def test_wide_enough_branches_are_full_attention(backend: Any, name: str) -> None:
    layout = layout_named(name)
    blocks = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=17, window_size=67)
    inputs = random_inputs(layout).to(torch.float32)
    got = run_ops(backend, inputs, layout, blocks)
    full = plain_attention(*(x.double() for x in inputs[:3]), masks.causal_mask(layout)[:, None])
    assert float((got.o_win - full).abs().max()) <= 1e-5
    assert float((got.o_slc - full).abs().max()) <= 1e-5


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_hold_what_packed_rows_hold(name: str, page_size: int) -> None:
    layout, k_lengths = layout_named(name), LAYOUTS[name][1]
    q, k, v, _ = random_inputs(layout, v_head_dim=5)
    k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, SMALL) for x in (k, v))
    cmp_lengths = layout.compressed(SMALL).cu_seqlens.diff().tolist()
    paged_cmp = [to_pages(x, cmp_lengths, page_size, seed=seed) for seed, x in enumerate((k_cmp, v_cmp))]
    paged = [to_pages(x, k_lengths, page_size, seed=seed) for seed, x in enumerate((k, v))]

    def both(op: str, packed: list, paged: list, *rest: object) -> list:
        results = [getattr(BACKEND, op)(q, *kv, *rest, layout, SMALL) for kv in (packed, paged)]
        for x, y in zip(*results, strict=True):
            close(y, x, 1e-6 if x.dtype == torch.float32 else 1e-12, op)
        return results[0]

    _, lse = both("compressed_attention", [k_cmp, v_cmp], paged_cmp)
    indices = BACKEND.select_blocks(q, k_cmp, lse, layout, SMALL)
    assert torch.equal(BACKEND.select_blocks(q, paged_cmp[0], lse, layout, SMALL), indices)
    both("selected_attention", [k, v], paged, indices)
    both("window_attention", [k, v], paged)


@pytest.mark.parametrize("short_keys", [0, 1 << 20], ids=["tiles", "batch"])
def test_a_window_never_depends_on_pages_behind_it(short_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache frees them: -1 in the table, and whatever another owner left in the pool, NaN here."""
    monkeypatch.setattr(_interval, "CPU_SHORT_KEYS", short_keys)
    lengths = [50, 33, 41]
    layout = VarlenLayout.from_lengths([1, 2, 1], lengths)
    q, k, v, _ = random_inputs(layout)
    paged = [to_pages(x, lengths, 4, seed=seed) for seed, x in enumerate((k, v))]
    expected = BACKEND.window_attention(q, *paged, layout, SMALL)
    for kv in paged:
        for sequence, (q_len, k_len) in enumerate(zip([1, 2, 1], lengths, strict=True)):
            first_seen = k_len - q_len + 1 - SMALL.window_size
            freed = kv.block_table[sequence, : first_seen // 4]
            assert len(freed)
            kv.pages[freed.long()] = torch.nan
            freed.fill_(-1)
    for x, y in zip(BACKEND.window_attention(q, *paged, layout, SMALL), expected, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned_empty():
        yield


@pytest.mark.usefixtures("loop_order", "poison")
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_result_reads_memory_that_was_never_written(name: str) -> None:
    layout = layout_named(name)
    inputs = random_inputs(layout)
    results = run_ops(BACKEND, inputs, layout, SMALL)
    assert not any(x.isnan().any() for x in results)
    assert not any(x.isnan().any() for x in gradients(BACKEND, inputs, layout, SMALL, results.block_indices))


def test_the_poison_is_poisonous() -> None:
    with poisoned_empty():
        made = (torch.empty(2), torch.ones(2).new_empty(2), torch.empty_like(torch.ones(2)))
        assert all(x.isnan().all() for x in made)
        assert int(torch.empty(1, dtype=torch.int32)) == -(2**31)


@pytest.mark.parametrize(
    ("q", "k", "batched"),
    [
        ([50] * 8, [50] * 8, True),
        ([65, 128] * 4, [65, 128] * 4, False),  # queries and keys are padded to 128, half the logits hidden anyway
        ([1] * 8, [129, 256] * 4, True),
        ([4] * 8, [256] * 8, True),
        ([1] * 8, [257] * 8, False),
    ],
)
def test_a_cpu_batches_few_products_over_few_keys(q: list[int], k: list[int], batched: bool) -> None:
    interval = _backend._window_interval(VarlenLayout.from_lengths(q, k), BlockGeometry(), 8, 2)
    assert {isinstance(piece, _tiles.Batch) for piece in interval.pieces} == {batched}


@pytest.mark.parametrize("op", ["selected_attention", "window_attention", "rows"])
def test_pages_that_are_views_of_a_fused_pool_are_not_copied_whole(op: str) -> None:
    """Keys and values side by side in [P, 2, page, H, D]: nothing as large as all the pages may be made."""
    lengths = [50, 33, 41]
    layout = VarlenLayout.from_lengths([1, 2, 1], lengths)
    q, k, v, _ = random_inputs(layout)
    own = [to_pages(x, lengths, 4) for x in (k, v)]
    pool = torch.full((1000, 2, *own[0].pages.shape[1:]), torch.nan, dtype=q.dtype)
    for which, x in enumerate(own):
        pool[: len(x.pages), which] = x.pages
    fused = [PagedKV(pool[:, which], x.block_table, x.lengths) for which, x in enumerate(own)]
    assert not fused[0].pages.is_contiguous()
    indices = torch.arange(SMALL.topk, dtype=torch.int32).expand(layout.total_q, k.shape[1], -1).contiguous()

    def run(kv: list[PagedKV]) -> tuple[torch.Tensor, ...]:
        if op == "rows":
            return tuple(x.rows(layout.sequence_of_keys(), layout.key_positions()) for x in kv)
        rest = (indices, layout, SMALL) if op == "selected_attention" else (layout, SMALL)
        return getattr(BACKEND, op)(q, *kv, *rest)

    expected = run(own)
    with Largest() as largest:
        got = run(fused)
    assert largest.elements < pool.numel() // 4  # half the pool is the keys, or the values
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


class Largest(TorchDispatchMode):
    """The largest tensor with its own memory that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out
