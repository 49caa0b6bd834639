"""Do the branches come out right from an attention that takes dense batches only, asked for no more than is exact?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, dense, masks, reference
from nsa_varlen.dense import DenseForms, masked_attention
from nsa_varlen.testing import assert_within_budget, plain_attention, poisoned_empty, random_inputs, to_pages
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=7)
WIDE = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=64)
LAYOUTS = {
    "prefill": ([33, 5, 18, 1, 30], [33, 5, 18, 1, 30]),
    "prefix": ([20, 9, 3], [41, 40, 17]),
    "decode": ([1] * 7, [9, 30, 12, 1, 31, 17, 8]),
    "empty-sequences": ([0, 7, 3, 5, 0], [6, 0, 0, 31, 0]),
    "negative-positions": ([12, 30, 4], [5, 25, 0]),
    "nothing": ([0, 2], [0, 0]),
    "no-sequence": ([], []),
}
OPS = ["compressed_attention", "selected_attention", "window_attention"]
# fp64 at unit scale: products of 8 terms and sums of up to 41, each relative to 2^-53, are off by some 1e-14; a key's
# gradient sums over up to 33 queries and 3 heads. An LSE is rounded to fp32 and lies below 8: half an ulp is 2.4e-7.
MAX_ABS, LSE_ABS = 1e-12, 5e-7


def arguments(op: str, layout: VarlenLayout, blocks: BlockGeometry) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v of `op`, and the indices if it takes them: in any order, with repetitions and rows without a block."""
    q, k, v, _ = random_inputs(layout, heads=6, v_head_dim=5)
    if op == "compressed_attention":
        k, v = (reference.compress_mean(x, layout, blocks) for x in (k, v))
    if op != "selected_attention":
        return [q, k, v], []
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, 12, (layout.total_q, 2, 5), generator=generator, dtype=torch.int32)
    indices[::5] = -1
    return [q, k, v], [indices]


def with_gradients(call: Callable[..., Any], qkv: list[Tensor], *rest: Any) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = call(*leaves, *rest)
    assert not lse.requires_grad
    out.backward(torch.arange(out.numel(), dtype=out.dtype).sin().reshape(out.shape))
    return {"out": out.detach(), "lse": lse} | {f"d{n}": x.grad for n, x in zip("qkv", leaves, strict=True)}


def assert_oracles(op: str, forms: DenseForms, layout: VarlenLayout, blocks: BlockGeometry) -> None:
    """out, LSE and gradients of all three inputs."""
    qkv, indices = arguments(op, layout, blocks)
    with poisoned_empty():
        got = with_gradients(getattr(forms, op), qkv, *indices, layout, blocks)
    expected = with_gradients(getattr(reference, op), qkv, *indices, layout, blocks)
    assert got["lse"].dtype == torch.float32
    for name, x in got.items():
        atol = LSE_ABS if name == "lse" else MAX_ABS
        torch.testing.assert_close(
            x.double(), expected[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    blind = expected["lse"].isinf().all(0)
    assert not got["out"][blind].any()
    assert not got["dq"][blind].any()


@pytest.mark.parametrize("logits", [1, 500, 1 << 26])
@pytest.mark.parametrize("blocks", [BLOCKS, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_results_and_gradients_are_the_oracles(
    name: str, op: str, blocks: BlockGeometry, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "CALL_LOGITS", logits)
    assert_oracles(op, DenseForms(masked_attention), VarlenLayout.from_lengths(*LAYOUTS[name]), blocks)


class Spy:
    """`masked_attention` that notes how it is called, checks what it is given and spoils what nobody may read."""

    def __init__(self) -> None:
        self.causal = self.masked = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        assert is_causal == (mask is None)
        self.causal += is_causal
        self.masked += not is_causal
        if mask is None:
            assert q.shape[1] == k.shape[1]
        else:
            assert (mask.dtype, mask.shape) == (torch.bool, (q.shape[0], q.shape[1], k.shape[1]))
            assert mask.numel() * q.shape[2] <= dense.CALL_LOGITS
        assert all(x.isfinite().all() for x in (q, k, v))
        out, lse = masked_attention(q, k, v, mask, scale=scale, is_causal=is_causal)
        padding = (q == 0).all(-1).all(-1)  # no random query is 0
        return out.masked_fill(padding[..., None, None], torch.nan), lse.masked_fill(padding[:, None], torch.nan)


@pytest.mark.parametrize(
    ("name", "op", "blocks", "causal", "masked"),
    [
        ("prefill", "window_attention", WIDE, True, False),
        ("prefill", "window_attention", BLOCKS, True, True),  # sequences of up to 7 tokens are no longer than w
        ("prefill", "compressed_attention", WIDE, False, True),
        ("prefill", "selected_attention", WIDE, False, True),
        ("prefix", "window_attention", WIDE, False, True),
        ("negative-positions", "window_attention", WIDE, True, False),  # the queries that see are as many as the keys
    ],
)
def test_no_mask_is_passed_only_where_plain_causal_attention_is_exact(
    name: str, op: str, blocks: BlockGeometry, causal: bool, masked: bool
) -> None:
    spy = Spy()
    assert_oracles(op, DenseForms(spy), VarlenLayout.from_lengths(*LAYOUTS[name]), blocks)
    assert (spy.causal > 0, spy.masked > 0) == (causal, masked)


def torch_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """torch's own attention, whose is_causal is top-left aligned and which has no LSE to give."""
    k_all, v_all = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    seen, blind = mask, None
    if mask is not None:  # before torch 2.5 a row without keys is NaN there: it sees all of them and is made 0
        blind = ~mask.any(-1)[:, None, :, None]
        seen = mask[:, None] | blind
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k_all, v_all, seen, is_causal=is_causal, scale=scale
    )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    _, lse = masked_attention(q, k, v, mask, scale=scale, is_causal=is_causal)
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("blocks", [BLOCKS, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("op", ["compressed_attention", "window_attention"])
@pytest.mark.parametrize("name", ["prefill", "prefix", "decode", "negative-positions"])
def test_the_attention_of_torch_serves_as_one(name: str, op: str, blocks: BlockGeometry) -> None:
    assert_oracles(op, DenseForms(torch_sdpa), VarlenLayout.from_lengths(*LAYOUTS[name]), blocks)


def test_a_causal_call_where_a_mask_is_due_would_be_noticed() -> None:
    """Top-left aligned, it hides most keys from queries behind a prefix."""

    def top_left_everywhere(*qkv: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
        return masked_attention(*qkv[:3], None, scale=scale, is_causal=True)

    layout = VarlenLayout.from_lengths(*LAYOUTS["prefix"])
    with pytest.raises(AssertionError, match="out"):
        assert_oracles("window_attention", DenseForms(top_left_everywhere), layout, WIDE)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["prefill", "prefix", "decode"])
def test_keys_may_be_in_pages(name: str, op: str) -> None:
    layout = VarlenLayout.from_lengths(*LAYOUTS[name])
    qkv, indices = arguments(op, layout, BLOCKS)
    offsets = layout.compressed(BLOCKS).cu_seqlens if op == "compressed_attention" else layout.cu_seqlens_k
    paged = [to_pages(x, offsets.diff().tolist(), 4, seed=seed) for seed, x in enumerate(qkv[1:])]
    call = getattr(DenseForms(masked_attention), op)
    for x, y in zip(call(qkv[0], *paged, *indices, layout, BLOCKS), call(*qkv, *indices, layout, BLOCKS), strict=True):
        assert torch.equal(x, y)


def test_rows_of_a_mask_may_be_empty() -> None:
    q, k, v = (torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[[True, False], [False, False]]])
    out, lse = masked_attention(q, k, v, mask, scale=1.0, is_causal=False)
    out.sum().backward()
    assert torch.equal(out[:, 0], v[:, 0])
    assert not out[:, 1].any()
    assert (lse[..., 1] == -torch.inf).all()
    assert not q.grad[:, 1].any()
    assert not v.grad[:, 1].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_keeps_its_budget(dtype: torch.dtype, autocast: bool) -> None:
    layout = VarlenLayout.from_lengths(*LAYOUTS["prefill"])
    inputs = random_inputs(layout, heads=8, head_dim=32).to(dtype)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, lse = DenseForms(masked_attention).window_attention(*inputs, layout, BLOCKS)
    exact, exact_lse = reference.window_attention(*(x.double() for x in inputs), layout, BLOCKS)
    assert out.dtype == dtype
    assert_within_budget(out, plain_attention(*inputs, masks.window_mask(layout, BLOCKS)[:, None]), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=5e-5)  # fp32 at unit scale


@pytest.mark.parametrize("logits", [1, 2 * 4 * 9 * 2, 2 * 4 * 9 * 4, 1 << 26])
def test_a_causal_call_holds_no_more_logits_than_a_masked_one(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    expected = with_gradients(masked_attention_of(mask, is_causal=False), [q, k, v])
    sizes = []
    matmul = torch.matmul

    def watched(x: Tensor, y: Tensor) -> Tensor:
        out = matmul(x, y)
        if y.shape[-2] == 16:  # keys, not values: there are at most 9
            sizes.append(out.numel())
        return out

    monkeypatch.setattr(dense, "CALL_LOGITS", logits)
    monkeypatch.setattr(torch, "matmul", watched)
    got = with_gradients(masked_attention_of(None, is_causal=True), [q, k, v])
    assert max(sizes) <= max(logits, 2 * 4 * 9)  # a row of the longest keys at least
    assert len(sizes) == {1: 9, 144: 5, 288: 3}.get(logits, 1)
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=LSE_ABS if name == "lse" else MAX_ABS)


def masked_attention_of(mask: Tensor | None, is_causal: bool) -> Callable[..., Any]:
    return lambda *qkv: masked_attention(*qkv, mask, scale=0.5, is_causal=is_causal)
