"""Does the selected branch see the keys that its lists name, once each, whatever they look like?"""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_fa2 import attention, selected
from nsa_fa2.gathering import ByBlock, ByRow, gatherer
from nsa_fa2.testing import Case, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from torch import Tensor

OP = "selected_attention"
BLOCKS = BlockGeometry(2, 1, 4, 3, 0, 1, 3)
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 4, "v_head_dim": 3}
BATCHES = {
    "prefill": ([13], [13]),
    "uniform": ([5] * 3, [9] * 3),
    "ragged": ([9, 1, 5, 12], [9, 14, 21, 12]),
    "decode": ([1] * 4, [9, 4, 1, 17]),
    "empty": ([0, 3, 4, 0, 2], [5, 0, 7, 0, 1]),
    "more-queries": ([7, 3, 9], [2, 3, 4]),
    "no-keys": ([3, 2], [0, 0]),
    "no-queries": ([0, 0], [3, 9]),
    "no-sequence": ([], []),
}


# Bytes of workspace, and how keys are gathered: as the backend would have it, or in one of its ways.
WAYS = {
    "a-query-a-chunk-by-row": (1, ByRow),
    "small-chunks-by-block": (4_000, ByBlock),
    "one-chunk-by-row": (attention.WORKSPACE, ByRow),
    "as-it-comes": (attention.WORKSPACE, None),
}


@pytest.fixture(params=WAYS)
def _every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    go(WAYS[request.param], monkeypatch)


def go(way: tuple[int, type | None], patch: pytest.MonkeyPatch) -> None:
    workspace, gather = way
    patch.setattr(attention, "WORKSPACE", workspace)
    if gather is not None:
        patch.setattr(selected, "gatherer", lambda k, v, block_indices, *rest: gather(k, v, *rest))


def layout_of(batch: str) -> VarlenLayout:
    return VarlenLayout.from_lengths(*BATCHES[batch])


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("entries", [0, 1, 3, 9])
@pytest.mark.parametrize("batch", BATCHES)
def test_any_lists(batch: str, entries: int) -> None:
    """In any order, with duplicates, -1, blocks in the future and beyond the sequence; more entries than blocks."""
    for seed in range(2):
        case = Case.random(OP, layout_of(batch), BLOCKS, entries=entries, seed=seed, **HEADS)
        case.assert_oracles(plain_backend(), f"seed {seed}")


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("batch", BATCHES)
def test_the_lists_that_the_oracle_chooses(batch: str) -> None:
    layout = layout_of(batch)
    case = Case.random(OP, layout, BLOCKS, **HEADS)
    k_cmp = reference.compress_mean(case.k, layout, BLOCKS)
    _, lse = reference.compressed_attention(case.q, k_cmp, k_cmp, layout, BLOCKS)
    chosen = reference.select_blocks(case.q, k_cmp, lse, layout, BLOCKS)
    Case.random(OP, layout, BLOCKS, block_indices=chosen, **HEADS).assert_oracles(plain_backend())


def test_every_list_of_two_blocks_at_every_position() -> None:
    """One query at each of 13 positions for each pair of entries from -1 to 4, the last beyond the sequence."""
    lists = list(product(range(-1, 5), repeat=2))
    for k_len in range(13):
        layout = VarlenLayout.from_lengths([1] * len(lists), [k_len] * len(lists))
        indices = torch.tensor(lists, dtype=torch.int32)[:, None]
        sizes = {"heads": 1, "kv_heads": 1, "head_dim": 2}
        case = Case.random(OP, layout, BLOCKS, block_indices=indices, **sizes)
        case.assert_oracles(plain_backend(), f"k_len {k_len}")


SAME = {  # what names the same keys as [0, 2, 1]
    "order": [2, 1, 0],
    "duplicates": [0, 2, 2, 1, 0, 0, 2],
    "nothing": [-1, 0, -1, -1, 2, 1, -1],
    "negative": [-7, 0, 1, 2, torch.iinfo(torch.int32).min],
    "future": [4, 0, 1, 3, 2],
    "beyond": [0, 1, 5, 2, 99, torch.iinfo(torch.int32).max],
    "all": [-1, 99, 2, 0, 2, 5, 1, 1, -2],
}


@pytest.mark.parametrize("spelling", SAME)
def test_a_list_is_a_set(spelling: str) -> None:
    """Of blocks up to the query's own. Query at position 10, in block 2 of 5: the bits do not differ."""
    layout = VarlenLayout.from_lengths([10], [20])
    first = Case.random(OP, layout, BLOCKS, entries=3, **HEADS)
    rows = {}
    for name, entries in {"plain": [0, 2, 1], spelling: SAME[spelling]}.items():
        indices = torch.tensor(entries, dtype=torch.int32).expand(10, 2, -1)
        rows[name] = getattr(plain_backend(), OP)(*first[1:4], indices, layout, BLOCKS)
    for x, y in zip(*rows.values(), strict=True):
        x, y = (part[0] if part.ndim == 3 else part[:, 0] for part in (x, y))  # the query at position 10
        assert torch.equal(x, y)


def test_heads_choose_for_themselves() -> None:
    layout = VarlenLayout.from_lengths([1], [12])
    indices = torch.tensor([[[0, -1], [2, 1]]], dtype=torch.int32)
    q, k = torch.zeros(1, 4, 2), torch.zeros(12, 2, 2)
    v = torch.arange(12.0)[:, None, None].expand(12, 2, 1).contiguous()
    out, lse = plain_backend().selected_attention(q, k, v, indices, layout, BLOCKS)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5, 1.5, 7.5, 7.5]))
    torch.testing.assert_close(lse.flatten().exp(), torch.tensor([4.0, 4.0, 8.0, 8.0]))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_heads(group: int) -> None:
    for kv_heads in (1, 3):
        sizes = {"heads": group * kv_heads, "kv_heads": kv_heads, "head_dim": 3}
        Case.random(OP, layout_of("ragged"), BLOCKS, **sizes).assert_oracles(plain_backend(), f"{kv_heads} kv heads")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    stride, steps, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    steps = max(steps, width)
    blocks = BlockGeometry(width * stride, stride, steps * stride, 3)
    lengths = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), max_size=4))
    layout = VarlenLayout.from_lengths([q_len for q_len, _ in lengths], [k_len for _, k_len in lengths])
    kv_heads, entries = draw(st.integers(1, 2)), draw(st.integers(0, 6))
    size = layout.total_q, kv_heads, entries
    number = layout.total_q * kv_heads * entries
    values = draw(st.lists(st.integers(-2, 42), min_size=number, max_size=number))
    indices = torch.tensor(values, dtype=torch.int32).reshape(size)
    sizes = {"heads": kv_heads * draw(st.integers(1, 3)), "kv_heads": kv_heads, "head_dim": 3, "v_head_dim": 2}
    return Case.random(OP, layout, blocks, block_indices=indices, seed=draw(st.integers(0, 999)), **sizes)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(case=cases(), way=st.sampled_from(list(WAYS)))
def test_any_lists_at_all(case: Case, way: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        go(WAYS[way], patch)
        case.assert_oracles(plain_backend())


def test_many_queries_are_gathered_by_block_few_by_row() -> None:
    """Lists as long as there are blocks are the turning point: here 2 heads of 3 blocks, and one for the division."""
    layout = VarlenLayout.from_lengths([2], [12])
    k, v = torch.zeros(12, 2, 4), torch.zeros(12, 2, 4)
    for entries, way in ((1, ByRow), (2, ByBlock)):
        indices = torch.zeros(2, 2, entries, dtype=torch.int32)
        assert type(gatherer(k, v, indices, layout, BLOCKS)) is way


def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    go(WAYS["small-chunks-by-block"], monkeypatch)
    layout = VarlenLayout.from_lengths([2, 1, 1, 2], [2, 5, 0, 1])
    case = Case.random(OP, layout, BLOCKS, entries=3, heads=4, kv_heads=2, head_dim=2, v_head_dim=1)

    def out(*qkv: Tensor) -> Any:
        return getattr(plain_backend(), OP)(*qkv, *case.rest, scale=0.7)[0]

    assert torch.autograd.gradcheck(out, tuple(x.requires_grad_() for x in case[1:4]))


def test_scale() -> None:
    case = Case.random(OP, layout_of("ragged"), BLOCKS, **HEADS)
    case.assert_oracles(plain_backend(), scale=0.1)
    plain, scaled = (getattr(plain_backend(), OP)(*case[1:4], *case.rest, scale=scale)[1] for scale in (None, 0.1))
    assert not torch.equal(plain, scaled)
