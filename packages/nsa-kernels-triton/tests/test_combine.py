"""The gated sum against the oracle. Runs on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.contracts import interpreted
from nsa_varlen import reference, sdpa
from nsa_varlen.testing import assert_within_budget, errors, poisoned_empty
from torch import Tensor

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = pytest.mark.skipif(
    not interpreted() and not torch.cuda.is_available(), reason="needs CUDA or TRITON_INTERPRET=1"
)


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, gates_dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(*shape[:2], 3, generator=generator).to(DEVICE, gates_dtype)
    return [gates, *(torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3))]


def combine(*args: Tensor) -> Tensor:
    with poisoned_empty():
        out = BACKEND.combine(*args)
    assert out.dtype == args[1].dtype
    assert out.shape == args[1].shape
    assert out.is_contiguous()
    return out


def exact_sum(*args: Tensor) -> Tensor:
    return reference.combine(*(x.double() for x in args))


@pytest.mark.parametrize("gates_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (5, 3, 8), (37, 4, 24), (9, 6, 96), (8, 2, 128), (3, 5, 256)])
def test_combine(shape: tuple[int, int, int], dtype: torch.dtype, gates_dtype: torch.dtype) -> None:
    args = make_inputs(shape, dtype, gates_dtype)
    out, exact = combine(*args), exact_sum(*args)
    plain = sdpa.BACKEND.combine(*args)
    assert plain.dtype == out.dtype
    if dtype == torch.float32:
        assert errors(out, exact)[0] <= 1e-6
    else:
        assert_within_budget(out, plain, exact)


def test_strides() -> None:
    gates, *branches = make_inputs((21, 3, 24), torch.float32, torch.float32)
    exact = exact_sum(gates, *branches)
    strided_gates = gates.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wider = torch.cat((branches[0], branches[0] + 1), -1)[..., :24]
    by_head = branches[1].transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((branches[2], branches[2] + 1), -1)[..., 0]
    assert errors(combine(strided_gates, wider, by_head, spread), exact)[0] <= 1e-6
    shared = gates[:1, :1].expand_as(gates)
    assert errors(combine(shared, *branches), exact_sum(shared, *branches))[0] <= 1e-6


def test_runs_are_equal() -> None:
    args = make_inputs((21, 3, 24), torch.float16, torch.float32)
    assert torch.equal(combine(*args), combine(*args))


def test_operator() -> None:
    operator = torch.ops.nsa_kernels_triton.combine.default
    args = tuple(make_inputs((5, 3, 24), torch.float16, torch.float32))
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
