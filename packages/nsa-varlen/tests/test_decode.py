"""All branches of paged decoding: what the operations make of the same rows, packed, and what they refuse."""

from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, reference
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import to_pages
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
LENGTHS, COUNTS = [70, 5, 131, 0, 16, 9], [1, 3, 4, 0, 0, 2]
ROWS = 4
NAMES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


def batch(
    lengths: list[int] = LENGTHS,
    counts: list[int] = COUNTS,
    blocks: BlockGeometry = BLOCKS,
    *,
    heads: int = 4,
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    rows: int = ROWS,
    page_size: int = 16,
) -> dict[str, Any]:
    """Arguments by name: unit normal rows in shuffled pages, gates in (0, 1)."""
    layout = VarlenLayout.from_lengths(lengths)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw = {name: rand(sum(lengths), 2, dims[name[0] == "v"]) for name in NAMES}
    raw |= {name: reference.compress_mean(raw[name], layout, blocks) for name in ("k_cmp", "v_cmp")}
    sizes = {name: layout.compressed(blocks).cu_seqlens.diff().tolist() if "cmp" in name else lengths for name in NAMES}
    pages = {
        name: to_pages(x.to(dtype).to(device), sizes[name], page_size, seed=i)
        for i, (name, x) in enumerate(raw.items())
    }
    return {
        "q": rand(len(lengths), rows, heads, dims[0]).to(dtype).to(device),
        **pages,
        "gates": rand(len(lengths), rows, heads, 3).sigmoid().to(dtype).to(device),
        "counts": torch.tensor(counts, dtype=torch.int32, device=device),
        "blocks": blocks,
        "q_cmp": rand(len(lengths), rows, heads, dims[0]).to(dtype).to(device),
    }


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in fp64 on the CPU."""

    def convert(x: Any) -> Any:
        if isinstance(x, PagedKV):
            return PagedKV(x.pages.cpu().double(), x.block_table.cpu(), x.lengths.cpu())
        return (x.cpu().double() if x.is_floating_point() else x.cpu()) if isinstance(x, Tensor) else x

    return {name: convert(x) for name, x in arguments.items()}


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize(
    "blocks",
    [
        BLOCKS,
        BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=0, local_blocks=1),
        BlockGeometry(kernel_size=1, kernel_stride=1, block_size=4, topk=5, window_size=1),
        BlockGeometry(kernel_size=16, kernel_stride=16, block_size=16, topk=20, window_size=300),
    ],
    ids=str,
)
def test_equals_the_operations_on_packed_rows(blocks: BlockGeometry, heads: int) -> None:
    arguments = batch(blocks=blocks, heads=heads)
    out, indices = BACKEND.decode_attention(**arguments)
    expected, chosen = reference.decode_attention(**arguments)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, chosen)  # fp64: no seed here has scores nearer than fp32 tells apart
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)  # an lse in fp32


def test_padding_is_zero_and_chooses_nothing() -> None:
    out, indices = BACKEND.decode_attention(**batch())
    for sequence, count in enumerate(COUNTS):
        assert not out[sequence, count:].any()
        assert (indices[sequence, count:] == -1).all()
        assert (indices[sequence, :count, :, 0] >= 0).all()


def test_padding_may_hold_anything() -> None:
    arguments = batch()
    expected = BACKEND.decode_attention(**arguments)
    padding = torch.arange(ROWS) >= arguments["counts"][:, None]
    for name in ("q", "q_cmp", "gates"):
        arguments[name][padding] = torch.nan
    for got, x in zip(BACKEND.decode_attention(**arguments), expected, strict=True):
        assert torch.equal(got, x)


@pytest.mark.parametrize("sequence", range(len(LENGTHS)))
def test_each_sequence_is_as_alone(sequence: int) -> None:
    arguments = batch()
    together = BACKEND.decode_attention(**arguments)

    def only(x: Any) -> Any:
        if isinstance(x, PagedKV):
            return PagedKV(x.pages, x.block_table[sequence : sequence + 1], x.lengths[sequence : sequence + 1])
        return x[sequence : sequence + 1] if isinstance(x, Tensor) else x

    alone = BACKEND.decode_attention(**{name: only(x) for name, x in arguments.items()})
    torch.testing.assert_close(alone[0][0], together[0][sequence], rtol=0, atol=1e-12)
    assert torch.equal(alone[1][0], together[1][sequence])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """All blocks are selected, so that no near tie decides."""
    blocks = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=9, window_size=40)
    arguments = batch(blocks=blocks, dtype=dtype)
    out, _ = BACKEND.decode_attention(**arguments)
    exact, _ = reference.decode_attention(**double(arguments))
    assert out.dtype == dtype
    # The inputs are exact; arithmetic is fp32, so that one rounding of the result is nearly all.
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_defaults() -> None:
    arguments = batch()
    given = arguments | {"q_cmp": arguments["q"]}
    without = {name: x for name, x in arguments.items() if name != "q_cmp"}
    expected = BACKEND.decode_attention(**given, scale=8**-0.5)
    for got, x in zip(BACKEND.decode_attention(**without), expected, strict=True):
        assert torch.equal(got, x)


@pytest.mark.parametrize("lengths, rows", [([0, 0], 4), ([], 4), ([20, 3], 0)])
def test_nothing_to_do(lengths: list[int], rows: int) -> None:
    out, indices = BACKEND.decode_attention(**batch(lengths, [0] * len(lengths), rows=rows))
    assert out.shape == (len(lengths), rows, 4, 6)
    assert indices.shape == (len(lengths), rows, 2, 4)
    assert not out.any()
    assert (indices == -1).all()


BAD = [
    ({"q": torch.zeros(6, 4, 8)}, ValueError, r"^q: expected shape \[B, N, heads, head_dim\], got \[6, 4, 8\]$"),
    ({"q": torch.zeros(6, 4, 4, 8, dtype=torch.int64)}, TypeError, r"^q: expected a floating dtype, got torch.int64$"),
    ({"q": None}, TypeError, r"^q: expected a tensor, got NoneType$"),
    ({"q_cmp": torch.zeros(6, 4, 4, 7)}, ValueError, r"^q_cmp: expected torch.float64 \[6, 4, 4, 8\] of q, got "),
    ({"gates": torch.zeros(6, 4, 4)}, ValueError, r"^gates: expected shape \[6, 4, 4, 3\] on cpu, got "),
    ({"counts": torch.zeros(6, dtype=torch.int64)}, ValueError, r"^counts: expected torch.int32 \[6\] on cpu, got "),
    ({"counts": torch.full((6,), 5, dtype=torch.int32)}, ValueError, r"^counts: expected 0 to 4, and at most the "),
    ({"counts": torch.full((6,), 1, dtype=torch.int32)}, ValueError, r"^counts: expected 0 to 4, and at most the "),
    *(({name: torch.zeros(3, 2, 8)}, TypeError, rf"^{name}: expected a PagedKV, got Tensor$") for name in NAMES),
    ({"blocks": 64}, TypeError, r"^blocks: expected a BlockGeometry, got int$"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_arguments_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = batch()
    BACKEND.decode_attention(**arguments)  # what was found right is remembered
    arguments |= change
    for run in (BACKEND.decode_attention, reference.decode_attention):
        with pytest.raises(error, match=message):
            run(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_pages_that_do_not_fit(name: str) -> None:
    arguments = batch()
    BACKEND.decode_attention(**arguments)
    good = arguments[name]
    wrong_heads = PagedKV(good.pages[:, :, :1], good.block_table, good.lengths)
    scaled = PagedKV(good.pages, good.block_table, good.lengths, k_scale=torch.ones(1))
    fewer = PagedKV(good.pages, good.block_table[:3], good.lengths[:3])
    for bad, error, message in (
        (wrong_heads, ValueError, "expected kv heads that divide q's 4 heads, the same of every branch, got [12]"),
        (scaled, ValueError, "expected pages without k_scale and v_scale"),
        (fewer, ValueError, "expected 6 sequences of q, got 3 in block_table"),
        (PagedKV(good.pages.float(), good.block_table, good.lengths), TypeError, "expected dtype torch.float64 of q"),
    ):
        with pytest.raises(error, match=message):
            BACKEND.decode_attention(**(arguments | {name: bad}))


def test_lengths_of_another_batch() -> None:
    arguments = batch()
    BACKEND.decode_attention(**arguments)
    for name in ("k_cmp", "k_win"):
        good = arguments[name]
        bad = PagedKV(good.pages, good.block_table, (good.lengths - 1).clamp_min(0))
        with pytest.raises(ValueError, match=rf"^{name}: expected lengths .* as k_slc has them, got "):
            BACKEND.decode_attention(**(arguments | {name: bad}))
