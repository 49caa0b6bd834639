"""Is the oracle the paper? Every operation against scalar loops over tokens, written from the equations."""

import math
from dataclasses import dataclass

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, reference, unfold_blocks
from nsa_varlen.sdpa._selection import stencil
from nsa_varlen.testing import random_inputs, run_ops

# Whole prefill with a partial tail, chunked prefill, decode, more queries than keys, no queries, no keys.
QUERIES, KEYS = [13, 3, 1, 4, 0, 2], [13, 11, 12, 2, 5, 0]
LAYOUT = VarlenLayout.from_lengths(QUERIES, KEYS)
GEOMETRIES = [
    BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=3, local_blocks=1, window_size=5),
    BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3, window_size=1),
    BlockGeometry(kernel_size=3, kernel_stride=3, block_size=3, topk=2, init_blocks=0, local_blocks=1, window_size=99),
]
SIZES = [(1, 1), (2, 1), (6, 2)]  # query heads, kv heads
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # fp64, some 50 operations on values around 1: 50 * 2^-53 * 10 < 1e-13


@dataclass(frozen=True)
class Query:
    """One query: its sequence and position, and the first packed key and compressed block of that sequence."""

    row: int
    sequence: int
    position: int
    first_key: int
    first_cmp: int


def queries(blocks: BlockGeometry) -> list[Query]:
    found, first_key, first_cmp = [], 0, 0
    for sequence, (q_len, k_len) in enumerate(zip(QUERIES, KEYS, strict=True)):
        for i in range(q_len):
            found.append(Query(len(found), sequence, k_len - q_len + i, first_key, first_cmp))
        first_key += k_len
        first_cmp += len(complete_blocks(k_len, blocks))
    return found


def complete_blocks(length: int, blocks: BlockGeometry) -> list[range]:
    """Tokens of each compressed block that `length` tokens complete."""
    starts = range(0, length, blocks.kernel_stride)
    return [range(s, s + blocks.kernel_size) for s in starts if s + blocks.kernel_size <= length]


def attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float) -> tuple[list, float]:
    """softmax(scale * q.k) v and the natural log of the sum of exponentials, for one query head."""
    if not keys:
        return [0.0] * values_dim(values), -math.inf
    terms = [math.exp(scale * sum(a * b for a, b in zip(q.tolist(), k.tolist(), strict=True))) for k in keys]
    weighted = zip(*[[term * x for x in v.tolist()] for term, v in zip(terms, values, strict=True)], strict=True)
    return [sum(column) / sum(terms) for column in weighted], math.log(sum(terms))


def values_dim(values: list[torch.Tensor], dim: int = 5) -> int:
    return len(values[0]) if values else dim


def probabilities(q: torch.Tensor, keys: list[torch.Tensor], scale: float) -> list[float]:
    terms = [math.exp(scale * float(q @ k)) for k in keys]
    return [term / sum(terms) for term in terms]


def visible_blocks(query: Query, blocks: BlockGeometry) -> list[range]:
    return [block for block in complete_blocks(KEYS[query.sequence], blocks) if block[-1] <= query.position]


def scores(query: Query, heads: list[torch.Tensor], k_cmp: list[torch.Tensor], blocks: BlockGeometry) -> list[float]:
    """Eq. 9 and 10 by counting shared tokens: one score per block of the query's sequence."""
    total = [0.0] * -(-KEYS[query.sequence] // blocks.block_size)
    visible = visible_blocks(query, blocks)
    for q in heads:
        for p, tokens in zip(probabilities(q, k_cmp[: len(visible)], q.numel() ** -0.5), visible, strict=True):
            for token in tokens:
                total[token // blocks.block_size] += p / blocks.kernel_stride
    return total


@pytest.fixture(params=GEOMETRIES, ids=["overlapping", "dense", "disjoint"])
def blocks(request: pytest.FixtureRequest) -> BlockGeometry:
    return request.param


@pytest.fixture(params=SIZES, ids=["g1", "g2", "g3-hk2"])
def sizes(request: pytest.FixtureRequest) -> dict[str, int]:
    return {"heads": request.param[0], "kv_heads": request.param[1], "head_dim": 3, "v_head_dim": 5}


def assert_attention(got: tuple[torch.Tensor, torch.Tensor], expected: list[tuple[list, float]], heads: int) -> None:
    """`expected` lists (out, lse) of each query, head by head."""
    out = torch.tensor([o for o, _ in expected], dtype=torch.float64).reshape(-1, heads, 5)
    lse = torch.tensor([x for _, x in expected], dtype=torch.float64).reshape(-1, heads).T
    torch.testing.assert_close(got[0], out, **ROUNDING)
    torch.testing.assert_close(got[1], lse, **ROUNDING)


def test_compress_mean(blocks: BlockGeometry) -> None:
    x = random_inputs(LAYOUT, head_dim=3).k
    expected, first = [], 0
    for length in KEYS:
        for block in complete_blocks(length, blocks):
            expected.append(sum(x[first + token] for token in block) / blocks.kernel_size)
        first += length
    torch.testing.assert_close(reference.compress_mean(x, LAYOUT, blocks), torch.stack(expected), **ROUNDING)


def test_unfolded_blocks_are_the_tokens_of_each_block(blocks: BlockGeometry) -> None:
    x = random_inputs(LAYOUT, head_dim=3).k
    expected, first = [], 0
    for length in KEYS:
        expected += [x[first + block[0] : first + block[-1] + 1] for block in complete_blocks(length, blocks)]
        first += length
    assert torch.equal(unfold_blocks(x, LAYOUT, blocks), torch.stack(expected))


def test_compressed_attention(blocks: BlockGeometry, sizes: dict[str, int]) -> None:
    q, k, v, _ = random_inputs(LAYOUT, **sizes)
    k_cmp, v_cmp = (reference.compress_mean(x, LAYOUT, blocks) for x in (k, v))
    group, expected = sizes["heads"] // sizes["kv_heads"], []
    for query in queries(blocks):
        rows = range(query.first_cmp, query.first_cmp + len(visible_blocks(query, blocks)))
        for head in range(sizes["heads"]):
            kv = [(k_cmp[row, head // group], v_cmp[row, head // group]) for row in rows]
            expected.append(attend(q[query.row, head], [x for x, _ in kv], [x for _, x in kv], 3**-0.5))
    got = reference.compressed_attention(q, k_cmp, v_cmp, LAYOUT, blocks)
    assert_attention(got, expected, sizes["heads"])


def test_window_attention(blocks: BlockGeometry, sizes: dict[str, int]) -> None:
    q, k, v, _ = random_inputs(LAYOUT, **sizes)
    group, expected = sizes["heads"] // sizes["kv_heads"], []
    for query in queries(blocks):
        t = query.position
        rows = [query.first_key + s for s in range(t + 1) if t - s < blocks.window_size]
        for head in range(sizes["heads"]):
            kv = [(k[row, head // group], v[row, head // group]) for row in rows]
            expected.append(attend(q[query.row, head], [x for x, _ in kv], [x for _, x in kv], 0.3))
    assert_attention(reference.window_attention(q, k, v, LAYOUT, blocks, scale=0.3), expected, sizes["heads"])


def test_selected_attention(blocks: BlockGeometry, sizes: dict[str, int]) -> None:
    q, k, v, _ = random_inputs(LAYOUT, **sizes)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, 9, (len(q), sizes["kv_heads"], 4), generator=generator, dtype=torch.int32)
    group, expected = sizes["heads"] // sizes["kv_heads"], []
    for query in queries(blocks):
        for head in range(sizes["heads"]):
            listed = set(indices[query.row, head // group].tolist())
            rows = [query.first_key + s for s in range(query.position + 1) if s // blocks.block_size in listed]
            kv = [(k[row, head // group], v[row, head // group]) for row in rows]
            expected.append(attend(q[query.row, head], [x for x, _ in kv], [x for _, x in kv], 3**-0.5))
    assert_attention(reference.selected_attention(q, k, v, indices, LAYOUT, blocks), expected, sizes["heads"])


def test_block_scores_and_selection(blocks: BlockGeometry, sizes: dict[str, int]) -> None:
    q, k, _, _ = random_inputs(LAYOUT, **sizes)
    k_cmp = reference.compress_mean(k, LAYOUT, blocks)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, LAYOUT, blocks)
    got = reference.block_scores(q, k_cmp, lse, LAYOUT, blocks)
    chosen = reference.select_blocks(q, k_cmp, lse, LAYOUT, blocks)
    assert chosen.dtype == torch.int32
    group = sizes["heads"] // sizes["kv_heads"]
    for query in queries(blocks):
        for kv_head in range(sizes["kv_heads"]):
            heads = [q[query.row, kv_head * group + i] for i in range(group)]
            score = scores(query, heads, list(k_cmp[query.first_cmp :, kv_head]), blocks)
            row = got[query.row, kv_head]
            torch.testing.assert_close(row[: len(score)], torch.tensor(score, dtype=torch.float64), **ROUNDING)
            assert not row[len(score) :].any()
            assert chosen[query.row, kv_head].tolist() == choose(score, query.position, blocks)


def choose(score: list[float], position: int, blocks: BlockGeometry) -> list[int]:
    """Eq. 11: the forced blocks, then the best scores, the lower index first; ascending, padded with -1."""
    candidates = [j for j in range(len(score)) if j * blocks.block_size <= position]
    forced = candidates[: blocks.init_blocks] + candidates[-blocks.local_blocks :]
    rest = sorted(set(candidates) - set(forced), key=lambda j: (-round(score[j], 10), j))
    best = sorted((sorted(set(forced)) + rest)[: blocks.topk])
    return best + [-1] * (blocks.topk - len(best))


def test_combine() -> None:
    gates, *outputs = (torch.randn(4, 2, n, dtype=torch.float64) for n in (3, 5, 5, 5))
    got = reference.combine(gates, *outputs)
    for t in range(4):
        for h in range(2):
            expected = sum(float(gates[t, h, c]) * outputs[c][t, h] for c in range(3))
            torch.testing.assert_close(got[t, h], expected, **ROUNDING)


def test_a_query_attends_to_its_prefix_not_to_the_first_key() -> None:
    blocks = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=4, window_size=8)
    layout = VarlenLayout.from_lengths([1], [8])
    q, k, v, _ = random_inputs(layout)
    out, _ = reference.window_attention(torch.zeros_like(q), k, v, layout, blocks)
    torch.testing.assert_close(out, v.mean(0, keepdim=True).repeat_interleave(2, 1), **ROUNDING)


def test_the_oracle_computes_in_fp32_and_fp64_alone() -> None:
    blocks, layout = GEOMETRIES[0], VarlenLayout.from_lengths([9])
    half = random_inputs(layout, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"expected one of them, got torch\.bfloat16; convert the inputs"):
        run_ops(reference, half, layout, blocks)


STRIDES = [
    (size * stride, stride, block * stride)
    for stride in (1, 2, 3, 16)
    for size in (1, 2, 3, 5)
    for block in (1, 2, 4, 5, 7)
    if size <= block
]


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), STRIDES)
def test_eq_9_is_the_overlap_of_token_sets(kernel_size: int, kernel_stride: int, block_size: int) -> None:
    blocks = BlockGeometry(kernel_size, kernel_stride, block_size, topk=3)
    num_blocks = 6
    tokens = [set(block) for block in complete_blocks(num_blocks * block_size, blocks)]
    selection = [set(range(j * block_size, (j + 1) * block_size)) for j in range(num_blocks)]
    expected = torch.tensor([[len(a & b) / kernel_stride for b in selection] for a in tokens], dtype=torch.float64)
    assert torch.equal(reference.overlap(len(tokens), num_blocks, blocks), expected)
    # Powers of 1/2 and small weights: the sums are exact, so the order of the additions does not matter.
    p_cmp = 2.0 ** -(torch.arange(len(tokens), dtype=torch.float64) % 20)
    assert torch.equal(stencil(p_cmp, num_blocks, blocks), p_cmp @ expected)
    short = tokens[: len(tokens) // 2]
    assert torch.equal(stencil(p_cmp[: len(short)], num_blocks, blocks), p_cmp[: len(short)] @ expected[: len(short)])


def test_eq_9_for_the_papers_sizes() -> None:
    weights = reference.overlap(19, 5, BlockGeometry())
    for j in range(1, 4):
        assert weights[4 * j - 1 : 4 * j + 4, j].tolist() == [1, 2, 2, 2, 1]
    assert weights[:4, 0].tolist() == [2, 2, 2, 1]
    assert weights.sum(1).tolist() == [2.0] * 19
