"""Are the dense masks the definitions, token by token?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import BlockGeometry, VarlenLayout, masks

GEOMETRIES = [
    BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=3, window_size=5),
    BlockGeometry(kernel_size=2, kernel_stride=2, block_size=6, topk=4, init_blocks=2, window_size=1),
    BlockGeometry(kernel_size=3, kernel_stride=1, block_size=3, topk=2, init_blocks=0, local_blocks=1, window_size=40),
]
LENGTHS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 14)), min_size=1, max_size=3)
PROFILE = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def tokens(lengths: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(sequence, position) of every query and every key."""
    queries = [(b, k - q + i) for b, (q, k) in enumerate(lengths) for i in range(q)]
    return queries, [(b, s) for b, (_, k) in enumerate(lengths) for s in range(k)]


def layout_of(lengths: list[tuple[int, int]]) -> VarlenLayout:
    return VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])


def assert_mask(mask: torch.Tensor, expected: list) -> None:
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@PROFILE
@given(LENGTHS)
def test_causal(lengths: list[tuple[int, int]]) -> None:
    queries, keys = tokens(lengths)
    assert_mask(masks.causal_mask(layout_of(lengths)), [[b == c and s <= t for c, s in keys] for b, t in queries])


@pytest.mark.parametrize("blocks", GEOMETRIES)
@PROFILE
@given(lengths=LENGTHS)
def test_window(blocks: BlockGeometry, lengths: list[tuple[int, int]]) -> None:
    queries, keys = tokens(lengths)
    expected = [[b == c and t - blocks.window_size < s <= t for c, s in keys] for b, t in queries]
    assert_mask(masks.window_mask(layout_of(lengths), blocks), expected)


@pytest.mark.parametrize("blocks", GEOMETRIES)
def test_the_window_has_exactly_w_keys(blocks: BlockGeometry) -> None:
    seen = masks.window_mask(VarlenLayout.from_lengths([50]), blocks).sum(1).tolist()
    assert seen == [min(t + 1, blocks.window_size) for t in range(50)]


@pytest.mark.parametrize("blocks", GEOMETRIES)
@PROFILE
@given(lengths=LENGTHS)
def test_compressed(blocks: BlockGeometry, lengths: list[tuple[int, int]]) -> None:
    queries, _ = tokens(lengths)
    size, stride = blocks.kernel_size, blocks.kernel_stride
    complete = [(b, i) for b, (_, k) in enumerate(lengths) for i in range(k) if i * stride + size <= k]
    expected = [[b == c and i * stride + size - 1 <= t for c, i in complete] for b, t in queries]
    assert_mask(masks.compressed_mask(layout_of(lengths), blocks), expected)


@pytest.mark.parametrize("blocks", GEOMETRIES)
@PROFILE
@given(lengths=LENGTHS, data=st.data())
def test_selected(blocks: BlockGeometry, lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    queries, keys = tokens(lengths)
    entry = st.lists(st.lists(st.integers(-1, 8), min_size=3, max_size=3), min_size=2, max_size=2)
    chosen = data.draw(st.lists(entry, min_size=len(queries), max_size=len(queries)))
    indices = torch.tensor(chosen, dtype=torch.int32).reshape(len(queries), 2, 3)
    expected = [
        [[b == c and s <= t and s // blocks.block_size in listed for c, s in keys] for listed in heads]
        for (b, t), heads in zip(queries, chosen, strict=True)
    ]
    assert_mask(masks.selected_mask(indices, layout_of(lengths), blocks), expected)


@pytest.mark.parametrize("blocks", GEOMETRIES)
@PROFILE
@given(lengths=LENGTHS)
def test_candidates_and_forced_blocks(blocks: BlockGeometry, lengths: list[tuple[int, int]]) -> None:
    queries, _ = tokens(lengths)
    longest = max(k for _, k in lengths)
    candidates, forced = [], []
    for _, t in queries:
        touched = [j for j in range(-(-longest // blocks.block_size)) if j * blocks.block_size <= t]
        must = [j for j in touched if j < blocks.init_blocks] + touched[-blocks.local_blocks :]
        candidates.append([j in touched for j in range(-(-longest // blocks.block_size))])
        forced.append([j in must for j in range(-(-longest // blocks.block_size))])
    got = masks.candidate_blocks(layout_of(lengths), blocks)
    assert_mask(got[0], candidates)
    assert_mask(got[1], forced)


def test_a_decode_query_sees_its_whole_prefix_not_only_key_0() -> None:
    assert masks.causal_mask(VarlenLayout.from_lengths([1], [5])).tolist() == [[True] * 5]
