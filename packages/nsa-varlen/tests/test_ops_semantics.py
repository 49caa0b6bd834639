"""What every backend promises, whatever its arithmetic: causality, isolation, exact choices, ragged edges, no NaN."""

from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.sdpa import _selected
from nsa_varlen.sdpa._selection import top_blocks
from nsa_varlen.testing import BACKENDS, Inputs, Results, certified_inputs, random_inputs, run_ops

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=5, window_size=7)
ODD = BlockGeometry(
    kernel_size=9, kernel_stride=3, block_size=15, topk=3, init_blocks=1, local_blocks=1, window_size=11
)
PER_QUERY = ("o_cmp", "block_indices", "o_slc", "o_win", "out")
PER_HEAD = ("lse_cmp", "lse_slc", "lse_win")
# fp64 sums of unit-scale terms in another order; LSEs are rounded to fp32 and lie below 8: half an ulp is 2.4e-7.
SAME = {"rtol": 0, "atol": 1e-12}
SAME_LSE = {"rtol": 0, "atol": 5e-7}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


@pytest.fixture(params=["by-query", "by-block"])
def loop_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selected attention of sdpa always in one of its two loop orders."""
    monkeypatch.setattr(_selected, "ROWS_PER_BLOCK", {"by-query": 1 << 40, "by-block": 0}[request.param])


def rows_of(results: Results, rows: slice) -> dict[str, torch.Tensor]:
    """Everything that belongs to the queries `rows`."""
    kept = {name: getattr(results, name)[rows] for name in PER_QUERY}
    return kept | {name: getattr(results, name)[:, rows] for name in PER_HEAD}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert torch.equal(x, expected[name]), f"{name} changed"


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal indices, and values equal up to the order of fp64 sums."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        rounding = SAME_LSE if name.startswith("lse") else SAME
        torch.testing.assert_close(x, expected[name], **rounding, msg=lambda m, name=name: f"{name}: {m}")


def backward(backend: Any, inputs: Inputs, layout: VarlenLayout, indices: torch.Tensor) -> list[torch.Tensor]:
    leaves = inputs.leaves()
    out = run_ops(backend, leaves, layout, BLOCKS, block_indices=indices).out
    out.backward(torch.arange(out.numel(), dtype=out.dtype).sin().reshape(out.shape))
    return [x.grad for x in leaves]


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("edited", [0, 1, 31, 32, 69])
def test_editing_a_token_changes_no_bit_before_it(
    backend: Any, edited: int, blocks: BlockGeometry, dtype: torch.dtype
) -> None:
    layout = VarlenLayout.from_lengths([70])
    inputs = random_inputs(layout, dtype=dtype)
    before = run_ops(backend, inputs, layout, blocks)
    changed = Inputs(*(x.clone() for x in inputs))
    for x in changed:
        x[edited] = 30 * x[edited] - 5
    after = run_ops(backend, changed, layout, blocks)
    assert_same_bits(rows_of(after, slice(0, edited)), rows_of(before, slice(0, edited)))
    assert not torch.equal(after.o_win[edited:], before.o_win[edited:])
    assert not torch.equal(after.o_slc[edited:], before.o_slc[edited:])
    if edited == 31:
        assert not torch.equal(after.o_cmp[edited:], before.o_cmp[edited:])


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("edited", [0, 1, 2])
def test_sequences_never_see_each_other(backend: Any, edited: int) -> None:
    lengths = [19, 30, 12]
    layout = VarlenLayout.from_lengths(lengths)
    bounds = layout.cu_seqlens_q.tolist()
    inputs = random_inputs(layout)
    before = run_ops(backend, inputs, layout, BLOCKS)
    changed = Inputs(*(x.clone() for x in inputs))
    for x in changed:
        x[bounds[edited] : bounds[edited + 1]] *= -7
    after = run_ops(backend, changed, layout, BLOCKS)
    gradients = backward(backend, inputs, layout, before.block_indices)
    changed_gradients = backward(backend, changed, layout, before.block_indices)
    for other in {0, 1, 2} - {edited}:
        rows = slice(bounds[other], bounds[other + 1])
        assert_same_bits(rows_of(after, rows), rows_of(before, rows))
        for x, y in zip(changed_gradients, gradients, strict=True):
            assert torch.equal(x[rows], y[rows])


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
def test_a_ragged_batch_is_each_sequence_alone(backend: Any, blocks: BlockGeometry) -> None:
    q_lengths, k_lengths = [33, 1, 0, 5, 12, 7, 1], [33, 1, 4, 41, 6, 0, 26]
    layout = VarlenLayout.from_lengths(q_lengths, k_lengths)
    inputs, _ = certified_inputs(layout, blocks)
    together = run_ops(backend, inputs, layout, blocks)
    q0 = k0 = 0
    for q_len, k_len in zip(q_lengths, k_lengths, strict=True):
        rows, keys = slice(q0, q0 + q_len), slice(k0, k0 + k_len)
        alone = Inputs(inputs.q[rows], inputs.k[keys], inputs.v[keys], inputs.gates[rows])
        got = run_ops(backend, alone, VarlenLayout.from_lengths([q_len], [k_len]), blocks)
        assert_same(rows_of(got, slice(None)), rows_of(together, rows))
        q0, k0 = q0 + q_len, k0 + k_len


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("q_len", [1, 2, 13, 59])
@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
def test_fewer_queries_are_the_last_rows_of_the_prefill(backend: Any, q_len: int, blocks: BlockGeometry) -> None:
    whole = VarlenLayout.from_lengths([60])
    inputs, _ = certified_inputs(whole, blocks)
    prefill = run_ops(backend, inputs, whole, blocks)
    tail = slice(60 - q_len, 60)
    queries = Inputs(inputs.q[tail], inputs.k, inputs.v, inputs.gates[tail])
    got = run_ops(backend, queries, VarlenLayout.from_lengths([q_len], [60]), blocks)
    assert_same(rows_of(got, slice(None)), rows_of(prefill, tail))


@pytest.mark.usefixtures("loop_order")
def test_queries_before_the_first_key_see_nothing(backend: Any) -> None:
    layout = VarlenLayout.from_lengths([9, 4, 6], [5, 0, 6])
    inputs = random_inputs(layout)
    results = run_ops(backend, inputs, layout, BLOCKS)
    blind = layout.positions() < 0
    assert blind.tolist() == [True] * 4 + [False] * 5 + [True] * 4 + [False] * 6
    for name in ("o_cmp", "o_slc", "o_win", "out"):
        assert not getattr(results, name)[blind].any(), name
    for name in PER_HEAD:
        assert (getattr(results, name)[:, blind] == -torch.inf).all(), name
    assert (results.block_indices[blind] == -1).all()
    dq, _, _, dgates = backward(backend, inputs, layout, results.block_indices)
    assert not dq[blind].any()
    assert not dgates[blind].any()


@pytest.mark.usefixtures("loop_order")
def test_a_finite_lse_exactly_where_a_key_is_seen(backend: Any) -> None:
    """Softmax maxima belong to one row: shared ones underflow next to a row of large logits."""
    layout = VarlenLayout.from_lengths([40, 3], [40, 1])
    inputs = random_inputs(layout, dtype=torch.float32)
    inputs.q[20] *= 1e4
    results = run_ops(backend, inputs, layout, BLOCKS)
    assert not any(x.isnan().any() for x in results)
    sees = layout.positions() >= 0
    for lse in (results.lse_slc, results.lse_win):
        assert torch.equal(lse.isfinite(), sees.expand_as(lse))
    sees = masks.compressed_mask(layout, BLOCKS).any(1)
    assert torch.equal(results.lse_cmp.isfinite(), sees.expand_as(results.lse_cmp))


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_neither_overflow_nor_give_nan(backend: Any, scale: float) -> None:
    layout = VarlenLayout.from_lengths([40, 21])
    inputs = random_inputs(layout, dtype=torch.float32)
    leaves = inputs.leaves()
    results = run_ops(backend, leaves, layout, BLOCKS, scale=scale)
    results.out.sum().backward()
    for x in (results.o_cmp, results.o_slc, results.o_win, *(x.grad for x in leaves)):
        assert x.isfinite().all()
    # Each output is a weighted mean of values; the weights' sum is rounded: 1 + a few 2^-24.
    assert float(results.o_win.detach().abs().max()) <= float(inputs.v.abs().max()) * (1 + 1e-5)


@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
def test_the_window_has_exactly_w_keys(backend: Any, blocks: BlockGeometry) -> None:
    """With q = 0 the LSE is the log of the number of keys, and one-hot values show which."""
    layout = VarlenLayout.from_lengths([40])
    q, k = torch.zeros(40, 1, 2, dtype=torch.float64), torch.zeros(40, 1, 2, dtype=torch.float64)
    out, lse = backend.window_attention(q, k, torch.eye(40, dtype=torch.float64)[:, None], layout, blocks)
    for t in range(40):
        seen = range(max(0, t - blocks.window_size + 1), t + 1)
        assert out[t, 0].nonzero().flatten().tolist() == list(seen)
        assert abs(float(lse[0, t].double().exp()) - len(seen)) < 1e-5


@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
def test_forced_blocks_are_chosen_and_the_own_token_is_covered(backend: Any, blocks: BlockGeometry) -> None:
    layout = VarlenLayout.from_lengths([70, 3, 9], [70, 50, 9])
    results = run_ops(backend, random_inputs(layout), layout, blocks)
    chosen = results.block_indices.tolist()
    for position, heads in zip(layout.positions().tolist(), chosen, strict=True):
        current = position // blocks.block_size
        forced = set(range(blocks.init_blocks)) | set(range(current - blocks.local_blocks + 1, current + 1))
        for row in heads:
            listed = [j for j in row if j >= 0]
            assert {j for j in forced if 0 <= j <= current} <= set(listed)
            assert current in listed
            assert listed == sorted(set(listed))
            assert len(listed) == min(blocks.topk, current + 1)
            assert row == listed + [-1] * (blocks.topk - len(listed))
            assert max(listed) <= current


def counted_choice(layout: VarlenLayout, blocks: BlockGeometry) -> list[list[int]]:
    """The blocks chosen when every visible compressed block is equally likely: counted in whole tokens."""
    rows = []
    for t in layout.positions().tolist():
        starts = range(0, max(0, t - blocks.kernel_size + 2), blocks.kernel_stride)
        score = [0] * (t // blocks.block_size + 1)
        for start in starts:
            for token in range(start, start + blocks.kernel_size):
                score[token // blocks.block_size] += 1
        current = t // blocks.block_size
        forced = {j for j in range(current + 1) if j < blocks.init_blocks or j > current - blocks.local_blocks}
        order = sorted(range(current + 1), key=lambda j: (j not in forced, -score[j], j))
        best = sorted(order[: blocks.topk])
        rows.append(best + [-1] * (blocks.topk - len(best)))
    return rows


TIES = [
    BLOCKS,
    ODD,
    BlockGeometry(
        kernel_size=4, kernel_stride=1, block_size=6, topk=4, window_size=8
    ),  # weights that are no powers of 2
    BlockGeometry(kernel_size=3, kernel_stride=3, block_size=3, topk=7, init_blocks=0, local_blocks=1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("group", [1, 3, 8, 12, 17])
@pytest.mark.parametrize("blocks", TIES, ids=["even", "odd", "thirds", "disjoint"])
@pytest.mark.parametrize("equal", ["queries-zero", "keys-repeated"])
def test_exact_ties_go_to_the_lower_block(
    backend: Any, equal: str, blocks: BlockGeometry, group: int, dtype: torch.dtype
) -> None:
    """Equal logits, exact by small integers; no order of summation may tell equal blocks apart."""
    layout = VarlenLayout.from_lengths([133])
    total = layout.compressed(blocks).total
    generator = torch.Generator().manual_seed(group)
    q = torch.randint(-3, 4, (133, 2 * group, 8), generator=generator).to(dtype)
    k_cmp = torch.randint(-3, 4, (total, 2, 8), generator=generator).to(dtype)
    q, k_cmp = (torch.zeros_like(q), k_cmp) if equal == "queries-zero" else (q, k_cmp[:1].expand(total, 2, 8))
    k_cmp = k_cmp.contiguous()
    _, lse = backend.compressed_attention(q, k_cmp, k_cmp, layout, blocks, scale=0.125)
    chosen = backend.select_blocks(q, k_cmp, lse, layout, blocks, scale=0.125)
    expected = torch.tensor(counted_choice(layout, blocks), dtype=torch.int32)
    assert torch.equal(chosen, expected[:, None].expand_as(chosen))


def test_ties_in_half_precision_too() -> None:
    layout = VarlenLayout.from_lengths([133])
    for dtype in (torch.float16, torch.bfloat16):
        inputs = random_inputs(layout, heads=16, dtype=dtype)
        inputs.q.zero_()
        chosen = run_ops(BACKENDS["sdpa"], inputs, layout, BLOCKS).block_indices
        expected = torch.tensor(counted_choice(layout, BLOCKS), dtype=torch.int32)
        assert torch.equal(chosen, expected[:, None].expand_as(chosen))


@pytest.mark.parametrize("group", [2, 5, 8])
def test_heads_of_a_group_share_one_choice_that_no_order_changes(backend: Any, group: int) -> None:
    layout = VarlenLayout.from_lengths([60, 23])
    inputs, _ = certified_inputs(layout, BLOCKS, heads=2 * group, kv_heads=2)
    results = run_ops(backend, inputs, layout, BLOCKS)
    assert results.block_indices.shape == (83, 2, BLOCKS.topk)
    order = torch.cat([torch.randperm(group), group + torch.randperm(group)])
    shuffled = Inputs(inputs.q[:, order], inputs.k, inputs.v, inputs.gates[:, order])
    got = run_ops(backend, shuffled, layout, BLOCKS)
    assert torch.equal(got.block_indices, results.block_indices)
    for name in ("o_cmp", "o_slc", "o_win", "out"):
        torch.testing.assert_close(getattr(got, name), getattr(results, name)[:, order], **SAME)
    for name in PER_HEAD:
        torch.testing.assert_close(getattr(got, name), getattr(results, name)[order], **SAME_LSE)


def test_every_head_of_a_group_has_a_say_in_the_choice(backend: Any) -> None:
    """Scores are summed over the group: they differ from those of any one of its heads."""
    layout = VarlenLayout.from_lengths([90])
    inputs, _ = certified_inputs(layout, BLOCKS, heads=3, kv_heads=1)
    together = run_ops(backend, inputs, layout, BLOCKS).block_indices
    for head in range(3):
        only = inputs._replace(q=inputs.q[:, [head] * 3])
        assert not torch.equal(run_ops(backend, only, layout, BLOCKS).block_indices, together)
    score = reference.block_scores(
        inputs.q,
        k_cmp := reference.compress_mean(inputs.k, layout, BLOCKS),
        reference.compressed_attention(inputs.q, k_cmp, k_cmp, layout, BLOCKS)[1],
        layout,
        BLOCKS,
    )
    for t in (40, 89):  # the best unforced blocks of the summed scores are in the choice
        current = t // BLOCKS.block_size
        unforced = score[t, 0, 1 : current - 1].argsort(descending=True)[: BLOCKS.topk - 3] + 1
        assert set(unforced.tolist()) <= set(together[t, 0].tolist())


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("entries", [1, 3, 7, 31])
def test_lists_of_blocks_are_sets(backend: Any, entries: int) -> None:
    """Any order, any number, -1 anywhere, duplicates once, blocks after the query or beyond the sequence ignored."""
    layout = VarlenLayout.from_lengths([30, 2, 9], [30, 17, 9])
    q, k, v, _ = random_inputs(layout)
    generator = torch.Generator().manual_seed(entries)
    messy = torch.randint(-1, 14, (41, 2, entries), generator=generator, dtype=torch.int32)
    messy[0, 0] = -1
    messy[1, :, 0] = 2**31 - 1
    tidy = torch.full((41, 2, 14), -1, dtype=torch.int32)
    for row, position in enumerate(layout.positions().tolist()):
        for head in range(2):
            blocks = sorted({j for j in messy[row, head].tolist() if 0 <= j <= position // BLOCKS.block_size})
            tidy[row, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    got = backend.selected_attention(q, k, v, messy, layout, BLOCKS)
    expected = reference.selected_attention(q, k, v, tidy, layout, BLOCKS)
    torch.testing.assert_close(got[0], expected[0], **SAME)
    torch.testing.assert_close(got[1].double(), expected[1].double(), **SAME_LSE)
    assert (got[1][:2, 0] == -torch.inf).all()
    assert not got[0][0, :2].any()


@pytest.mark.usefixtures("loop_order")
def test_no_entries_at_all_select_nothing(backend: Any) -> None:
    layout = VarlenLayout.from_lengths([6])
    q, k, v, _ = random_inputs(layout)
    out, lse = backend.selected_attention(q, k, v, torch.zeros(6, 2, 0, dtype=torch.int32), layout, BLOCKS)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.usefixtures("loop_order")
def test_keys_that_nobody_selected_have_no_gradient_at_all(backend: Any) -> None:
    layout = VarlenLayout.from_lengths([40])
    q, k, v, _ = random_inputs(layout).leaves()
    indices = torch.tensor([1, 4], dtype=torch.int32).expand(40, 2, 2).contiguous()
    out, _ = backend.selected_attention(q, k, v, indices, layout, BLOCKS)
    out.square().sum().backward()
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[4:8] = chosen[16:20] = True
    assert not k.grad[~chosen].any()
    assert not v.grad[~chosen].any()
    assert k.grad[chosen].abs().amax((1, 2)).gt(0).all()
    assert not q.grad[:4].any()


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16])
@pytest.mark.parametrize("blocks", [BLOCKS, ODD], ids=["even", "odd"])
def test_a_partial_block_and_a_short_sequence_attend_to_all_they_have(
    backend: Any, length: int, blocks: BlockGeometry
) -> None:
    """Up to topk blocks, selection drops nothing: equal to a window over everything."""
    assert length <= blocks.topk * blocks.block_size
    layout = VarlenLayout.from_lengths([length])
    inputs = random_inputs(layout)
    results = run_ops(backend, inputs, layout, blocks)
    wide = BlockGeometry(window_size=1 << 20)
    full, lse = backend.window_attention(*inputs[:3], layout, wide)
    torch.testing.assert_close(results.o_slc, full, **SAME)
    torch.testing.assert_close(results.lse_slc, lse, **SAME_LSE)
    if length < blocks.kernel_size:
        assert results.k_cmp.shape[0] == 0
        assert not results.o_cmp.any()
        assert (results.lse_cmp == -torch.inf).all()


@pytest.mark.usefixtures("loop_order")
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=["no-sequence", "one-empty", "three-empty"])
def test_a_batch_without_tokens_gives_empty_results_and_gradients(backend: Any, lengths: list[int]) -> None:
    layout = VarlenLayout.from_lengths(lengths)
    leaves = random_inputs(layout, v_head_dim=5).leaves()
    results = run_ops(backend, leaves, layout, BLOCKS)
    assert results.out.shape == (0, 4, 5)
    assert results.lse_win.shape == (4, 0)
    assert results.block_indices.shape == (0, 2, BLOCKS.topk)
    results.out.sum().backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_the_scale_is_that_of_the_logits(backend: Any) -> None:
    layout = VarlenLayout.from_lengths([30])
    inputs, _ = certified_inputs(layout, BLOCKS)
    scaled = run_ops(backend, inputs, layout, BLOCKS, scale=8**-0.5)
    assert_same(rows_of(scaled, slice(None)), rows_of(run_ops(backend, inputs, layout, BLOCKS), slice(None)))
    double = run_ops(backend, inputs, layout, BLOCKS, scale=2 * 8**-0.5)
    expected = run_ops(backend, inputs._replace(q=2 * inputs.q), layout, BLOCKS)
    assert_same(rows_of(double, slice(None)), rows_of(expected, slice(None)))


@pytest.mark.usefixtures("loop_order")
def test_two_runs_agree_in_every_bit(backend: Any) -> None:
    layout = VarlenLayout.from_lengths([40, 3, 11], [40, 27, 11])
    inputs = random_inputs(layout, dtype=torch.float32)
    first, second = (run_ops(backend, inputs, layout, BLOCKS) for _ in range(2))
    assert_same_bits(rows_of(first, slice(None)), rows_of(second, slice(None)))
    once, twice = (backward(backend, inputs, layout, first.block_indices) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


def test_two_layouts_in_flight_keep_their_gradients_apart(backend: Any) -> None:
    """No state between forward and backward: another batch may run in between."""
    one, two = VarlenLayout.from_lengths([20, 10]), VarlenLayout.from_lengths([5, 25])
    inputs = random_inputs(one)
    indices = run_ops(backend, inputs, one, BLOCKS).block_indices
    alone = backward(backend, inputs, one, indices)
    leaves = inputs.leaves()
    out = run_ops(backend, leaves, one, BLOCKS, block_indices=indices).out
    run_ops(backend, inputs.leaves(), two, BLOCKS).out.sum().backward()
    out.backward(torch.arange(out.numel(), dtype=out.dtype).sin().reshape(out.shape))
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, alone, strict=True))


def test_forced_blocks_survive_scores_that_are_nan() -> None:
    layout, blocks = VarlenLayout.from_lengths([400]), BlockGeometry(topk=4)
    q, k_cmp = torch.full((400, 2, 8), torch.nan), torch.randn(24, 1, 8)
    indices = BACKENDS["sdpa"].select_blocks(q, k_cmp, torch.zeros(2, 400), layout, blocks)
    assert {0, 5, 6} <= set(indices[-1, 0].tolist())
    assert int(indices.max()) == 6


def test_a_score_that_is_nan_drops_no_block_whatever_its_sign() -> None:
    """inf - inf is NaN with its sign bit set on x86: as an integer below 0, where a block is no candidate."""
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    blocks, current = BlockGeometry(topk=6), torch.full((1, 1, 1), 5)
    for score in (*nan, torch.tensor(-0.0)):
        chosen = top_blocks(score.expand(1, 1, 1, 8), current, blocks)
        assert chosen.flatten().tolist() == [0, 1, 2, 3, 4, 5]
