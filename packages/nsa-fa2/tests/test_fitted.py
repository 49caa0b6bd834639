"""Do providers get one head dim and rows that begin at multiples of 16 bytes, and do results fit what was asked?"""

import math
from typing import Any

import pytest
import torch
from nsa_fa2 import FlashBackend
from nsa_fa2.providers.cudnn import Cudnn
from nsa_fa2.providers.shapes import ALIGNMENT, FittedKernel, aligned, fitted
from nsa_fa2.testing import ANYTHING, Case, PlainKernel
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor

OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)
BATCHES = {
    "one": ([10], [21]),
    "uniform": ([8] * 2, [15] * 2),
    "ragged": ([5, 0, 9, 1, 2, 4, 3], [5, 6, 9, 21, 0, 17, 1]),
}


def is_aligned(x: Tensor) -> bool:
    """Every row of the last dim begins at a multiple of ALIGNMENT, and lies in one piece."""
    if x.numel() == 0:
        return True
    steps = [torch.arange(size) * step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    places = sum(torch.meshgrid(*steps, indexing="ij")) * x.element_size() + x.data_ptr()
    whole = x.shape[-1] == 1 or x.stride(-1) == 1
    return whole and not (places % ALIGNMENT).any()


class Particular(FittedKernel):
    """The plain kernel, for tensors as a provider's want them only."""

    limits = ANYTHING

    def __init__(self) -> None:
        self.plain = PlainKernel()
        self.dims: set[int] = set()

    def _checked(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert all(map(is_aligned, tensors))
        (dim,) = {x.shape[-1] for x in tensors}
        self.dims.add(dim)
        return tensors

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Any, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor]:
        tensors = self._checked(q, k, v)
        return self.plain.forward(*tensors, segments, scale=scale, causal=causal, window=window)

    def _backward(
        self,
        tensors: tuple[Tensor, ...],
        lse: Tensor,
        segments: Any,
        scale: float,
        causal: bool,
        window: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert lse.is_contiguous()
        options = {"scale": scale, "causal": causal, "window": window, "deterministic": deterministic}
        return self.plain.backward(*self._checked(*tensors), lse, segments, **options)


@pytest.mark.parametrize("dims", [(8, 8), (8, 4), (4, 8), (2, 6)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", OPS)
def test_one_head_dim_for_all_and_what_was_asked_for_back(op: str, batch: str, dims: tuple[int, int]) -> None:
    kernel = Particular()
    layout = VarlenLayout.from_lengths(*BATCHES[batch])
    case = Case.random(op, layout, BLOCKS, head_dim=dims[0], v_head_dim=dims[1])
    case.assert_oracles(FlashBackend("particular", kernel, lambda environment: None))
    assert kernel.dims == {max(dims)}


@pytest.mark.parametrize("op", OPS)
def test_strided_arguments_are_aligned_for_the_kernel(op: str) -> None:
    backend = FlashBackend("particular", Particular(), lambda environment: None)
    for lengths in BATCHES.values():
        case = Case.random(op, VarlenLayout.from_lengths(*lengths), BLOCKS)
        expected = case.run(backend)
        leaves = [shifted(x).requires_grad_() for x in case[1:4]]
        out, lse = getattr(backend, op)(*leaves, *case.rest)
        out.backward(shifted(case.grad_out))
        got = {f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}
        case.assert_close(got | {"out": out.detach(), "lse": lse}, expected)


def shifted(x: Tensor) -> Tensor:
    """The same values, each row 8 bytes past a multiple of 16, or the last dim with gaps."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    wide[..., 1::2] = x
    return wide[..., 1::2].detach()


def numbers(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float16).view(shape)


AS_THEY_ARE = {
    "contiguous": numbers(3, 2, 8),
    "heads-first": numbers(2, 3, 8).transpose(0, 1),
    "part-of-a-wider-one": numbers(3, 2, 24)[..., 8:16],
    "every-second-row": numbers(6, 2, 8)[::2],
    "expanded": numbers(1, 2, 8).expand(3, -1, -1),
    "a-single-row-of-any-stride": numbers(3, 9)[:1, :8],
    "empty": numbers(0, 2, 8),
    "multiples-of-8-in-any-place": numbers(5, 1, 16)[2:, :, 8:],
}
COPIED = {
    "offset": numbers(49)[1:].view(3, 2, 8),
    "odd-width": numbers(3, 2, 9)[..., :8],
    "gaps": numbers(3, 2, 16)[..., ::2],
    "dims-first": numbers(8, 3, 2).permute(1, 2, 0),
    "expanded-dims": numbers(3, 2, 1).expand(-1, -1, 8),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_what_can_be_read_is_not_copied(name: str) -> None:
    x = AS_THEY_ARE[name]
    assert is_aligned(x)
    assert aligned(x) is x
    assert fitted(x, x) == (x, x)


@pytest.mark.parametrize("name", COPIED)
def test_what_cannot_be_read_is_copied(name: str) -> None:
    x = COPIED[name]
    assert not is_aligned(x)
    copy = aligned(x)
    assert is_aligned(copy)
    assert copy.is_contiguous()
    assert torch.equal(copy, x)


def test_the_smaller_dim_is_padded_with_zeros() -> None:
    x, y = torch.ones(3, 2, 8), torch.ones(3, 2, 4)
    same, wider = fitted(x, y)
    assert same is x
    assert wider.tolist() == [[[1.0] * 4 + [0.0] * 4] * 2] * 3
    assert is_aligned(wider)


def test_cudnn_is_not_asked_about_a_single_key() -> None:
    """Its frontend refuses such a call; what stands in is plain torch, so it runs here."""
    generator = torch.Generator().manual_seed(0)
    q, grad_out = torch.randn(2, 2, 3, 6, 8, generator=generator).unbind()  # each [b, Sq, H, D]
    k, v = torch.randn(2, 2, 1, 2, 8, generator=generator).unbind()
    mask = {"segments": None, "scale": 0.3, "causal": False, "window": None}
    got, expected = Cudnn().forward(q, k, v, **mask), PlainKernel().forward(q, k, v, **mask)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    kernels = Cudnn(), PlainKernel()
    grads = (x.backward(grad_out, q, k, v, *expected, **mask, deterministic=False) for x in kernels)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
