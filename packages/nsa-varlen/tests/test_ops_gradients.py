"""Are the backward formulas the derivatives of the forward ones? Finite differences in fp64, operation by operation."""

from collections.abc import Callable

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.sdpa import BACKEND, _selected
from nsa_varlen.testing import random_inputs, run_ops
from torch import Tensor

# A partial tail, a chunk, no keys, more queries than keys.
LAYOUT = VarlenLayout.from_lengths([4, 1, 1, 2], [4, 5, 0, 1])
BLOCKS = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3, local_blocks=1, window_size=3)
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 2, "v_head_dim": 1}


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves)


def test_compress_mean() -> None:
    gradcheck(lambda x: BACKEND.compress_mean(x, LAYOUT, BLOCKS), random_inputs(LAYOUT, **SIZES).k)


def test_compressed_attention() -> None:
    q, k, v, _ = random_inputs(LAYOUT, **SIZES)
    k, v = (BACKEND.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    gradcheck(lambda q, k, v: BACKEND.compressed_attention(q, k, v, LAYOUT, BLOCKS)[0], q, k, v)


@pytest.mark.parametrize("rows_per_block", [1 << 40, 0], ids=["by-query", "by-block"])
@pytest.mark.parametrize("entries", [1, 5])
def test_selected_attention(rows_per_block: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selected, "ROWS_PER_BLOCK", rows_per_block)
    q, k, v, _ = random_inputs(LAYOUT, **SIZES)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 5, (LAYOUT.total_q, 2, entries), generator=generator, dtype=torch.int32)
    gradcheck(lambda q, k, v: BACKEND.selected_attention(q, k, v, indices, LAYOUT, BLOCKS, scale=0.7)[0], q, k, v)


def test_window_attention() -> None:
    q, k, v, _ = random_inputs(LAYOUT, **SIZES)
    gradcheck(lambda q, k, v: BACKEND.window_attention(q, k, v, LAYOUT, BLOCKS)[0], q, k, v)


def test_combine() -> None:
    gates, *outputs = (torch.randn(5, 4, n, dtype=torch.float64) for n in (3, 2, 2, 2))
    gradcheck(BACKEND.combine, gates, *outputs)


def test_neither_lse_nor_choice_records_gradients() -> None:
    results = run_ops(BACKEND, random_inputs(LAYOUT, **SIZES).leaves(), LAYOUT, BLOCKS)
    recorded = {name for name, x in results._asdict().items() if x.requires_grad}
    assert recorded == {"k_cmp", "v_cmp", "o_cmp", "o_slc", "o_win", "out"}


@pytest.mark.parametrize("needed", range(3), ids=["q", "k", "v"])
def test_one_gradient_alone_is_that_of_all_three(needed: int) -> None:
    inputs = random_inputs(LAYOUT, **SIZES)[:3]
    leaves = [x.clone().requires_grad_() for x in inputs]
    BACKEND.window_attention(*leaves, LAYOUT, BLOCKS)[0].square().sum().backward()
    alone = [x.clone().requires_grad_(i == needed) for i, x in enumerate(inputs)]
    BACKEND.window_attention(*alone, LAYOUT, BLOCKS)[0].square().sum().backward()
    assert [x.grad is None for x in alone] == [i != needed for i in range(3)]
    assert torch.equal(alone[needed].grad, leaves[needed].grad)


def test_strided_inputs_and_gradients_are_those_of_contiguous_ones() -> None:
    inputs = random_inputs(LAYOUT, heads=4, kv_heads=4, head_dim=3)[:3]
    leaves = [x.clone().requires_grad_() for x in inputs]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    grads = []
    for tensors in (leaves, strided):
        out, _ = BACKEND.window_attention(*tensors, LAYOUT, BLOCKS)
        out[:, 0].sum().backward()  # an expanded gradient
        grads.append([out, *(x.grad for x in tensors)])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)  # fp64, one ulp of sums of some ten terms
