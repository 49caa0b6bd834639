"""Does every query appear in the calls once, and does it see there what its mask says? Every (q_len, k_len).

Nothing is computed here but who sees whom; `test_branches` runs attention over a part of the same batches.
Geometries are small, and lengths go past four times l + d: every way in which a row of the fold can begin and end.
"""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from nsa_fa2 import branches
from nsa_fa2.branches import Branch, Part, Spans, compressed_branch, is_uniform, window_branch
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from torch import Tensor

Kind = tuple[int, int]  # q_len, k_len
SIZES = [(1, 1), (3, 1), (2, 2), (4, 2), (3, 3), (6, 3)]  # l and d
GEOMETRIES = {f"l{size}-d{stride}": BlockGeometry(size, stride, size * stride, 3) for size, stride in SIZES}
WINDOWS = {f"w{w}": BlockGeometry(2, 2, 2, 3, window_size=w) for w in (1, 2, 5, 30)}


def lengths_of(blocks: BlockGeometry) -> range:
    return range(4 * (blocks.kernel_size + blocks.kernel_stride) + 1)


def kinds_of(blocks: BlockGeometry) -> list[Kind]:
    """All of them, more queries than keys included."""
    return list(product(lengths_of(blocks), repeat=2))


def layout_of(kinds: list[Kind]) -> VarlenLayout:
    return VarlenLayout.from_lengths(*(list(side) for side in zip(*kinds, strict=True)))


def number_of_keys(position: int, blocks: BlockGeometry) -> int:
    """Blocks i with i*d + l - 1 <= t, counted."""
    number = 0
    while number * blocks.kernel_stride + blocks.kernel_size - 1 <= position:
        number += 1
    return number


@pytest.mark.parametrize("name", GEOMETRIES)
def test_spans_tell_how_many_blocks_each_query_sees(name: str) -> None:
    blocks = GEOMETRIES[name]
    d, kinds = blocks.kernel_stride, kinds_of(blocks)
    spans = Spans.of(*torch.tensor(kinds).T, blocks)
    for (q_len, k_len), *span in zip(kinds, *(x.tolist() for x in spans), strict=True):
        blind, head, rows, tail, head_keys, row_keys, tail_keys = span
        told = [0] * blind + [head_keys] * head
        told += [row_keys - rows + 1 + row for row in range(rows) for _ in range(d)] + [tail_keys] * tail
        assert told == [number_of_keys(k_len - q_len + i, blocks) for i in range(q_len)], (q_len, k_len)
        assert head < d
        assert tail < d


def test_lengths_reach_every_way_a_row_can_begin_and_end() -> None:
    """Whether there are queries that see nothing, any head, none to two whole rows, any tail."""
    for blocks in GEOMETRIES.values():
        d = blocks.kernel_stride
        spans = Spans.of(*torch.tensor(kinds_of(blocks)).T, blocks)
        ways = set(zip((spans.blind > 0).tolist(), *(x.clamp_max(2).tolist() for x in spans[1:4]), strict=True))
        sizes = range(min(d, 3))
        # Queries that see nothing come before the first row, which has no head then.
        assert ways == {way for way in product((False, True), sizes, range(3), sizes) if not (way[0] and way[1])}
        if d == 3:
            assert (False, 0, 0, 2) in ways  # no head, no row: a tail of two, which see the same blocks


def pairs_of(part: Part, total_q: int, total_k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers [..., n] and key numbers [..., m] of each sequence and head of a call: it gets them as values."""
    rows = part.queries.queries(torch.arange(total_q)[:, None, None])[..., 0]
    keys = part.keys.keys(torch.arange(total_k)[:, None, None], part.queries.phases)[..., 0]
    if part.segments is None:
        yield rows.mT, keys.mT
        return
    sizes = [x.diff().tolist() for x in part.segments[:2]]
    assert max(sizes[0]) <= part.segments.longest_q <= max(2, *sizes[0])
    assert max(sizes[1]) == part.segments.longest_k
    for q, k in zip(rows.split(sizes[0]), keys.split(sizes[1]), strict=True):
        yield q.mT, k.mT


def looked_at(branch: Branch, total_q: int, total_k: int) -> tuple[Tensor, Tensor]:
    """How often each query has a place in a call [Tq], and how often it sees each key [Tq, Tk]."""
    visits, sees = torch.zeros(total_q, dtype=torch.int), torch.zeros(total_q, total_k, dtype=torch.int)
    for part in branch.parts:
        for rows, keys in pairs_of(part, total_q, total_k):
            behind = rows.shape[-1] - keys.shape[-1]
            ahead = torch.arange(keys.shape[-1]) - torch.arange(rows.shape[-1])[:, None] + behind
            seen = torch.ones_like(ahead, dtype=torch.bool) if not part.causal else ahead <= 0
            if part.window is not None:
                seen = seen & (ahead > -part.window)
            visits.index_put_((rows,), torch.ones((), dtype=torch.int), accumulate=True)
            sees.index_put_((rows[..., None], keys[..., None, :]), seen.int(), accumulate=True)
    return visits, sees


def blind_rows(branch: Branch, total_q: int) -> Tensor:
    blind = torch.zeros(total_q, 1)
    if branch.blind is not None:
        branch.blind.fill(blind, 1.0)
    return blind[:, 0].bool()


def check(branch: Branch, layout: VarlenLayout, mask: Tensor, note: object) -> None:
    visits, sees = looked_at(branch, *mask.shape)
    assert torch.equal(sees, mask.int()), note
    assert torch.equal(blind_rows(branch, layout.total_q), ~mask.any(1)), note
    assert (visits[mask.any(1)] == 1).all(), note
    assert (visits <= 1).all(), note
    if branch.whole:
        assert len(branch.parts) == 1, note
        rows = torch.cat([rows.flatten() for rows, _ in pairs_of(branch.parts[0], *mask.shape)])
        assert torch.equal(rows, torch.arange(layout.total_q)), note


def check_compressed(kinds: list[Kind], blocks: BlockGeometry) -> None:
    """Phases of a single sequence as a batch, and as heads; of others there is one way."""
    layout = layout_of(kinds)
    for apart in (True, False) if len(kinds) == 1 else (True,):
        branch = compressed_branch(layout, blocks, apart=apart)
        check(branch, layout, masks.compressed_mask(layout, blocks), kinds)
        assert all((part.segments is None) == is_uniform(layout) for part in branch.parts), kinds


def check_window(kinds: list[Kind], blocks: BlockGeometry) -> None:
    layout = layout_of(kinds)
    check(window_branch(layout, blocks), layout, masks.window_mask(layout, blocks), kinds)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_uniform_compressed(name: str) -> None:
    for kind, size in product(kinds_of(GEOMETRIES[name]), (1, 2, 3)):
        check_compressed([kind] * size, GEOMETRIES[name])


@pytest.mark.parametrize("name", WINDOWS)
def test_uniform_window(name: str) -> None:
    for kind, size in product(product(range(9), repeat=2), (1, 2, 3)):
        check_window([kind] * size, WINDOWS[name])


def different(blocks: BlockGeometry) -> list[Kind]:
    """A kind for every way in which the queries fall apart and for no keys, no queries, no blocks."""
    ways: dict[tuple[int, ...], Kind] = {}
    for q_len, k_len in kinds_of(blocks):
        spans = Spans.of(torch.tensor(q_len), torch.tensor(k_len), blocks)
        numbers = [int(x) for x in spans[1:4]]
        way = (int(spans.blind > 0), *(min(2, x) for x in numbers), min(1, q_len), blocks.num_compressed(k_len) > 0)
        ways.setdefault(way, (q_len, k_len))
    return list(ways.values())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ragged_compressed_of_every_two(name: str) -> None:
    blocks = GEOMETRIES[name]
    for kinds in product(different(blocks), repeat=2):
        check_compressed(list(kinds), blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ragged_compressed_of_every_seventh_three(name: str) -> None:
    blocks = GEOMETRIES[name]
    for kinds in list(product(different(blocks), repeat=3))[::7]:
        check_compressed(list(kinds), blocks)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ragged_compressed_of_many(name: str) -> None:
    """Every kind, 16 to a batch; a step that no length divides mixes them."""
    blocks, kinds = GEOMETRIES[name], kinds_of(GEOMETRIES[name])
    mixed = [kinds[number * 7919 % len(kinds)] for number in range(len(kinds))]
    assert set(mixed) == set(kinds)
    for start in range(0, len(mixed), 16):
        check_compressed(mixed[start : start + 16], blocks)


@pytest.mark.parametrize("name", WINDOWS)
def test_ragged_window_of_every_two(name: str) -> None:
    kinds = [(0, 0), (0, 4), (3, 0), (1, 1), (1, 6), (4, 4), (3, 7), (6, 6), (5, 2)]
    for pair in product(kinds, repeat=2):
        check_window(list(pair), WINDOWS[name])


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_call_has_more_sequences_than_a_grid(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "MAX_SEQUENCES", most)
    blocks, window = GEOMETRIES["l6-d3"], WINDOWS["w5"]
    ragged = [(1, 9), (20, 20), (0, 7), (5, 14), (9, 3), (4, 30), (11, 11)]
    for kinds in (ragged, [(14, 23)] * 5, [(1, 23)] * 4, [(9, 7)] * 4):
        layout = layout_of(kinds)
        for branch in (compressed_branch(layout, blocks), window_branch(layout, window)):
            sizes = [
                part.queries.batch if part.segments is None else len(part.segments.offsets_q) - 1
                for part in branch.parts
            ]
            assert max(sizes) == most
            assert branch.whole is False
        check_compressed(kinds, blocks)
        check_window(kinds, window)


def test_an_empty_batch_has_no_calls() -> None:
    for kinds in ([(0, 0)], [(0, 9), (0, 3)], [(3, 0), (2, 0)], [(0, 5)]):
        layout = layout_of(kinds)
        assert compressed_branch(layout, GEOMETRIES["l4-d2"]).parts == ()
    layout = VarlenLayout.from_lengths([])
    assert compressed_branch(layout, GEOMETRIES["l4-d2"]).parts == ()
    assert window_branch(layout, WINDOWS["w5"]).parts == ()


def test_plans_are_made_once() -> None:
    layout, blocks = layout_of([(3, 9), (4, 4)]), GEOMETRIES["l4-d2"]
    assert compressed_branch(layout, blocks) is compressed_branch(layout, blocks)
    assert window_branch(layout, blocks) is window_branch(layout, blocks)
    assert window_branch(layout, blocks) is not window_branch(layout, WINDOWS["w5"])
    assert compressed_branch(layout, blocks) is not compressed_branch(layout, GEOMETRIES["l6-d3"])
