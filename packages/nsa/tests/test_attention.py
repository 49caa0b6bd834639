"""Is `nsa_attention` the composition of the oracle's operations, and plain attention where everything is in reach?"""

import math
from collections.abc import Callable

import pytest
import torch
from nsa import NSAAux, NSAConfig, nsa_attention, ops
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from torch import Tensor

# Ragged: whole prefill, chunks over a prefix, decode steps, sequences without queries or keys, queries before the
# first key.
LAYOUTS = {
    "prefill": ([80, 1, 7, 70], None),
    "chunks": ([30, 5, 0], [100, 5, 40]),
    "decode": ([1, 1, 1, 2], [90, 8, 1, 77]),
    "early": ([12, 70], [4, 75]),
    "empty": ([0, 3, 0], [0, 0, 9]),
}
FP64 = {"rtol": 0, "atol": 1e-12}  # outputs of order one, sums of at most 100 terms, weights from an fp64 softmax


class Case:
    """Leaf tensors in fp64 for one layout."""

    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")

    def __init__(self, layout: VarlenLayout, blocks: BlockGeometry) -> None:
        torch.manual_seed(3)
        self.layout, self.blocks = layout, blocks
        count = {"k_cmp": layout.compressed(blocks).total, "v_cmp": layout.compressed(blocks).total}
        self.leaves = {
            name: torch.randn(count.get(name, layout.total_k), 2, 8 if name[0] == "k" else 6, dtype=torch.float64)
            for name in self.names[1:-1]
        }
        self.leaves["q"] = torch.randn(layout.total_q, 4, 8, dtype=torch.float64)
        self.leaves["gates"] = torch.rand(layout.total_q, 4, 3, dtype=torch.float64)
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def run(self, **options: object) -> Tensor | tuple[Tensor, NSAAux]:
        return nsa_attention(*(self.leaves[name] for name in self.names), self.layout, self.blocks, **options)

    def oracle(
        self, q_cmp: Tensor | None = None, block_indices: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, NSAAux]:
        x, where = self.leaves, (self.layout, self.blocks)
        q_cmp = x["q"] if q_cmp is None else q_cmp
        o_cmp, lse_cmp = reference.compressed_attention(q_cmp, x["k_cmp"], x["v_cmp"], *where, scale=scale)
        if block_indices is None:
            block_indices = reference.select_blocks(q_cmp, x["k_cmp"], lse_cmp, *where, scale=scale)
        o_slc, lse_slc = reference.selected_attention(
            x["q"], x["k_slc"], x["v_slc"], block_indices, *where, scale=scale
        )
        o_win, lse_win = reference.window_attention(x["q"], x["k_win"], x["v_win"], *where, scale=scale)
        out = reference.combine(x["gates"], o_cmp, o_slc, o_win)
        return out, NSAAux(block_indices, lse_cmp, lse_slc, lse_win)

    def gradients(self, out: Tensor) -> dict[str, Tensor]:
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
        grads = torch.autograd.grad((out * weight).sum(), list(self.leaves.values()))
        return dict(zip(self.leaves, grads, strict=True))


@pytest.fixture(params=LAYOUTS)
def case(request: pytest.FixtureRequest, make_config: Callable[..., NSAConfig]) -> Case:
    return Case(VarlenLayout.from_lengths(*LAYOUTS[request.param]), make_config().blocks)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, **FP64, msg=lambda text, name=name: f"{name}: {text}")


def test_is_the_composition_of_the_oracle(case: Case, margin: Callable, score_error: float) -> None:
    with torch.no_grad():
        assert margin(case.leaves["q"], case.leaves["k_cmp"], case.layout, case.blocks) > 2 * score_error
    (out, aux), (expected, expected_aux) = case.run(return_aux=True), case.oracle()
    torch.testing.assert_close(out, expected, **FP64)
    assert torch.equal(aux.block_indices, expected_aux.block_indices)
    for got, lse in zip(aux[1:], expected_aux[1:], strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), lse, rtol=0, atol=8 * 2**-24)  # below 8, rounded once to fp32
    assert torch.equal(case.run(), out)
    assert_same(case.gradients(out), case.gradients(expected))


def test_given_indices_are_obeyed(case: Case) -> None:
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(-1, 8, (case.layout.total_q, 2, 3), generator=generator, dtype=torch.int32)
    (out, aux), (expected, _) = case.run(block_indices=indices, return_aux=True), case.oracle(block_indices=indices)
    assert aux.block_indices is indices
    torch.testing.assert_close(out, expected, **FP64)
    assert_same(case.gradients(out), case.gradients(expected))


def test_selected_indices_given_back_change_nothing(case: Case) -> None:
    out, aux = case.run(return_aux=True)
    assert torch.equal(case.run(block_indices=aux.block_indices), out)


@pytest.fixture
def prefill(make_config: Callable[..., NSAConfig]) -> Case:
    return Case(VarlenLayout.from_lengths([80, 1, 7, 70]), make_config().blocks)


def test_q_cmp_serves_the_compressed_branch_and_the_scores(prefill: Case, margin: Callable, score_error: float) -> None:
    q_cmp = torch.randn_like(prefill.leaves["q"])
    with torch.no_grad():
        assert margin(q_cmp, prefill.leaves["k_cmp"], prefill.layout, prefill.blocks) > 2 * score_error
    (out, aux), (expected, expected_aux) = prefill.run(q_cmp=q_cmp, return_aux=True), prefill.oracle(q_cmp)
    torch.testing.assert_close(out, expected, **FP64)
    assert torch.equal(aux.block_indices, expected_aux.block_indices)
    assert not torch.equal(aux.block_indices, prefill.oracle()[1].block_indices)


def test_scale_reaches_every_branch(prefill: Case, margin: Callable, score_error: float) -> None:
    scaled = prefill.leaves["q"].detach() * (0.7 * 8**0.5)  # at the default scale, the same logits
    with torch.no_grad():
        assert margin(scaled, prefill.leaves["k_cmp"], prefill.layout, prefill.blocks) > 2 * score_error
    out, expected = prefill.run(scale=0.7), prefill.oracle(scale=0.7)[0]
    torch.testing.assert_close(out, expected, **FP64)
    assert (out - prefill.run()).abs().max() > 1e-3


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_one_open_gate_lets_one_branch_through(prefill: Case, branch: int) -> None:
    gates = torch.zeros_like(prefill.leaves["gates"])
    gates[..., branch] = 1
    prefill.leaves["gates"] = gates
    x, where = prefill.leaves, (prefill.layout, prefill.blocks)
    _, aux = prefill.run(return_aux=True)
    alone = (
        lambda: ops.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], *where),
        lambda: ops.selected_attention(x["q"], x["k_slc"], x["v_slc"], aux.block_indices, *where),
        lambda: ops.window_attention(x["q"], x["k_win"], x["v_win"], *where),
    )[branch]
    assert torch.equal(prefill.run(), alone()[0])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("gates", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=["selected", "window"])
@pytest.mark.parametrize("lengths", [([64, 33, 1], None), ([3, 1], [64, 50])], ids=["prefill", "suffix"])
def test_is_full_attention_while_everything_is_in_reach(
    lengths: tuple, gates: tuple[float, float, float], group: int
) -> None:
    """w >= S and n * l' >= S: fp32 within 1e-5 of softmax(q k^T) v written out per sequence and head."""
    blocks = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=64)
    layout = VarlenLayout.from_lengths(*lengths)
    q = torch.randn(layout.total_q, 2 * group, 16)
    k, v = torch.randn(layout.total_k, 2, 16), torch.randn(layout.total_k, 2, 8)
    k_cmp, v_cmp = ops.compress_mean(k, layout, blocks), ops.compress_mean(v, layout, blocks)
    opened = torch.tensor(gates).expand(layout.total_q, 2 * group, 3)
    out = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, opened, layout, blocks)
    q_offsets, k_offsets = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    for sequence in range(layout.batch_size):
        queries = range(q_offsets[sequence], q_offsets[sequence + 1])
        first, last = k_offsets[sequence], k_offsets[sequence + 1]
        for i, row in enumerate(queries):
            seen = slice(first, last - len(queries) + i + 1)
            for head in range(2 * group):
                logits = k[seen, head // group].double() @ q[row, head].double() / math.sqrt(16)
                expected = logits.softmax(0) @ v[seen, head // group].double()
                assert (out[row, head].double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("shared_heads", [1, 2, 4])
def test_group_sizes_repeat_kv_heads(shared_heads: int, make_config: Callable[..., NSAConfig]) -> None:
    """A group's queries read the same keys as if each had its own copy."""
    blocks, layout = make_config().blocks, VarlenLayout.from_lengths([40, 10])
    group = 4 // shared_heads
    k, v = (torch.randn(50, shared_heads, 8, dtype=torch.float64) for _ in range(2))
    k_cmp, v_cmp = (ops.compress_mean(x, layout, blocks) for x in (k, v))
    q, gates = torch.randn(50, 4, 8, dtype=torch.float64), torch.rand(50, 4, 3, dtype=torch.float64)
    out = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, layout, blocks)
    copies = [x.repeat_interleave(group, 1) for x in (k_cmp, v_cmp, k, v, k, v)]
    # 50 tokens are 4 blocks: all are selected, whatever the group's scores say.
    torch.testing.assert_close(nsa_attention(q, *copies, gates, layout, blocks), out, **FP64)


def test_gradients_of_a_tiny_whole(make_config: Callable[..., NSAConfig]) -> None:
    """gradcheck in fp64 with the indices given, so that no perturbation moves them."""
    blocks = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=2, local_blocks=1, window_size=2)
    layout = VarlenLayout.from_lengths([4, 2], [5, 2])
    count = layout.compressed(blocks).total
    sizes = [(6, 2, 2), (count, 1, 2), (count, 1, 3), (7, 1, 2), (7, 1, 3), (7, 1, 2), (7, 1, 3), (6, 2, 3)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    indices = nsa_attention(*inputs, layout, blocks, return_aux=True)[1].block_indices
    assert torch.autograd.gradcheck(lambda *x: nsa_attention(*x, layout, blocks, block_indices=indices), inputs)
