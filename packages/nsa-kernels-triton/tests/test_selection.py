"""The choice of blocks against the oracle: equal indices, by certified margins or because equal scores tie."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.ops import selection
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.testing import certified_inputs, poisoned_empty, random_inputs
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves"),
]

RAGGED = [3, 0, 1, 5], [290, 6, 150, 4]  # prefixed, empty, decode, more queries than keys
LONG = [2, 1], [32 * 150 + 5, 32 * 70]
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 24}


def geometry(
    kernel_size: int = 32, stride: int = 16, block_size: int = 32, topk: int = 5, init: int = 1, local: int = 2
):
    return BlockGeometry(kernel_size, stride, block_size, topk, init, local)


def choose(q: Tensor, k_cmp: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> tuple[Tensor, Tensor]:
    """(the kernels' choice, the oracle's in fp64)."""
    exact = q.double(), k_cmp.double()
    _, lse = reference.compressed_attention(exact[0], exact[1], exact[1], layout, blocks)
    with poisoned_empty():
        found = BACKEND.select_blocks(q, k_cmp, lse.float(), layout, blocks)
    return found, reference.select_blocks(*exact, lse, layout, blocks)


def check(
    lengths: tuple[list[int], list[int]],
    blocks: BlockGeometry,
    *,
    dtype: torch.dtype = torch.float32,
    ties: bool = False,
    **sizes: Any,
) -> None:
    """With `ties` every score of a row is 0 or the same, with some that are less at the edges."""
    layout = VarlenLayout.from_lengths(*lengths)
    if ties:
        inputs = random_inputs(layout, **SIZES | sizes).to(dtype)
        q, k_cmp = torch.zeros_like(inputs.q), reference.compress_mean(inputs.k.double(), layout, blocks).to(dtype)
    else:
        inputs, k_cmp = certified_inputs(layout, blocks, dtype=dtype, **SIZES | sizes)
        q = inputs.q
    found, expected = choose(q, k_cmp, layout, blocks)
    assert found.dtype == torch.int32
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def test_memory_may_hold_signalling_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the blocks that compete memory is as it was found: it is added up with the rest, and then not looked at.

    A sum of a signalling NaN is an invalid operation to numpy, of which it warns where a GPU does not.
    """
    make = Tensor.new_empty

    def found(self: Tensor, *size: Any, **options: Any) -> Tensor:
        x = make(self, *size, **options)
        return x.view(torch.int32).fill_(0x7FA00000).view(torch.float32) if x.dtype == torch.float32 else x

    layout, blocks = VarlenLayout.from_lengths(*LONG), GEOMETRIES["wide"]
    inputs, k_cmp = certified_inputs(layout, blocks, dtype=torch.float32, **SIZES)
    _, lse = reference.compressed_attention(inputs.q.double(), k_cmp.double(), k_cmp.double(), layout, blocks)
    expected = reference.select_blocks(inputs.q.double(), k_cmp.double(), lse, layout, blocks)
    monkeypatch.setattr(Tensor, "new_empty", found)
    assert torch.equal(BACKEND.select_blocks(inputs.q, k_cmp, lse.float(), layout, blocks), expected)


GEOMETRIES = {
    "usual": geometry(block_size=64),
    "two": geometry(),
    "one": geometry(stride=32),
    "alone": geometry(kernel_size=8, stride=8),
    "three": geometry(kernel_size=24, stride=8),
    "dense": geometry(kernel_size=5, stride=1),
    "wide": geometry(block_size=128, topk=3, init=0, local=1),
    "no-init": geometry(init=0),
    "one-local": geometry(local=1),
    "one-local-two": geometry(kernel_size=32, stride=8, topk=3, local=1),
    "three-local": geometry(topk=6, init=2, local=3),
    "forced-alone": geometry(topk=3),
    "all": geometry(topk=16),
    "most": geometry(topk=9),
}


@pytest.mark.parametrize("ties", [False, True], ids=["margin", "ties"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, ties: bool) -> None:
    check(RAGGED, GEOMETRIES[name], ties=ties)


@pytest.mark.parametrize("ties", [False, True], ids=["margin", "ties"])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 1), (3, 1), (4, 1), (16, 1), (40, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_groups(heads: int, kv_heads: int, dtype: torch.dtype, ties: bool) -> None:
    check(([3], [600]), geometry(block_size=64), dtype=dtype, ties=ties, heads=heads, kv_heads=kv_heads, head_dim=16)


@pytest.mark.parametrize("keys", [32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_pairs_of_blocks_in_fp32(group: int, keys: int) -> None:
    """The kernel for small groups, which fp32 inputs do not take by themselves, and over more than one tile."""
    with overridden("block_scores", keys=keys, columns=128):
        for ties in (False, True):
            check(([2, 140, 1], [900, 140, 700]), geometry(block_size=64, topk=4), ties=ties, heads=group, kv_heads=1)


@pytest.mark.parametrize("head_dim", [8, 64, 96, 192])
def test_head_dims(head_dim: int) -> None:
    check(([2, 1], [200, 150]), geometry(), head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[0], [1], [31], [32, 0, 1]])
def test_short(lengths: list[int]) -> None:
    check((lengths, lengths), geometry())


def test_whole_prefill() -> None:
    check(([130, 33], [130, 33]), geometry(block_size=64, topk=2, init=0, local=1), heads=1, kv_heads=1)


@pytest.mark.parametrize("ties", [False, True], ids=["margin", "ties"])
@pytest.mark.parametrize("topk, init", [(16, 1), pytest.param(35, 1, marks=pytest.mark.slow), (40, 0), (66, 1)])
def test_many_candidates(topk: int, init: int, ties: bool) -> None:
    check(LONG, geometry(stride=32, topk=topk, init=init), ties=ties, heads=1, kv_heads=1, head_dim=8)


@pytest.mark.parametrize("ties", [False, True], ids=["margin", "ties"])
@pytest.mark.parametrize(
    "topk, init, length",
    [(16, 1, 300), pytest.param(5, 0, 300, marks=pytest.mark.slow), (40, 1, 300), (140, 1, 600)],
)
def test_tournament(topk: int, init: int, length: int, ties: bool) -> None:
    """Rows of more than a span: two levels for 16, three for 40, longer spans for 140."""
    with overridden("topk", span=128):
        lengths = [2, 1], [32 * length + 5, 32 * 130]
        check(lengths, geometry(stride=32, topk=topk, init=init), ties=ties, heads=1, kv_heads=1, head_dim=8)


def test_tournament_of_pairs() -> None:
    with overridden("topk", span=128), overridden("block_scores", keys=64, columns=128):
        check(
            ([1, 1], [64 * 270, 64 * 20]), geometry(block_size=64, topk=16), ties=True, heads=1, kv_heads=1, head_dim=8
        )


def test_levels_halve_at_least() -> None:
    for blocks in (0, 1, 1024, 1025, 16_384, 10**7):
        for free in (1, 13, 32, 33, 125, 3000):
            levels = selection._levels(blocks, free, 1024)
            width = blocks
            for level in levels:
                assert level.span * level.spans >= width
                assert level is levels[-1] or level.next_width < max(width, 2 * level.span)
                width = level.next_width
            assert levels[-1].spans == 1


@pytest.mark.parametrize("bound", [1, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lengths",
    [([150], [170]), pytest.param(([150], [100]), marks=pytest.mark.slow), ([40, 0, 30], [100, 0, 200])],
    ids=["one", "less", "more"],
)
def test_chunks(lengths: tuple[list[int], list[int]], bound: int) -> None:
    with patch.object(selection, "SCORE_BYTES", bound), overridden("topk", rows=2):
        check(lengths, geometry(block_size=64, topk=2, init=0, local=1), heads=16, kv_heads=1, head_dim=8)


def test_views_are_taken_as_they_are() -> None:
    layout, blocks = VarlenLayout.from_lengths([2, 1], [200, 140]), geometry()
    inputs, k_cmp = certified_inputs(layout, blocks, dtype=torch.float32, **SIZES)
    wide = torch.full((*inputs.q.shape[:2], 60), torch.nan)
    wide[..., 7:55:2] = inputs.q
    heads_first = k_cmp.transpose(0, 1).contiguous().transpose(0, 1)
    found, expected = choose(wide[..., 7:55:2], heads_first, layout, blocks)
    assert torch.equal(found, expected)


def test_equal_blocks_among_others() -> None:
    """A row whose best blocks are few and the rest of which tie, at 0 and above."""
    layout, blocks = VarlenLayout.from_lengths([1], [32 * 150]), geometry(stride=32, topk=16)
    for gap in (1.0, 1000.0):
        k_cmp = torch.zeros(150, 1, 8)
        k_cmp[::40] = gap
        k_cmp[3::50] = gap / 2
        found, expected = choose(torch.ones(1, 1, 8), k_cmp, layout, blocks)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("topk", [5, 40])
def test_nan_scores_leave_blocks_in_range(topk: int) -> None:
    layout, blocks = VarlenLayout.from_lengths([3], [32 * 60]), geometry(stride=32, topk=topk)
    inputs = random_inputs(layout, heads=1, kv_heads=1, dtype=torch.float32)
    k_cmp = reference.compress_mean(inputs.k, layout, blocks)
    for poisoned in (
        torch.full_like(k_cmp, torch.nan),
        torch.where(torch.arange(60)[:, None, None] % 3 > 0, k_cmp, torch.nan),
    ):
        found = BACKEND.select_blocks(inputs.q, poisoned, torch.zeros(1, 3), layout, blocks)
        assert bool((found.diff(dim=-1) > 0).all())
        assert (int(found.min()), int(found.max())) == (0, 59)


def test_scale() -> None:
    layout, blocks = VarlenLayout.from_lengths([2], [200]), geometry()
    inputs, k_cmp = certified_inputs(layout, blocks, dtype=torch.float32, **SIZES)
    _, lse = reference.compressed_attention(inputs.q, k_cmp, k_cmp, layout, blocks, scale=0.5)
    expected = reference.select_blocks(inputs.q, k_cmp, lse, layout, blocks, scale=0.5)
    assert torch.equal(BACKEND.select_blocks(inputs.q, k_cmp, lse, layout, blocks, scale=0.5), expected)


def test_operator() -> None:
    layout, blocks = VarlenLayout.from_lengths([2], [100]), geometry(topk=4)
    inputs = random_inputs(layout, heads=2, kv_heads=1, dtype=torch.float32)
    k_cmp = reference.compress_mean(inputs.k, layout, blocks)
    arguments = (
        *(inputs.q, k_cmp, torch.zeros(2, 2), layout.cu_seqlens_q, layout.cu_seqlens_k),
        *(layout.compressed(blocks).cu_seqlens, 100, 32, 16, 32, 4, 1, 2, 0.3),
    )
    torch.library.opcheck(selection.select_blocks, arguments)
