"""Selected attention in both organisations against the oracle, over lists of blocks as anybody may write them."""

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.ops import selected, spread
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import assert_within_budget, plain_attention, poisoned_empty, random_inputs
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves"),
]

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5)
RAGGED = [35, 0, 3, 20, 9], [35, 5, 130, 20, 4]  # whole, empty, prefixed, more queries than keys
ORGANISATIONS = {
    "by-query": {"by_block": 0, "tma": 0, "rows": 16, "keys": 16},
    "by-block": {"by_block": 1, "tma": 0, "rows": 16, "chunk_rows": 96, "programs": 2, "turns": 2},
}
DESCRIBED = {
    "by-query": ORGANISATIONS["by-query"] | {"tma": 1},
    "by-block": ORGANISATIONS["by-block"] | {"tma": 1},
}
FP32 = 5e-5  # the project's bound for fp32 kernels at unit-scale inputs


@pytest.fixture(params=ORGANISATIONS)
def organisation(request: pytest.FixtureRequest):
    with configurations.overridden("selected_attention", **ORGANISATIONS[request.param]):
        yield request.param


def listed(layout: VarlenLayout, heads: int, entries: int, blocks: BlockGeometry, seed: int = 0) -> Tensor:
    """Entries in any order: blocks of the sequence and beyond it, negative ones, some twice."""
    generator = torch.Generator().manual_seed(seed)
    most = blocks.num_blocks(layout.max_seqlen_k) + 1
    return torch.randint(-2, most, (layout.total_q, heads, entries), generator=generator, dtype=torch.int32)


def check(layout: VarlenLayout, heads: int, kv_heads: int, dims: tuple[int, int], entries: int, blocks=BLOCKS) -> None:
    inputs = random_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=dims[0], v_head_dim=dims[1])
    indices = listed(layout, kv_heads, entries, blocks)
    out, lse = reference.selected_attention(inputs.q, inputs.k, inputs.v, indices, layout, blocks)
    with poisoned_empty():
        found, found_lse = BACKEND.selected_attention(*inputs.to(torch.float32)[:3], indices, layout, blocks)
    torch.testing.assert_close(found.double(), out, rtol=0, atol=FP32)
    torch.testing.assert_close(found_lse.double(), lse, rtol=0, atol=FP32)  # -inf where the oracle's is


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1), pytest.param(16, 1, marks=pytest.mark.slow)])
def test_any_list_over_a_ragged_batch(heads: int, kv_heads: int) -> None:
    check(VarlenLayout.from_lengths(*RAGGED), heads, kv_heads, (24, 40), entries=6)


@pytest.mark.parametrize("dims", [(64, 128), (16, 32)], ids=str)
@pytest.mark.parametrize("lengths", [([40, 12], [40, 100]), RAGGED], ids=["two", "ragged"])
@pytest.mark.parametrize("numbers", DESCRIBED.values(), ids=DESCRIBED)
def test_descriptors(numbers: dict[str, int], lengths: tuple[list[int], list[int]], dims: tuple[int, int]) -> None:
    """Where the copy engine could load k and v: heads side by side, whose width is a power of two.

    By query it does not where it would put rows of k and of v otherwise than their padded tiles lie.
    """
    with configurations.overridden("selected_attention", **numbers):
        check(VarlenLayout.from_lengths(*lengths), 4, 2, dims, entries=4)


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("dims", [(8, 8), (96, 16), (16, 72)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(VarlenLayout.from_lengths([33, 2], [70, 2]), 2, 1, dims, entries=3)


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("entries", [1, 7])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_sizes_and_counts(block_size: int, entries: int) -> None:
    blocks = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=block_size)
    check(VarlenLayout.from_lengths([9, 8], [300, 170]), 2, 1, (16, 16), entries, blocks)


@pytest.mark.parametrize("lengths", [([0], [0]), ([1], [1]), ([4], [0]), ([1, 1], [90, 64]), ([], [])])
@pytest.mark.usefixtures("organisation")
def test_small_batches(lengths: tuple[list[int], list[int]]) -> None:
    check(VarlenLayout.from_lengths(*lengths), 2, 1, (16, 16), entries=2)


def test_a_group_of_64_fits_any_tile() -> None:
    check(VarlenLayout.from_lengths([5], [70]), 64, 1, (16, 16), entries=3)


@pytest.mark.usefixtures("organisation")
def test_no_entries_see_nothing() -> None:
    layout = VarlenLayout.from_lengths([3], [40])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = torch.empty(3, 2, 0, dtype=torch.int32)
    out, lse = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.usefixtures("organisation")
def test_half_precision_within_its_budget() -> None:
    layout = VarlenLayout.from_lengths([60, 10], [60, 100])
    inputs = random_inputs(layout, heads=4, kv_heads=2, head_dim=32, dtype=torch.float16)
    indices = listed(layout, 2, 4, BLOCKS)
    with poisoned_empty():
        found, _ = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    exact, _ = reference.selected_attention(*inputs.to(torch.float64)[:3], indices, layout, BLOCKS)
    assert_within_budget(found, plain_attention(*inputs[:3], masks.selected_mask(indices, layout, BLOCKS)), exact)


@pytest.mark.usefixtures("organisation")
def test_strided_inputs() -> None:
    layout = VarlenLayout.from_lengths([20], [50])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = listed(layout, 2, 3, BLOCKS)
    expected = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    unusual = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    for given in (strided, unusual):
        found = BACKEND.selected_attention(*given, indices.transpose(0, 1).contiguous().transpose(0, 1), layout, BLOCKS)
        assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")  # numpy's, of the rows that do hold NaN
@pytest.mark.parametrize("keys", [40, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("name", ORGANISATIONS)
def test_keys_of_other_sequences_do_not_matter(name: str, tma: int, keys: int) -> None:
    """NaN there would show: 0 * NaN is NaN. The last block is not full, and of 9 keys not even a tile."""
    layout = VarlenLayout.from_lengths([10, 10, 10], [keys] * 3)
    inputs = random_inputs(layout, head_dim=16, dtype=torch.float32)
    indices = listed(layout, 2, 4, BLOCKS)
    with configurations.overridden("selected_attention", **ORGANISATIONS[name] | {"tma": tma}):
        expected, _ = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
        k, v = inputs.k.clone(), inputs.v.clone()
        for x in (k, v):
            x[:keys] = torch.nan
            x[2 * keys :] = torch.nan
        found, _ = BACKEND.selected_attention(inputs.q, k, v, indices, layout, BLOCKS)
    assert torch.equal(found[10:20], expected[10:20])
    assert bool(found[10:20].any())


def test_chunks_change_nothing(organisation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = VarlenLayout.from_lengths(*RAGGED)
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = listed(layout, 2, 5, BLOCKS)
    expected = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    monkeypatch.setattr("nsa_kernels_triton.ops.by_query.LISTS", 1)  # one tile at a time
    monkeypatch.setattr("nsa_kernels_triton.ops.by_block.PARTS", 1)
    found = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("organisation")
def test_what_others_choose_does_not_matter() -> None:
    layout = VarlenLayout.from_lengths([64])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = listed(layout, 2, 4, BLOCKS)
    expected, _ = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS)
    fewer = indices.clone()
    fewer[1::2] = -1
    found, _ = BACKEND.selected_attention(*inputs[:3], fewer, layout, BLOCKS)
    torch.testing.assert_close(found[::2], expected[::2], rtol=0, atol=FP32)
    assert (found[1::2] == 0).all()


def samples(indices: Tensor, layout: VarlenLayout) -> int:
    spread._known.clear()
    known = spread.spread_of(indices, BLOCKS.block_size)
    assert known.percent == spread.UNKNOWN  # the first call learns nothing yet
    known.measure(indices, layout.cu_seqlens_q, layout.cu_seqlens_k, BLOCKS.block_size)
    return spread.spread_of(indices, BLOCKS.block_size).percent


def test_spread_counts_distinct_blocks_of_neighbours() -> None:
    layout = VarlenLayout.from_lengths([64], [32 * 64])
    same = torch.arange(4, dtype=torch.int32).expand(64, 2, 4).contiguous()
    assert samples(same, layout) == 100
    apart = same + 4 * (torch.arange(64, dtype=torch.int32) % 8)[:, None, None]
    assert samples(apart, layout) == 800


def test_a_rule_by_spread_is_obeyed_unless_results_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"num_warps": 4, "num_stages": 1, "rows": 16}
    rules = [
        {"up_to": {"spread": 200}, "by_block": 0, "tma": 0, "keys": 16, **common},
        {"by_block": 1, "tma": 0, "chunk_rows": 96, "programs": 1, "turns": 2, **common},
    ]
    table = configurations.table("sm90") | {"selected_attention": rules}
    monkeypatch.setattr(configurations, "table", lambda name: table)
    taken: list[str] = []
    for name in ("by_block", "by_query"):
        monkeypatch.setattr(selected, name, lambda call, config, name=name: taken.append(name))
    layout = VarlenLayout.from_lengths([64], [32 * 64])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = torch.arange(4, dtype=torch.int32).expand(64, 2, 4).contiguous()
    spread._known.clear()
    for deterministic in (False, False, True):
        BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS, deterministic=deterministic)
    assert taken == ["by_block", "by_query", "by_block"]


@pytest.mark.usefixtures("organisation")
@pytest.mark.parametrize("entry", [2**25, 2**26, 2**26 + 1, 2**30, 2**31 - 1, -(2**31)])
def test_entries_of_any_size_are_ignored(entry: int) -> None:
    """64 * 2^26 is 0 in 32 bits: such an entry must not become block 0."""
    blocks = BlockGeometry()
    layout = VarlenLayout.from_lengths([3], [200])
    inputs = random_inputs(layout, heads=2, kv_heads=1, head_dim=16)
    indices = torch.tensor([1, entry, -1], dtype=torch.int32).expand(3, 1, 3).contiguous()
    found = BACKEND.selected_attention(*inputs.to(torch.float32)[:3], indices, layout, blocks)
    exact = reference.selected_attention(*inputs[:3], indices, layout, blocks)
    for got, right in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=FP32)


@pytest.mark.usefixtures("organisation")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_logits_that_overflow_are_no_nan() -> None:
    """-1e20 * 1e20 is -inf in fp32: a block of such logits weighs nothing."""
    layout = VarlenLayout.from_lengths([2], [200])
    q, k, v, _ = random_inputs(layout, heads=1, kv_heads=1, head_dim=16, dtype=torch.float32)
    q[:], k[32:64] = 1e20, -1e20
    k[:32], k[64:] = 0.0, 0.0
    indices = torch.tensor([1, 6], dtype=torch.int32).expand(2, 1, 2).contiguous()
    out, _ = BACKEND.selected_attention(q, k, v, indices, layout, BLOCKS)
    exact, _ = reference.selected_attention(q, k, v, indices, layout, BLOCKS)
    torch.testing.assert_close(out, exact, rtol=0, atol=FP32)


def test_a_scale_below_what_fp32_holds_is_uniform() -> None:
    layout = VarlenLayout.from_lengths([40])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = torch.zeros(40, 2, 1, dtype=torch.int32)
    out, _ = BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS, scale=1e-46)
    exact, _ = reference.selected_attention(*inputs[:3], indices, layout, BLOCKS, scale=1e-46)
    torch.testing.assert_close(out, exact, rtol=0, atol=FP32)


def test_parts_take_no_more_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = VarlenLayout.from_lengths([64])
    inputs = random_inputs(layout, dtype=torch.float32)
    indices = listed(layout, 2, 8, BLOCKS)
    most = 8 * 2 * 9 * (8 * 4 + 4)  # a tile's: 8 queries of 2 heads, 8 entries and the near ones, 8 values and an LSE
    monkeypatch.setattr("nsa_kernels_triton.ops.by_block.PARTS", most)
    asked: list[int] = []
    make = torch.Tensor.new_empty

    def noted(self: Tensor, *size: int, **kwargs: object) -> Tensor:
        made = make(self, *size, **kwargs)
        asked.append(made.nbytes if made.dim() > 2 and made.is_floating_point() else 0)
        return made

    with configurations.overridden("selected_attention", **ORGANISATIONS["by-block"] | {"chunk_rows": 1 << 20}):
        monkeypatch.setattr(torch.Tensor, "new_empty", noted)
        BACKEND.selected_attention(*inputs[:3], indices, layout, BLOCKS, deterministic=True)
    results = 64 * 4 * 8 * 4
    assert sorted(asked)[-1] == results
    assert sum(sorted(asked)[:-1]) <= most


def test_a_sample_that_another_thread_takes_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = VarlenLayout.from_lengths([64])
    same = torch.arange(2, dtype=torch.int32).expand(64, 2, 2).contiguous()
    spread._known.clear()
    known = spread.spread_of(same, BLOCKS.block_size)
    known.measure(same, layout.cu_seqlens_q, layout.cu_seqlens_k, BLOCKS.block_size)
    assert known.pending is not None

    def taken(self: object) -> bool:
        known.pending = None  # as if another thread had come first
        return True

    monkeypatch.setattr(spread._Arrived, "query", taken)
    assert spread.spread_of(same, BLOCKS.block_size).percent == 100


@pytest.mark.parametrize("long, samples_taken", [(64, 3), (65, 1)])
def test_long_calls_are_sampled_every_time(long: int, samples_taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "LONG", long)
    taken: list[int] = []
    sample = spread._sample
    monkeypatch.setattr(spread, "_sample", lambda *args: taken.append(1) or sample(*args))
    layout = VarlenLayout.from_lengths([64])
    same = torch.arange(2, dtype=torch.int32).expand(64, 2, 2).contiguous()
    spread._known.clear()
    for _ in range(3):
        known = spread.spread_of(same, BLOCKS.block_size)
        known.measure(same, layout.cu_seqlens_q, layout.cu_seqlens_k, BLOCKS.block_size)
    assert len(taken) == samples_taken


def test_more_entries_than_are_sorted_at_once_are_refused() -> None:
    layout = VarlenLayout.from_lengths([4])
    inputs = random_inputs(layout, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs topk up to 256, got 257"):
        BACKEND.selected_attention(*inputs[:3], torch.zeros(4, 2, 257, dtype=torch.int32), layout, BLOCKS)
