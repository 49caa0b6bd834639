"""Heads that lie 2^31 elements apart, as [H, T, D] memory of a long sequence has them: offsets are 64-bit."""

import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.contracts import interpreted
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.decode_testing import STREAMS, assert_equal, decode_case
from nsa_varlen.testing import random_inputs
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is mapped before it is there"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5, window_size=16)
LAYOUT = VarlenLayout.from_lengths([8], [40])
NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
APART = 2**30  # elements; three heads are more than 2^31 apart
ORGANISATIONS = {
    "by query": {"by_block": 0, "tma": 0, "rows": 16, "keys": 16},
    "by block": {"by_block": 1, "tma": 0, "rows": 16, "chunk_rows": 96, "programs": 2, "turns": 2},
}


def far(x: Tensor) -> Tensor:
    """A copy whose heads lie APART; only the pages that are touched take memory."""
    rows, heads, dim = x.shape
    size = (APART * (heads - 1) + rows * dim) * x.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    made = torch.frombuffer(memory, dtype=x.dtype).as_strided((rows, heads, dim), (dim, APART, 1))
    return made.copy_(x)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("op", ["compress_mean", "window", "compressed", "by query", "by block", "choice", "combine"])
def test_heads_far_apart(op: str, group: int) -> None:
    inputs = random_inputs(LAYOUT, heads=3, kv_heads=3 // group, head_dim=16, dtype=torch.float16)
    indices = torch.zeros(8, 3 // group, 1, dtype=torch.int32)
    lse = torch.zeros(3, 8)
    gates = torch.ones(8, 3, 3, dtype=torch.float16)
    compressed = slice(0, LAYOUT.compressed(BLOCKS).total)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        args = LAYOUT, BLOCKS
        if op == "compress_mean":
            return BACKEND.compress_mean(k, *args)
        if op == "window":
            return BACKEND.window_attention(q, k, v, *args)[0]
        if op == "compressed":
            return BACKEND.compressed_attention(q, k[compressed], v[compressed], *args)[0]
        if op == "choice":
            return BACKEND.select_blocks(q, k[compressed], lse, *args)
        if op == "combine":
            return BACKEND.combine(gates, q, q, q)
        return BACKEND.selected_attention(q, k, v, indices, *args, deterministic=True)[0]

    with configurations.overridden("selected_attention", **ORGANISATIONS.get(op, {})):
        assert torch.equal(run(*map(far, inputs[:3])), run(*inputs[:3]))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("op", ["compress_mean", "window", "compressed", "dq by parts", "dq by query", "combine"])
def test_gradients_of_heads_far_apart(op: str, group: int) -> None:
    q, k, v, _ = random_inputs(LAYOUT, heads=3, kv_heads=3 // group, head_dim=16, dtype=torch.float16)
    rows = slice(0, LAYOUT.compressed(BLOCKS).total)
    indices = torch.zeros(8, 3 // group, 1, dtype=torch.int32)
    gates = torch.ones(8, 3, 3, dtype=torch.float16)
    args = LAYOUT, BLOCKS
    given, run = {
        "compress_mean": ([k], lambda k: BACKEND.compress_mean(k, *args)),
        "window": ([q, k, v], lambda q, k, v: BACKEND.window_attention(q, k, v, *args)[0]),
        "compressed": ([q, k[rows], v[rows]], lambda q, k, v: BACKEND.compressed_attention(q, k, v, *args)[0]),
        "combine": ([q, q + 1, q - 1], lambda *outs: BACKEND.combine(gates, *outs)),
    }.get(op, ([q, k, v], lambda q, k, v: BACKEND.selected_attention(q, k, v, indices, *args, deterministic=True)[0]))
    small = {"rows": 16, "keys": 16, "chunk_rows": 96, "programs": 2, "turns": 2, "parts": int(op == "dq by parts")}

    def gradients(place: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [place(x).requires_grad_() for x in given]
        out = run(*leaves)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        return torch.autograd.grad(out, leaves, place(grad_out))

    with (
        configurations.overridden("selected_attention_backward", **small),
        configurations.overridden("selected_attention_dq", rows=16, keys=16, tma=0),
    ):
        assert all(map(torch.equal, gradients(far), gradients(torch.clone)))


@pytest.mark.parametrize("new", [None, "mean", "blocks"])
def test_pages_far_apart(new: str | None) -> None:
    """A decode step whose pages lie in a pool of more than 2^31 elements, the first at its end."""
    case = decode_case([70], [1], BLOCKS, heads=2, kv_heads=1, dtype=torch.float16, new=new)
    expected, near = case.copy(), case.copy()
    streams = {}
    for name in STREAMS:
        kv = near[name]
        count, size = len(kv.pages), kv.pages[0].numel()
        total = 2**31 // size + count + 1
        memory = mmap.mmap(-1, 2 * total * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        pages = torch.frombuffer(memory, dtype=torch.float16).view(total, *kv.pages.shape[1:])
        pages[-count:] = kv.pages
        table = torch.where(kv.block_table >= 0, kv.block_table + total - count, -1)
        streams[name] = PagedKV(pages, table, kv.lengths)
    found = near.changed(**streams).run(BACKEND)
    for got, right in zip(found, expected.run(BACKEND), strict=True):
        assert torch.equal(got, right)
    for name, kv in streams.items():
        assert_equal(name, kv.pages[-len(expected[name].pages) :], expected[name].pages)
