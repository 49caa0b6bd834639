"""Compressed and window attention against the oracle, and what such kernels get wrong.

Runs on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1.
"""

from collections.abc import Iterator

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import descriptors
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import assert_within_budget, errors, plain_attention, poisoned_empty
from torch import Tensor

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="needs CUDA or TRITON_INTERPRET=1"),
]
BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=21)
BRANCHES = ("compressed_attention", "window_attention")
LAYOUTS = {
    "nothing": ([0], [0]),
    "one": ([1], [1]),
    "prefix": ([5], [70]),
    "more queries than keys": ([40], [30]),
    "no keys": ([3, 4], [0, 9]),
    "ragged": ([33, 0, 7, 70, 1], [50, 3, 2, 70, 90]),
}
MIXED = ([33, 0, 7, 50], [50, 3, 2, 90])


@pytest.fixture(params=[0, 1], ids=["pointers", "descriptors"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiles of 16 keys, fewer than any query's interval has, loaded either way."""
    numbers = {"rows": 16, "keys": 16, "tma": request.param}
    with overridden("compressed_attention", **numbers), overridden("window_attention", **numbers):
        yield


def make_inputs(
    branch: str,
    layout: VarlenLayout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normal q, k, v of one branch: the compressed rows are drawn, not pooled, which keeps them at unit scale."""
    generator = torch.Generator().manual_seed(seed)
    keys = layout.compressed(BLOCKS).total if branch == "compressed_attention" else layout.total_k
    sizes = (layout.total_q, heads, dims[0]), (keys, kv_heads, dims[0]), (keys, kv_heads, dims[1])
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes)
    return q, k, v


def make_layout(lengths: tuple[list[int], list[int]]) -> VarlenLayout:
    return VarlenLayout.from_lengths(*lengths, device=DEVICE)


def make_mask(branch: str, layout: VarlenLayout) -> Tensor:
    mask = masks.compressed_mask if branch == "compressed_attention" else masks.window_mask
    return mask(layout, BLOCKS)[:, None]


def attend(branch: str, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, **options: float) -> tuple[Tensor, ...]:
    with poisoned_empty():
        out, lse = getattr(BACKEND, branch)(q, k, v, layout, BLOCKS, **options)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert out.shape == (*q.shape[:2], v.shape[2])
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    return out, lse


def assert_close(branch: str, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, **options: float) -> None:
    """As the oracle in fp64: fp32 to 5e-5, half precision to the error budget."""
    out, lse = attend(branch, q, k, v, layout, **options)
    exact, exact_lse = getattr(reference, branch)(q.double(), k.double(), v.double(), layout, BLOCKS, **options)
    hidden = exact_lse.isinf()
    assert torch.equal(lse.isinf(), hidden)
    assert not lse.isnan().any()
    assert not out[hidden.T].any()
    assert errors(lse.masked_fill(hidden, 0.0), exact_lse.masked_fill(hidden, 0.0))[0] <= 5e-5
    if q.dtype == torch.float32:
        assert errors(out, exact)[0] <= 5e-5
    else:
        assert_within_budget(out, plain_attention(q, k, v, make_mask(branch, layout), **options), exact)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(branch: str, lengths: tuple[list[int], list[int]]) -> None:
    layout = make_layout(lengths)
    assert_close(branch, *make_inputs(branch, layout), layout)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"),
    [
        (1, 1, (8, 8)),
        (4, 2, (24, 64)),
        (3, 1, (64, 24)),
        (4, 1, (96, 1)),
        (10, 2, (64, 64)),
        (16, 1, (16, 96)),
        (64, 1, (8, 16)),
        (2, 2, (192, 128)),
        (2, 1, (256, 200)),
    ],
)
def test_heads(branch: str, dtype: torch.dtype, heads: int, kv_heads: int, dims: tuple[int, int]) -> None:
    layout = make_layout(MIXED)
    inputs = make_inputs(branch, layout, heads=heads, kv_heads=kv_heads, dims=dims, dtype=dtype)
    assert_close(branch, *inputs, layout)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 16, "keys": 16},
        {"rows": 32, "keys": 16},
        {"rows": 64, "keys": 128},
    ],
    ids=str,
)
def test_sizes_of_tiles(branch: str, sizes: dict[str, int]) -> None:
    layout = make_layout(MIXED)
    for dims in ((16, 24), (48, 16)):
        with overridden(branch, **sizes):
            assert_close(branch, *make_inputs(branch, layout, dims=dims), layout)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("group_size", [3, 5])
def test_rows_that_no_query_fills(branch: str, group_size: int) -> None:
    """16 rows are no multiple of the group: what is left must not pass for the next tile's first query."""
    layout = make_layout(([31], [45]))
    with overridden(branch, rows=16, keys=16):
        assert_close(branch, *make_inputs(branch, layout, heads=group_size, kv_heads=1), layout)


@pytest.mark.parametrize("branch", BRANCHES)
def test_strides(branch: str) -> None:
    layout = make_layout(MIXED)
    q, k, v = make_inputs(branch, layout, dims=(24, 24))
    q_view = torch.cat((q, q + 1), -1)[..., :24]
    k_view = k.transpose(0, 1).contiguous().transpose(0, 1)
    v_spread = torch.stack((v, v + 1), -1)[..., 0]
    v_shared = v[:, :1].expand(-1, 2, -1)
    for values in (v_spread, v_shared):
        assert_close(branch, q_view, k_view, values, layout)
        expected = attend(branch, q, k, values.contiguous(), layout)
        assert all(map(torch.equal, attend(branch, q_view, k_view, values, layout), expected))


@pytest.mark.parametrize("branch", BRANCHES)
def test_scale_and_large_logits(branch: str) -> None:
    layout = make_layout(MIXED)
    q, k, v = make_inputs(branch, layout)
    assert_close(branch, q, k, v, layout, scale=1.5)
    big = 100 * torch.randn(q.shape[0], 1, 1, generator=torch.Generator().manual_seed(1)).to(q)
    out, lse = attend(branch, q * big, k, v, layout)
    exact, exact_lse = getattr(reference, branch)((q * big).double(), k.double(), v.double(), layout, BLOCKS)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("branch", BRANCHES)
def test_number_of_keys(branch: str) -> None:
    """q = 0 weighs all keys alike: the LSE counts them, and values that are positions tell which they are."""
    layout = make_layout(([70, 30], [70, 45]))
    q, k, v = make_inputs(branch, layout)
    seen = make_mask(branch, layout)[:, 0].double()
    row = torch.arange(len(v), device=DEVICE, dtype=torch.float32)
    out, lse = attend(branch, torch.zeros_like(q), k, row[:, None, None].expand_as(v), layout)
    torch.testing.assert_close(lse[0].double(), seen.sum(1).log(), rtol=0, atol=1e-5)
    mean = (seen @ row.double()) / seen.sum(1).clamp_min(1)
    torch.testing.assert_close(out[:, 0, 0].double(), mean, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("branch", BRANCHES)
def test_later_keys_change_nothing(branch: str) -> None:
    layout = make_layout(([60], [60]))
    q, k, v = make_inputs(branch, layout)
    out, lse = attend(branch, q, k, v, layout)
    unseen = ~make_mask(branch, layout)[:40, 0].any(0)
    k[unseen] *= 1e4
    v[unseen] -= 1e4
    changed, changed_lse = attend(branch, q, k, v, layout)
    assert torch.equal(changed[:40], out[:40])
    assert torch.equal(changed_lse[:, :40], lse[:, :40])
    assert not torch.equal(changed[40:], out[40:])


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("sizes", [{}, {"keys": 16}, {"rows": 16, "keys": 16, "tma": 1}], ids=str)
def test_unseen_keys_may_be_nan(branch: str, sizes: dict[str, int]) -> None:
    """Sequences without queries lie before, between and after; of the first with some, the window has passed most."""
    layout = make_layout(([0, 20, 0, 9, 0], [40, 70, 40, 9, 40]))
    q, k, v = make_inputs(branch, layout)
    unseen = ~make_mask(branch, layout)[:, 0].any(0)
    assert int(unseen.sum()) > 20
    expected = attend(branch, q, k, v, layout)
    k[unseen] = torch.nan
    v[unseen] = torch.nan
    with overridden(branch, **sizes):
        actual = attend(branch, q, k, v, layout)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES)
def test_descriptors_are_made_where_they_can_be(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = descriptors.tiles_of
    monkeypatch.setattr(descriptors, "tiles_of", lambda *args: made.append(real(*args)) or made[-1])
    layout = make_layout(MIXED)
    with overridden(branch, rows=16, keys=16, tma=1):
        attend(branch, *make_inputs(branch, layout), layout)
        assert len(made) == 2
        assert None not in made
        made.clear()
        assert_close(branch, *make_inputs(branch, layout, dims=(24, 16)), layout)
        assert None in made, "24 columns are no power of two"


@pytest.mark.parametrize("branch", BRANCHES)
def test_runs_are_equal(branch: str) -> None:
    layout = make_layout(MIXED)
    inputs = make_inputs(branch, layout)
    first, second = (attend(branch, *inputs, layout) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("branch", BRANCHES)
def test_operator(branch: str) -> None:
    """torch.library's own checks: the schema, and that the fake has the real one's shapes and strides."""
    layout = make_layout(([5, 4], [9, 20]))
    q, k, v = make_inputs(branch, layout, dims=(8, 24))
    args: list[object] = [layout.cu_seqlens_q, layout.cu_seqlens_k, BLOCKS.window_size, 0.5]
    if branch == "compressed_attention":
        args[2:3] = [layout.compressed(BLOCKS).cu_seqlens, BLOCKS.kernel_size, BLOCKS.kernel_stride]
    operator = getattr(torch.ops.nsa_kernels_triton, branch).default
    torch.library.opcheck(operator, (q, k, v, *args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("lengths", [([20], [10]), ([10], [30])], ids=str)
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_windows_of_any_size(window: int, lengths: tuple[list[int], list[int]]) -> None:
    """A position before the first key, less the window, must not come out beyond the last."""
    layout = VarlenLayout.from_lengths(*lengths, device=DEVICE)
    blocks = BlockGeometry(window_size=window)
    args = make_inputs("window_attention", layout)
    found = BACKEND.window_attention(*args, layout, blocks)
    exact = reference.window_attention(*(x.double() for x in args), layout, blocks)
    for got, right in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=5e-5)
