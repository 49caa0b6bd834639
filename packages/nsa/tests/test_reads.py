"""Do counted reads agree with the formulas, where the formulas hold?

Counted from what `select_blocks` really returns: see "Token budget" in the design. Budget and count are two different
formulas; neither is derived from the other here.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from nsa import NSAConfig, ops
from nsa.reads import ReadCounters, count_reads, reads_when_selected
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from torch import Tensor

GEOMETRIES = {
    "small": BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12),
    "no overlap": BlockGeometry(kernel_size=4, kernel_stride=4, block_size=8, topk=5, init_blocks=2, window_size=30),
    "every token": BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=2, local_blocks=1, window_size=1),
    "no forced start": BlockGeometry(kernel_size=16, kernel_stride=2, block_size=16, topk=3, init_blocks=0),
}
geometries = pytest.mark.parametrize("blocks", GEOMETRIES.values(), ids=GEOMETRIES)


def selected(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """What `select_blocks` returns for random queries and keys of two kv heads."""
    q, k = torch.randn(layout.total_q, 4, 8), torch.randn(layout.total_k, 2, 8)
    k_cmp = ops.compress_mean(k, layout, blocks)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
    return ops.select_blocks(q, k_cmp, lse, layout, blocks)


@geometries
def test_counts_are_those_of_the_masks(blocks: BlockGeometry) -> None:
    """One key at a time: the dense masks count what each query may look at."""
    layout = VarlenLayout.from_lengths([150, 1, 0, 20, 9], [150, 1, 3, 90, 4])
    for indices in (
        selected(layout, blocks),
        torch.randint(-2, 12, (layout.total_q, 2, 7), dtype=torch.int32),  # duplicates, padding, beyond the end
    ):
        reads = count_reads(indices, layout, blocks)
        cmp, win = (mask(layout, blocks).sum(1) for mask in (masks.compressed_mask, masks.window_mask))
        assert torch.equal(reads.cmp, cmp[:, None].expand(-1, 2))
        assert torch.equal(reads.win, win[:, None].expand(-1, 2))
        assert torch.equal(reads.slc, masks.selected_mask(indices, layout, blocks).sum(-1))
        assert torch.equal(reads.total, reads.cmp + reads.slc + reads.win)


@geometries
def test_what_select_blocks_returns_reads_what_the_formula_says(blocks: BlockGeometry) -> None:
    layout = VarlenLayout.from_lengths([200, 33])
    total = count_reads(selected(layout, blocks), layout, blocks).total
    expected = [reads_when_selected(t + 1, blocks) for t in layout.positions().tolist()]
    assert total.tolist() == [[count, count] for count in expected]


@geometries
def test_the_formula_is_the_designs(blocks: BlockGeometry) -> None:
    """num_cmp(S) + (min(n, Nb) - 1) * l' + ((S - 1) mod l') + 1 + min(w, S), spelled with counting loops."""
    for length in range(1, 300):
        own = (length - 1) // blocks.block_size * blocks.block_size
        compressed = sum(start + blocks.kernel_size <= length for start in range(0, length, blocks.kernel_stride))
        touched = len(range(0, length, blocks.block_size))
        whole = min(blocks.topk, touched) - 1
        expected = compressed + whole * blocks.block_size + (length - own) + min(blocks.window_size, length)
        assert reads_when_selected(length, blocks) == expected


@geometries
def test_the_budget_bounds_the_count_and_never_falls(blocks: BlockGeometry) -> None:
    layout = VarlenLayout.from_lengths([300])
    total = count_reads(selected(layout, blocks), layout, blocks).total[:, 0].tolist()
    budget = [blocks.reads(length) for length in range(1, 301)]
    assert budget == sorted(budget)
    settled = (blocks.topk - 1) * blocks.block_size
    for length, (counted, allowed) in enumerate(zip(total, budget, strict=True), start=1):
        assert counted <= allowed
        if length > settled:
            assert allowed - counted == -length % blocks.block_size <= blocks.block_size - 1
    assert settled < 300
    assert any(counted < allowed for counted, allowed in zip(total, budget, strict=True))


def test_fewer_blocks_read_less() -> None:
    """The counter looks at the indices: it does not repeat the formula."""
    blocks, layout = GEOMETRIES["small"], VarlenLayout.from_lengths([100])
    indices = selected(layout, blocks)
    fewer = indices.clone()
    fewer[99, 0, 0] = -1
    lost = count_reads(indices, layout, blocks).slc - count_reads(fewer, layout, blocks).slc
    assert lost[99, 0] == 16
    assert lost.sum() == 16


def test_an_actual_layer_reads_what_the_formula_says(make_layer: Callable[..., torch.nn.Module]) -> None:
    """Prefill and decode, from the indices of the layer's own selection."""
    layer = make_layer()
    config: NSAConfig = layer.config
    returned = []

    def remember(*args: object, **kwargs: object) -> Tensor:
        returned.append((original(*args, **kwargs), args[3]))
        return returned[-1][0]

    original = ops.select_blocks
    with mock.patch.object(ops, "select_blocks", remember), torch.no_grad():
        layer(torch.randn(1, 90, 24, dtype=torch.float64))
    ((indices, layout),) = returned
    total = count_reads(indices, layout, config.blocks).total
    assert total[:, 0].tolist() == [reads_when_selected(length, config.blocks) for length in range(1, 91)]


def test_lengths_below_one() -> None:
    with pytest.raises(ValueError, match=r"^length: expected at least 1, got 0$"):
        reads_when_selected(0, BlockGeometry())


@pytest.mark.parametrize(
    "indices, error, message",
    [
        (torch.zeros(3, 1, 2), TypeError, "expected dtype torch.int32, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int32), ValueError, r"expected shape \[3, .*\], got \[3, 2\]"),
        (torch.zeros(2, 1, 2, dtype=torch.int32), ValueError, r"expected shape \[3, 1, N\], got \[2, 1, 2\]"),
        ([[0]], TypeError, "expected a tensor, got list"),
    ],
)
def test_indices_that_do_not_fit(indices: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^block_indices: {message}"):
        count_reads(indices, VarlenLayout.from_lengths([3]), BlockGeometry())


@pytest.mark.parametrize("decoded", [False, True], ids=["extend", "decode"])
@torch.no_grad()
def test_a_cache_counts_what_its_steps_read(decoded: bool, make_layer: Callable, make_cache: Callable) -> None:
    """By sequence and branch; within the formula, within the budget, which never falls."""
    layer = make_layer()
    blocks, heads = layer.config.blocks, layer.config.num_kv_heads
    cache = make_cache(layer.config, 2, 128)
    cache.counters = ReadCounters(cache.batch_size)
    x = torch.randn(2, 128, 24, dtype=torch.float64)
    layer(x[0, :40], layout=VarlenLayout.from_lengths([40, 0]), cache=cache)
    expected = torch.zeros(4, dtype=torch.int64)
    for length in range(1, 41):
        reads = blocks.num_compressed(length), min(blocks.window_size, length)
        slc = reads_when_selected(length, blocks) - sum(reads)
        expected += heads * torch.tensor([reads[0], slc, reads[1], blocks.reads(length)])
    assert cache.counters.last.tolist() == [expected.tolist(), [0] * 4]
    budgets, total, steps = [], expected.clone(), 1
    for length in range(41, 90):
        counts = [1, int(length > 60)]
        rows = x[:, cache.lengths[0] :][:, :1]
        if decoded:
            cache.reserve(counts)
            layer.decode(rows, cache, torch.tensor(counts, dtype=torch.int32))
            cache.advance(counts)
        else:
            layer(rows[: sum(counts), 0], layout=VarlenLayout.from_lengths(counts), cache=cache)
        for sequence, (count, now) in enumerate(zip(counts, cache.lengths, strict=True)):
            cmp, slc, win, budget = cache.counters.last[sequence].tolist()
            assert cmp + slc + win == count * heads * (reads_when_selected(now, blocks) if now else 0)
            assert budget == count * heads * blocks.reads(now)
            assert cmp + slc + win <= budget
        budgets.append(cache.counters.last[0, 3].item())
        total += cache.counters.last.sum(0)
        steps += 1
    assert budgets == sorted(budgets)
    assert cache.counters.read() == dict(
        zip(("steps", "cmp", "slc", "win", "budget"), [steps, *total.tolist()], strict=True)
    )


def test_without_counters_nothing_is_counted(make_layer: Callable, make_cache: Callable) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with mock.patch.object(ReadCounters, "add") as add, torch.no_grad():
        layer(torch.randn(1, 5, 24, dtype=torch.float64), cache=cache)
    add.assert_not_called()
