"""Does what surrounds a call leave it alone: strides, autocast, inference mode, which gradients are asked for?"""

from itertools import product
from typing import Any

import pytest
import torch
from nsa_fa2 import FlashBackend
from nsa_fa2.testing import Case, PlainKernel, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from nsa_varlen.testing import assert_within_budget, plain_attention, to_pages
from torch import Tensor

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)
BATCHES = {
    "one": ([10], [21]),
    "uniform": ([8] * 2, [15] * 2),
    "ragged": ([5, 0, 9, 1, 2, 4, 3], [5, 6, 9, 21, 0, 17, 1]),
}


@pytest.fixture(params=list(product(OPS, BATCHES)), ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    op, batch = request.param
    return Case.random(op, VarlenLayout.from_lengths(*BATCHES[batch]), BLOCKS, v_head_dim=6)


def ask(case: Case, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    return getattr(plain_backend(), case.op)(*qkv, *case.rest)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


STRIDED = {
    "heads-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dims-first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "part-of-a-wider-one": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "backwards-in-memory": lambda x: x.flip(2).contiguous().flip(2),
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("how", STRIDED)
def test_strides_change_nothing(case: Case, how: str) -> None:
    """Of q, k, v and the gradient; which products round otherwise is a kernel's own."""
    expected = case.run(plain_backend())
    leaves = [STRIDED[how](x).detach().requires_grad_() for x in case[1:4]]
    out, lse = ask(case, *leaves)
    out.backward(STRIDED[how](case.grad_out))
    case.assert_close({"out": out.detach(), "lse": lse} | gradients(leaves), expected)


def gradients(leaves: list[Tensor]) -> dict[str, Tensor]:
    return {f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}


def test_an_expanded_gradient_and_expanded_inputs(case: Case) -> None:
    """As `out.sum()` makes one; and one row of q for all."""
    ones = torch.ones((), dtype=torch.float64).expand_as(case.grad_out)
    q = case.q[:1].expand_as(case.q)
    expected = case._replace(q=q.contiguous(), grad_out=ones.contiguous()).run(plain_backend())
    leaves = [x.detach().requires_grad_() for x in (q, case.k, case.v)]
    out, _ = ask(case, *leaves)
    out.backward(ones)
    case.assert_close(gradients(leaves), expected)


@pytest.mark.parametrize("wanted", [w for w in product((False, True), repeat=3) if any(w)], ids=str)
def test_gradients_asked_for_in_part_are_those_asked_for_together(case: Case, wanted: tuple[bool, ...]) -> None:
    expected = case.run(plain_backend())
    leaves = [x.clone().requires_grad_(needed) for x, needed in zip(case[1:4], wanted, strict=True)]
    out, lse = ask(case, *leaves)
    assert not lse.requires_grad
    out.backward(case.grad_out)
    for (name, grad), needed in zip(gradients(leaves).items(), wanted, strict=True):
        assert torch.equal(grad, expected[name]) if needed else grad is None


def test_lse_has_no_gradient_and_there_is_no_second_derivative(case: Case) -> None:
    q, k, v = (x.clone().requires_grad_() for x in case[1:4])
    out, lse = ask(case, q, k, v)
    assert (out.requires_grad, lse.requires_grad) == (True, False)
    with pytest.raises(RuntimeError, match=r"^backward: expected create_graph=False, got True"):
        torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)


def test_a_graph_may_be_walked_twice(case: Case) -> None:
    leaves = [x.clone().requires_grad_() for x in case[1:4]]
    out, _ = ask(case, *leaves)
    first, second = (torch.autograd.grad(out, leaves, case.grad_out, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def on_a_new_layout(case: Case) -> Case:
    layout = case.rest[-2]
    lengths = (x.diff().tolist() for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    return case._replace(rest=(*case.rest[:-2], VarlenLayout.from_lengths(*lengths), BLOCKS))


def test_inference_mode(case: Case) -> None:
    """A layout first used there serves in training."""
    expected = case.run(plain_backend())
    fresh = on_a_new_layout(case)
    with torch.inference_mode():
        got = dict(zip(("out", "lse"), ask(fresh, *case[1:4]), strict=True))
    assert_same(got, expected)
    assert_same(fresh.run(plain_backend()), expected)


def test_pages_in_inference_mode(case: Case) -> None:
    """Also the plan of the rows that a window reaches serves outside afterwards."""
    layout = case.rest[-2]
    offsets = layout.compressed(BLOCKS).cu_seqlens if case.op == CMP else layout.cu_seqlens_k
    pages = [to_pages(x, offsets.diff().tolist(), 4) for x in (case.k, case.v)]
    with torch.inference_mode():
        inside = ask(case, case.q, *pages)
    for x, y in zip(inside, ask(case, case.q, *pages), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    case = case._replace(**{name: getattr(case, name).to(dtype) for name in ("q", "k", "v", "grad_out")})
    expected = case.run(plain_backend())
    with torch.autocast("cpu", dtype=torch.float16):
        got = case.run(plain_backend())
    assert_same(got, expected)
    assert got["out"].dtype == got["dk"].dtype == dtype
    assert got["lse"].dtype == torch.float32


def test_a_default_device_moves_nothing(case: Case) -> None:
    """Nothing can be read on the device "meta"."""
    expected = case.run(plain_backend())
    with torch.device("meta"):
        got = dict(zip(("out", "lse"), ask(on_a_new_layout(case), *case[1:4]), strict=True))
    assert_same(got, expected)


class Fused(PlainKernel):
    """Half precision in and out, as kernels have it: exact within, lse in fp32."""

    def forward(self, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*wide(tensors), **options)
        return out.to(tensors[0].dtype), lse.float()

    def backward(self, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(x.to(tensors[0].dtype) for x in super().backward(*wide(tensors), **options))


def wide(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in arguments]


def mask_of(case: Case) -> Tensor:
    if case.op == SLC:
        return masks.selected_mask(*case.rest)
    mask = masks.compressed_mask if case.op == CMP else masks.window_mask
    return mask(*case.rest)[:, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("lengths", [([150], [200]), ([150, 1, 60], [150, 90, 140])], ids=["one", "ragged"])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_keeps_its_budget(op: str, lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    """Batches large enough for a largest error to be no accident."""
    case = Case.random(op, VarlenLayout.from_lengths(*lengths), BlockGeometry(window_size=64), head_dim=32)
    half = case._replace(**{name: getattr(case, name).to(dtype) for name in ("q", "k", "v", "grad_out")})
    got = half.run(FlashBackend("fused", Fused(), lambda environment: None))

    def plain(*qkv: Tensor) -> dict[str, Any]:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = plain_attention(*leaves, mask_of(half))
        out.backward(half.grad_out.to(out.dtype))
        return {"out": out.detach()} | gradients(leaves)

    exact, rounded = plain(*(x.double() for x in half[1:4])), plain(*half[1:4])
    for name, x in exact.items():
        assert got[name].dtype == dtype
        assert_within_budget(got[name], rounded[name], x, name)
