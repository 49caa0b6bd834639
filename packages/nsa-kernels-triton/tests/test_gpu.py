"""The compiled kernels on a GPU: the oracle's results, at real sizes too, without a wait, in graphs and compiled code.

Long sequences are compared query by query: the query at position t of a sequence is a batch of one query over the keys
up to t, which the oracle can hold.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.backend import BACKEND
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import (
    Inputs,
    assert_within_budget,
    certified_inputs,
    plain_attention,
    poisoned_empty,
    random_inputs,
    run_ops,
)
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCKS = BlockGeometry()
SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5, window_size=40)
ODD = BlockGeometry(
    kernel_size=48, kernel_stride=16, block_size=128, topk=9, init_blocks=2, local_blocks=1, window_size=77
)
# Whole prefill, prefixes, decode steps, empty ones, more queries than keys.
RAGGED = [300, 77, 0, 1, 40, 9], [300, 650, 40, 500, 13, 0]
FP32 = 5e-5
SHAPES = {"g16": (64, 4), "g4": (32, 8), "g1": (16, 16)}
ORGANISATIONS = {
    "by-query": {"by_block": 0, "tma": 0, "rows": 64, "keys": 32},
    "by-block": {"by_block": 1, "tma": 1, "rows": 64, "chunk_rows": 4096, "programs": 2, "turns": 3},
}


class Case(NamedTuple):
    """One operation's arguments before layout and blocks, and the mask that they mean."""

    op: str
    args: tuple[Tensor, ...]
    mask: Tensor


def cases(inputs: Inputs, layout: VarlenLayout, blocks: BlockGeometry) -> list[Case]:
    """The three attention branches, on the oracle's compressed keys and choice of blocks."""
    q, k, v, _ = inputs
    k_cmp, v_cmp = (reference.compress_mean(x.double(), layout, blocks).to(x.dtype) for x in (k, v))
    _, lse = reference.compressed_attention(q.double(), k_cmp.double(), v_cmp.double(), layout, blocks)
    indices = reference.select_blocks(q.double(), k_cmp.double(), lse, layout, blocks)
    return [
        Case("compressed_attention", (q, k_cmp, v_cmp), masks.compressed_mask(layout, blocks)[:, None]),
        Case("selected_attention", (q, k, v, indices), masks.selected_mask(indices, layout, blocks)),
        Case("window_attention", (q, k, v), masks.window_mask(layout, blocks)[:, None]),
    ]


def check(case: Case, layout: VarlenLayout, blocks: BlockGeometry) -> None:
    with poisoned_empty():
        out, lse = getattr(BACKEND, case.op)(*case.args, layout, blocks)
    doubles = (x.double() if x.is_floating_point() else x for x in case.args)
    exact, exact_lse = getattr(reference, case.op)(*doubles, layout, blocks)
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=FP32)
    else:
        assert_within_budget(out, plain_attention(*case.args[:3], case.mask), exact, case.op)
    # A logit of unit-scale inputs is off by the rounding of fp32 sums alone: half precision enters exactly.
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=FP32)


@pytest.mark.parametrize("organisation", ORGANISATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 16, 64])
def test_branches_over_a_ragged_batch(group: int, dtype: torch.dtype, organisation: str) -> None:
    layout = VarlenLayout.from_lengths(*RAGGED, device="cuda")
    inputs = random_inputs(layout, heads=max(2 * group, 24), kv_heads=max(2, 24 // group), head_dim=64, dtype=dtype)
    with configurations.overridden("selected_attention", **ORGANISATIONS[organisation]):
        for case in cases(inputs, layout, BLOCKS):
            check(case, layout, BLOCKS)


@pytest.mark.usefixtures("known_spread")
@pytest.mark.parametrize("blocks", [BLOCKS, SMALL, ODD], ids=["default", "small", "odd"])
@pytest.mark.parametrize(
    "dims", [(128, 128), (192, 128), (32, 256), (96, 80), (256, 256), (64, 32), (128, 16)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_dims_and_geometries(dims: tuple[int, int], dtype: torch.dtype, blocks: BlockGeometry) -> None:
    layout = VarlenLayout.from_lengths(*RAGGED, device="cuda")
    inputs = random_inputs(layout, heads=24, kv_heads=6, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype)
    for case in cases(inputs, layout, blocks):
        check(case, layout, blocks)


@pytest.mark.parametrize("blocks", [BLOCKS, SMALL, ODD], ids=["default", "small", "odd"])
@pytest.mark.parametrize("shape", [(16, 1, 32), (8, 2, 32), (2, 2, 32), (6, 2, 32), (8, 2, 80), (8, 2, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_whole_choice_equals_the_oracles(
    shape: tuple[int, int, int], dtype: torch.dtype, blocks: BlockGeometry
) -> None:
    """Where margins are certified; both start from the same compressed keys and the oracle's LSE."""
    layout = VarlenLayout.from_lengths([130, 1, 0, 40], [500, 300, 7, 40], device="cuda")
    sizes = dict(zip(("heads", "kv_heads", "head_dim"), shape, strict=True))
    inputs, k_cmp = certified_inputs(layout, blocks, dtype=dtype, **sizes)
    doubles = inputs.q.double(), k_cmp.double()
    _, lse = reference.compressed_attention(*doubles, doubles[1], layout, blocks)
    expected = reference.select_blocks(*doubles, lse, layout, blocks)
    with poisoned_empty():
        found = BACKEND.select_blocks(inputs.q, k_cmp, lse.float(), layout, blocks)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("group", [16, 4, 1])
def test_equal_scores_go_to_the_lower_index(group: int) -> None:
    layout = VarlenLayout.from_lengths([5000], device="cuda")
    k_cmp = random_inputs(layout, heads=1, kv_heads=2, head_dim=128, dtype=torch.bfloat16).k
    k_cmp = reference.compress_mean(k_cmp.double(), layout, BLOCKS).bfloat16()
    q = torch.zeros(5000, 2 * group, 128, device="cuda", dtype=torch.bfloat16)
    _, lse = BACKEND.compressed_attention(q, k_cmp, k_cmp, layout, BLOCKS)
    rows = torch.arange(5000, device="cuda")
    own = rows // 64
    slot = torch.arange(16, device="cuda")
    expected = torch.where(slot < 14, slot, own[:, None] - 15 + slot)
    expected = torch.where(own[:, None] < 15, torch.where(slot <= own[:, None], slot, -1), expected)
    assert torch.equal(BACKEND.select_blocks(q, k_cmp, lse, layout, BLOCKS), expected.int()[:, None].expand(-1, 2, -1))


LONG = {
    "8k": ([8192], None),
    "ragged": ([9000, 64, 20_000, 1], [9000, 30_000, 20_000, 65_536]),
    "64k": ([65_536], None),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", ["8k", "ragged", pytest.param("64k", marks=pytest.mark.alone)])
def test_real_sizes(lengths: str, shape: str) -> None:
    """Sampled queries of each sequence, every branch and the choice of blocks, bf16 against fp64."""
    heads, kv_heads = SHAPES[shape]
    sampled(*LONG[lengths], heads, kv_heads, samples=8)


@pytest.mark.alone
def test_256k_tokens() -> None:
    """More than 2^31 elements of q and of every output."""
    sampled([262_144], None, 64, 1, samples=6)


def sampled(lengths_q: list[int], lengths_k: list[int] | None, heads: int, kv_heads: int, samples: int) -> None:
    layout = VarlenLayout.from_lengths(lengths_q, lengths_k, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(rows, h, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for rows, h in ((layout.total_q, heads), (layout.total_k, kv_heads), (layout.total_k, kv_heads))
    )
    k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, BLOCKS) for x in (k, v))
    o_cmp, lse = BACKEND.compressed_attention(q, k_cmp, v_cmp, layout, BLOCKS)
    indices = BACKEND.select_blocks(q, k_cmp, lse, layout, BLOCKS)
    o_slc, _ = BACKEND.selected_attention(q, k, v, indices, layout, BLOCKS)
    o_win, _ = BACKEND.window_attention(q, k, v, layout, BLOCKS)
    found = {"cmp": [], "slc": [], "win": []}
    first_q = first_k = first_c = 0
    for q_len, k_len in zip(lengths_q, lengths_k or lengths_q, strict=True):
        chosen = {0, q_len - 1} | set(
            torch.randint(q_len, (samples,), generator=torch.Generator().manual_seed(1)).tolist()
        )
        for query in sorted(chosen):
            row, seen = first_q + query, k_len - q_len + query + 1
            one = VarlenLayout.from_lengths([1], [seen], device="cuda")
            compressed = slice(first_c, first_c + BLOCKS.num_compressed(seen))
            q1, (k1, v1) = q[row : row + 1], (x[first_k : first_k + seen] for x in (k, v))
            kc1, vc1 = k_cmp[compressed], v_cmp[compressed]
            listed = indices[row : row + 1]
            check_choice(q1, kc1, listed, one)
            branches = {
                "cmp": (o_cmp, reference.compressed_attention, (kc1, vc1), masks.compressed_mask(one, BLOCKS)[:, None]),
                "slc": (
                    o_slc,
                    reference.selected_attention,
                    (k1, v1, listed),
                    masks.selected_mask(listed, one, BLOCKS),
                ),
                "win": (o_win, reference.window_attention, (k1, v1), masks.window_mask(one, BLOCKS)[:, None]),
            }
            for name, (out, oracle, rest, mask) in branches.items():
                doubles = (x.double() if x.is_floating_point() else x for x in rest)
                exact, _ = oracle(q1.double(), *doubles, one, BLOCKS)
                found[name].append((out[row : row + 1], plain_attention(q1, *rest[:2], mask), exact))
        first_q, first_k, first_c = first_q + q_len, first_k + k_len, first_c + BLOCKS.num_compressed(k_len)
    for name, results in found.items():
        assert_within_budget(*(torch.cat(x) for x in zip(*results, strict=True)), name)


def check_choice(q: Tensor, k_cmp: Tensor, found: Tensor, layout: VarlenLayout) -> None:
    """The right number of blocks, ascending, forced ones among them, and scores that no left-out block beats.

    By more than the arithmetic may be off: a score's relative error is bounded as in `selection_margin`.
    """
    _, lse = reference.compressed_attention(q.double(), k_cmp.double(), k_cmp.double(), layout, BLOCKS)
    scores = reference.block_scores(q.double(), k_cmp.double(), lse, layout, BLOCKS)[0]
    candidate, forced = (x[0] for x in masks.candidate_blocks(layout, BLOCKS))
    dots = float((q.double().abs().amax() * k_cmp.double().abs().sum(-1).amax()) * 128**-0.5) if len(k_cmp) else 0.0
    relative = 2.0**-24 * (2 * 130 * dots + len(k_cmp) + 64)
    for head, chosen in enumerate(found[0].tolist()):
        listed = [x for x in chosen if x >= 0]
        assert listed == sorted(set(listed))
        assert chosen[len(listed) :] == [-1] * (16 - len(listed))
        assert len(listed) == min(16, int(candidate.sum()))
        mine = torch.zeros_like(candidate)
        mine[listed] = True
        assert not (mine & ~candidate).any()
        assert (mine | ~forced).all()
        free, left = mine & ~forced, candidate & ~mine
        if left.any():
            least, best = scores[head][free].min(), scores[head][left].max()
            assert least >= best * (1 - 2 * relative)


@pytest.mark.parametrize("signature", range(4))
def test_random_problems(signature: int) -> None:
    """250 ragged batches for each of four compiled signatures; every operation on the results of those before it."""
    heads, kv_heads, dim, dtype, blocks = [
        (16, 1, 64, torch.float32, BLOCKS),
        (8, 2, 32, torch.float32, SMALL),
        (3, 3, 16, torch.float32, ODD),
        (12, 2, 48, torch.float32, BlockGeometry(block_size=32, topk=3, local_blocks=1, window_size=33)),
    ][signature]
    generator = torch.Generator().manual_seed(signature)
    for seed in range(250):
        batch = int(torch.randint(1, 5, (), generator=generator))
        k_lens = torch.randint(0, 200, (batch,), generator=generator).tolist()
        q_lens = [int(torch.randint(0, k_len + 5, (), generator=generator)) for k_len in k_lens]
        layout = VarlenLayout.from_lengths(q_lens, k_lens, device="cuda")
        inputs = random_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=dim, seed=seed, dtype=dtype)
        found = run_ops(BACKEND, inputs, layout, blocks)
        exact = run_ops(
            reference, Inputs(*(x.double() for x in inputs)), layout, blocks, block_indices=found.block_indices
        )
        for name in ("k_cmp", "v_cmp", "o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win", "out"):
            torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=0, atol=FP32, msg=name)
        chosen = reference.select_blocks(inputs.q.double(), exact.k_cmp, exact.lse_cmp, layout, blocks)
        differ = (chosen != found.block_indices).any(-1)
        assert float(differ.double().mean() if differ.numel() else 0) <= 0.02, "near-ties are rare"


@contextmanager
def torch_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_results_are_bitwise_the_same() -> None:
    layout = VarlenLayout.from_lengths([3000, 1100], device="cuda")
    for heads in ((16, 1), (8, 2), (4, 4)):
        inputs = random_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=128, dtype=torch.bfloat16)
        with torch_deterministic():
            first, *others = (
                run_ops(BACKEND, inputs, layout, BLOCKS) for _ in range(40)
            )  # past a sample of `ops.spread`
        for other in others:
            assert all(map(torch.equal, first, other))


@pytest.fixture
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def everything(inputs: Inputs, layout: VarlenLayout) -> Callable[[], Tensor]:
    return lambda: run_ops(BACKEND, inputs, layout, BLOCKS).out


def test_nothing_waits_for_the_device(no_waiting: None) -> None:
    layout = VarlenLayout.from_lengths([600, 100], device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    inputs = random_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    expected = everything(inputs, layout)()
    torch.cuda.set_sync_debug_mode("error")
    results = [everything(inputs, layout)() for _ in range(40)]  # past the first samples of `ops.spread`
    torch.cuda.set_sync_debug_mode("default")
    for found in results:  # from one organisation of selected attention or the other, whose parts are in bf16
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_a_cuda_graph_replays_with_new_numbers() -> None:
    layout = VarlenLayout.from_lengths([600, 100], device="cuda")
    inputs, others = (
        random_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, seed=s) for s in (0, 1)
    )
    run = everything(inputs, layout)
    with torch_deterministic():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        expected = everything(others, layout)()
    for x, y in zip(inputs, others, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)


def test_compiled_code_has_no_graph_break() -> None:
    layout = VarlenLayout.from_lengths([600, 100], device="cuda")
    inputs = random_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    compiled = torch.compile(lambda *x: run_ops(BACKEND, Inputs(*x), layout, BLOCKS).out, fullgraph=True)
    with torch_deterministic():
        torch.testing.assert_close(compiled(*inputs), everything(inputs, layout)())
