"""Does the plain-torch backend give on a GPU what it gives on a CPU? Everything else about it is tested there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nsa import NSAAttention, NSACache, NSAConfig, ops, reuse_block_indices
from nsa_varlen import BlockGeometry, VarlenLayout, masks, pack, reference, unpack
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import (
    Inputs,
    assert_within_budget,
    certified_inputs,
    plain_attention,
    poisoned_empty,
    random_inputs,
    run_ops,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=20)
LENGTHS = ([150, 0, 5, 1, 40], [150, 3, 70, 33, 40])
FP32 = 5e-5  # DESIGN: max-abs error of an fp32 backend at unit-scale inputs


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Within, whatever makes the host wait for the device raises."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.usefixtures("no_synchronisation")
def test_the_watch_for_synchronisation_sees_one() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


@pytest.mark.usefixtures("no_synchronisation")
def test_layouts_are_built_without_synchronisation() -> None:
    layout = VarlenLayout.from_lengths(*LENGTHS, device="cuda")
    numbers = {name: getattr(layout, name) for name in ("max_seqlen_q", "max_seqlen_k", "total_q", "total_k")}
    again = VarlenLayout.from_cu_seqlens(layout.cu_seqlens_q, layout.cu_seqlens_k, **numbers)
    pinned = VarlenLayout.from_lengths(*LENGTHS).pin_memory()
    assert pinned.cu_seqlens_q.is_pinned()
    moved = pinned.to("cuda")
    shaped = VarlenLayout.from_shape(2, 150, "cuda")
    for built in (layout, again, moved, shaped):
        assert built.device.type == "cuda"
        built.positions()
        built.key_positions()
    assert layout.compressed(BLOCKS).total == moved.compressed(BLOCKS).total
    assert shaped.host.compressed(BLOCKS).total == shaped.compressed(BLOCKS).total


def test_layouts_built_without_synchronisation_hold_the_right_offsets() -> None:
    """The copies are asynchronous: what they bring is read here, after the current stream."""
    expected = VarlenLayout.from_lengths(*LENGTHS)
    for built in (VarlenLayout.from_lengths(*LENGTHS, device="cuda"), expected.pin_memory().to("cuda")):
        assert torch.equal(built.cu_seqlens_k.cpu(), expected.cu_seqlens_k)
        assert torch.equal(built.compressed(BLOCKS).cu_seqlens.cpu(), expected.compressed(BLOCKS).cu_seqlens)
        assert torch.equal(built.positions().cpu(), expected.positions())


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["raw", "compressed"])
def test_buckets_are_made_and_used_without_synchronisation(blocks: BlockGeometry | None) -> None:
    layout = VarlenLayout.from_lengths([5, 7, 6, 1, 40, 33], [5, 7, 6, 30, 40, 33], device="cuda")
    x, out = torch.randn(92, 2, device="cuda", requires_grad=True), torch.zeros(92, 2, device="cuda")
    for bucket in layout.buckets(blocks):
        assert bucket.visible().shape == (*bucket.q_rows.shape, bucket.k_rows.shape[1])
        out = bucket.queries.scatter(bucket.queries.gather(x), out)
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("use", ["compressed", "buckets", "block_spans", "host"])
def test_offsets_on_a_device_alone_are_read_once_on_first_use(use: str) -> None:
    known = VarlenLayout.from_lengths(*LENGTHS, device="cuda")
    numbers = {name: getattr(known, name) for name in ("max_seqlen_q", "max_seqlen_k", "total_q", "total_k")}
    uses = {
        "compressed": lambda layout: layout.compressed(BLOCKS),
        "buckets": lambda layout: [bucket.visible() for bucket in (*layout.buckets(), *layout.buckets(BLOCKS))],
        "block_spans": lambda layout: layout.block_spans(BLOCKS),
        "host": lambda layout: layout.host,
    }
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = VarlenLayout.from_cu_seqlens(known.cu_seqlens_q, known.cu_seqlens_k, **numbers)
        uses[use](known)
        with pytest.raises(RuntimeError, match="synchronizing"):
            uses[use](layout)
        torch.cuda.set_sync_debug_mode(mode)
        uses[use](layout)
        torch.cuda.set_sync_debug_mode("error")
        for again in uses.values():
            again(layout)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.usefixtures("no_synchronisation")
def test_packing_with_numbers_does_not_synchronise() -> None:
    mask = torch.arange(6, device="cuda") < torch.arange(1, 4, device="cuda")[:, None] * 2
    x = torch.randn(3, 6, 4, device="cuda", requires_grad=True)
    packed, layout, pad_index = pack(x, mask, max_seqlen=6, total=12)
    unpack(packed, pad_index).sum().backward()
    assert (packed.shape, layout.total_q, x.grad.shape) == ((12, 4), 12, x.shape)


def test_operations_and_gradients_match_the_oracle() -> None:
    layout = VarlenLayout.from_lengths(*LENGTHS)
    inputs, _ = certified_inputs(layout, BLOCKS, dtype=torch.float32)
    exact_inputs = inputs.to(torch.float64).leaves()
    exact = run_ops(reference, exact_inputs, layout, BLOCKS)
    exact.out.sum().backward()
    cuda_inputs = type(inputs)(*(x.cuda() for x in inputs)).leaves()
    with poisoned_empty():
        got = run_ops(BACKEND, cuda_inputs, layout.to("cuda"), BLOCKS)
        got.out.sum().backward()
    assert torch.equal(got.block_indices.cpu(), exact.block_indices)
    for name in ("k_cmp", "o_cmp", "o_slc", "o_win", "out"):
        assert float((getattr(got, name).detach().cpu() - getattr(exact, name).detach()).abs().amax()) <= FP32, name
    for name in ("lse_cmp", "lse_slc", "lse_win"):
        lse, expected = getattr(got, name).cpu().double(), getattr(exact, name)
        torch.testing.assert_close(lse, expected.double(), rtol=1e-6, atol=1e-5)
    for name, x, y in zip(("q", "k", "v", "gates"), cuda_inputs, exact_inputs, strict=True):
        # Gradients of a sum over up to 196 queries: their scale, not 1, is what rounding is relative to.
        assert float((x.grad.cpu() - y.grad).abs().amax()) <= FP32 * float(y.grad.abs().amax().clamp_min(1)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_keeps_its_budget(dtype: torch.dtype) -> None:
    layout = VarlenLayout.from_lengths([2048], device="cuda")
    inputs = random_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=dtype)
    q, k, v = (x.double() for x in inputs[:3])
    out, _ = BACKEND.window_attention(*inputs[:3], layout, BlockGeometry())
    exact, _ = reference.window_attention(q, k, v, layout, BlockGeometry())
    mask = masks.window_mask(layout, BlockGeometry())[:, None]
    assert_within_budget(out, plain_attention(*inputs[:3], mask), exact)


def test_forward_and_backward_repeat_bit_by_bit() -> None:
    layout = VarlenLayout.from_lengths(*LENGTHS, device="cuda")
    inputs = random_inputs(layout, dtype=torch.float32)
    runs = []
    for _ in range(5):
        leaves = inputs.leaves()
        out = run_ops(BACKEND, leaves, layout, BLOCKS).out
        out.sum().backward()
        runs.append([out, *(x.grad for x in leaves)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("compression", ["mean", "weighted_pool", "linear", "mlp"])
def test_decode_continues_prefill(compression: str) -> None:
    torch.manual_seed(0)
    config = NSAConfig(
        32, 4, 2, 8, kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12, compression=compression
    )
    layer, x = NSAAttention(config).double().cuda(), torch.randn(2, 70, 32, dtype=torch.float64, device="cuda")
    cache = NSACache(config, 2, 70, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        parts = [layer(part, cache=cache) for part in (x[:, :50], *x[:, 50:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.alone
def test_long_prefill_stays_bounded() -> None:
    """64k tokens, 16 query and 4 kv heads, bf16: far less memory than one [Tq, Tk] matrix of logits."""
    layout = VarlenLayout.from_lengths([65_536], device="cuda")
    q, k = (torch.randn(65_536, h, 64, device="cuda", dtype=torch.bfloat16) for h in (16, 4))
    gates = torch.rand(65_536, 16, 3, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out = run_ops(BACKEND, Inputs(q, k, k, gates), layout, BlockGeometry()).out
    assert bool(out.isfinite().all())
    assert torch.cuda.max_memory_allocated() - before < 4 << 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast_does_with_dtypes_what_it_does_for_torchs_attention(dtype: torch.dtype) -> None:
    layout = VarlenLayout.from_lengths([50], device="cuda")
    q, k, v = (torch.randn(50, 4, 8, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))
        out, _ = ops.window_attention(q, k, v, layout, BLOCKS)
    assert out.dtype == expected.dtype
    out.sum().backward()
    assert {x.grad.dtype for x in (q, k, v)} == {dtype}


def test_a_checkpoint_reuses_indices_in_the_thread_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    select, selections = type(BACKEND).select_blocks, []

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        selections.append(0)
        return select(*args, **options)

    monkeypatch.setattr(type(BACKEND), "select_blocks", counted)
    torch.manual_seed(0)
    config = NSAConfig(32, 4, 2, 8, kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
    layer, x = NSAAttention(config).double().cuda(), torch.randn(2, 70, 32, dtype=torch.float64, device="cuda")
    gradients = []
    for options in ({}, {"context_fn": reuse_block_indices}):
        selections.clear()
        out = checkpoint(layer, x, use_reentrant=False, **options)
        gradients.append(torch.autograd.grad(out.square().sum(), tuple(layer.parameters())))
        assert len(selections) == (1 if options else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
