"""Is half precision at most twice as far from the truth as plain torch in the same dtype? And the choice of blocks?"""

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.sdpa import BACKEND, _selected
from nsa_varlen.testing import assert_within_budget, certified_inputs, errors, plain_attention, random_inputs, run_ops
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=5, window_size=40)
# Long sequences and short ones, of which some have company of their length.
LAYOUT = VarlenLayout.from_lengths([150, 30, 1, 20, 25, 28, 3], [150, 90, 77, 12, 25, 28, 20])
SIZES = {"heads": 8, "kv_heads": 2, "head_dim": 32}
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(params=HALF, ids=["fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1 << 40, 0], ids=["by-query", "by-block"])
def loop_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selected, "ROWS_PER_BLOCK", request.param)


def direction(like: Tensor) -> Tensor:
    """A fixed upstream gradient, exact in every dtype compared."""
    return torch.randint(-2, 3, like.shape, generator=torch.Generator().manual_seed(3)).to(like.dtype)


def with_gradients(inputs: list[Tensor], attend) -> list[Tensor]:
    """[out, dq, dk, dv]"""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    out.backward(direction(out))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_attention_within_budget(op: str, inputs: list[Tensor], mask: Tensor, *indices: Tensor) -> None:
    """The budget for the output and each gradient, all against the oracle in fp64 on the same (rounded) inputs."""
    exact = with_gradients(
        [x.double() for x in inputs],
        lambda *x: getattr(reference, op)(*x, *indices, LAYOUT, BLOCKS)[0],
    )
    plain = with_gradients(inputs, lambda *x: plain_attention(*x, mask))
    got = with_gradients(inputs, lambda *x: getattr(BACKEND, op)(*x, *indices, LAYOUT, BLOCKS)[0])
    for name, *tensors in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert tensors[0].dtype == inputs[0].dtype
        assert_within_budget(*tensors, name=f"{op} {name}")


def compressed(dtype: torch.dtype) -> list[Tensor]:
    inputs = random_inputs(LAYOUT, **SIZES)
    kv = [reference.compress_mean(x, LAYOUT, BLOCKS) for x in (inputs.k, inputs.v)]
    return [x.to(dtype) for x in (inputs.q, *kv)]


def test_compressed_attention(dtype: torch.dtype) -> None:
    mask = masks.compressed_mask(LAYOUT, BLOCKS)[:, None]
    assert_attention_within_budget("compressed_attention", compressed(dtype), mask)


def test_window_attention(dtype: torch.dtype) -> None:
    mask = masks.window_mask(LAYOUT, BLOCKS)[:, None]
    assert_attention_within_budget("window_attention", list(random_inputs(LAYOUT, **SIZES).to(dtype)[:3]), mask)


@pytest.mark.usefixtures("loop_order")
def test_selected_attention(dtype: torch.dtype) -> None:
    inputs = random_inputs(LAYOUT, **SIZES)
    indices = run_ops(reference, inputs, LAYOUT, BLOCKS).block_indices
    mask = masks.selected_mask(indices, LAYOUT, BLOCKS)
    assert_attention_within_budget("selected_attention", list(inputs.to(dtype)[:3]), mask, indices)


def test_compress_mean(dtype: torch.dtype) -> None:
    x = random_inputs(LAYOUT, **SIZES).k.to(dtype)
    member = torch.zeros(LAYOUT.compressed(BLOCKS).total, LAYOUT.total_k, dtype=dtype)
    first = LAYOUT.compressed_starts(BLOCKS) + LAYOUT.cu_seqlens_k[LAYOUT.sequence_of_compressed(BLOCKS)]
    member[torch.arange(len(member))[:, None], first[:, None] + torch.arange(BLOCKS.kernel_size)] = 1
    plain = torch.einsum("ct,thd->chd", member, x) / BLOCKS.kernel_size
    exact = reference.compress_mean(x.double(), LAYOUT, BLOCKS)
    assert_within_budget(BACKEND.compress_mean(x, LAYOUT, BLOCKS), plain, exact)


def test_combine(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gates, *outputs = (torch.randn(50, 4, n, generator=generator).to(dtype) for n in (3, 8, 8, 8))

    def plain(gates: Tensor, *outputs: Tensor) -> Tensor:
        return sum(gates[..., c, None] * o for c, o in enumerate(outputs))

    exact = with_gradients([x.double() for x in (gates, *outputs)], reference.combine)
    expected = with_gradients([gates, *outputs], plain)
    for name, *tensors in zip(
        ("out", "dgates", "dcmp", "dslc", "dwin"),
        with_gradients([gates, *outputs], BACKEND.combine),
        expected,
        exact,
        strict=True,
    ):
        assert_within_budget(*tensors, name=name)


def test_lse_of_half_precision_inputs_is_fp32_and_as_exact(dtype: torch.dtype) -> None:
    inputs = compressed(dtype)
    _, lse = BACKEND.compressed_attention(*inputs, LAYOUT, BLOCKS)
    _, exact = reference.compressed_attention(*(x.double() for x in inputs), LAYOUT, BLOCKS)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=5e-5)  # fp32 at unit scale


def test_certified_choices_are_the_oracles_in_half_precision(dtype: torch.dtype) -> None:
    """Products of half-precision numbers are exact in fp32: the scores are as good as fp32 ones."""
    layout = VarlenLayout.from_lengths([100, 23], [100, 60])
    inputs, k_cmp = certified_inputs(layout, BLOCKS, dtype=dtype, heads=4, kv_heads=2, head_dim=8)
    _, lse = BACKEND.compressed_attention(inputs.q, k_cmp, k_cmp, layout, BLOCKS)
    wide = inputs.q.double(), k_cmp.double()
    _, exact_lse = reference.compressed_attention(*wide, wide[1], layout, BLOCKS)
    expected = reference.select_blocks(*wide, exact_lse, layout, BLOCKS)
    assert torch.equal(BACKEND.select_blocks(inputs.q, k_cmp, lse, layout, BLOCKS), expected)


def test_uniform_attention_over_many_blocks_does_not_underflow() -> None:
    """At 16k blocks each probability is 6e-5, a subnormal of fp16: scores in half precision would tie or vanish."""
    blocks = BlockGeometry(kernel_size=2, kernel_stride=2, block_size=2, topk=4, init_blocks=0, local_blocks=1)
    layout = VarlenLayout.from_lengths([1], [32_768])
    k_cmp = torch.zeros(16_384, 1, 1, dtype=torch.float16)
    favoured = torch.tensor([16_000, 700, 9_000])
    k_cmp[favoured, 0, 0] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16) * 2**-10
    q = torch.ones(1, 2, 1, dtype=torch.float16)
    _, lse = BACKEND.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
    assert BACKEND.select_blocks(q, k_cmp, lse, layout, blocks).tolist() == [[[700, 9_000, 16_000, 16_383]]]


def test_the_budget_can_be_exceeded() -> None:
    exact = torch.linspace(0, 1, 100, dtype=torch.float64)
    plain, worse = exact + 1e-3, exact + 2.1e-3
    assert errors(plain, exact)[0] == pytest.approx(1e-3)
    assert_within_budget(exact + 1.9e-3, plain, exact)
    with pytest.raises(AssertionError, match=r"dq: max-abs error 2\.100e-03"):
        assert_within_budget(worse, plain, exact, "dq")
    with pytest.raises(AssertionError, match=r"RMS error"):
        assert_within_budget(worse, torch.cat([exact[:99], exact[99:] + 2e-3]), exact)
    with pytest.raises(AssertionError, match=r"max-abs error nan"):
        assert_within_budget(exact * torch.nan, plain, exact)
