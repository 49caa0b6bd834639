"""The gated sum against the oracle. Runs on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.contracts import interpreted
from nsa_varlen import reference, sdpa
from nsa_varlen.testing import assert_within_budget, errors, gradients, poisoned_empty
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


def gradients_of(args: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    with poisoned_empty():
        found = gradients(BACKEND.combine, args, grad_out)
    for x, got in zip(args, found, strict=True):
        assert (got.dtype, got.shape, got.is_contiguous()) == (x.dtype, x.shape, True)
    return found


def assert_gradients_right(args: list[Tensor], grad_out: Tensor) -> None:
    """A gate's is a sum of Dv products in fp32, off by Dv u of their absolute sum, u = 2^-24; a branch's one product.

    Each is then rounded to its dtype, half a unit in the last place or half of the least number there is.
    """
    found = gradients_of(args, grad_out)
    doubles = [x.double() for x in args]
    exact = gradients(reference.combine, doubles, grad_out.double())
    sizes = gradients(reference.combine, [x.abs() for x in doubles], grad_out.double().abs())
    for got, right, size in zip(found, exact, sizes, strict=True):
        kind = torch.finfo(got.dtype)
        bound = args[1].shape[2] * 2.0**-24 * size
        bound = bound + (right.abs() + bound) * kind.eps / 2 + kind.smallest_normal * kind.eps / 2
        assert bool(((got.double() - right).abs() <= bound).all())


@pytest.mark.parametrize("gates_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (5, 3, 8), (37, 4, 24), (9, 6, 96), (3, 5, 256)])
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype, gates_dtype: torch.dtype) -> None:
    args = make_inputs(shape, dtype, gates_dtype)
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    assert_gradients_right(args, grad_out)


def test_gradients_of_strided_tensors() -> None:
    gates, *branches = make_inputs((21, 3, 24), torch.float32, torch.float32)
    views = [
        gates.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.cat((branches[0], branches[0] + 1), -1)[..., :24],
        branches[1].transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((branches[2], branches[2] + 1), -1)[..., 0],
    ]
    grad_out = torch.randn(21, 3, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_gradients_right(views, grad_out.transpose(0, 1).contiguous().transpose(0, 1))
    assert_gradients_right([gates[:1, :1].expand_as(gates), *branches], grad_out[:1, :1, :1].expand_as(grad_out))


def test_gradients_repeat_and_have_none_themselves() -> None:
    args = make_inputs((21, 3, 24), torch.float16, torch.float32)
    grad_out = torch.ones_like(args[1])
    assert all(map(torch.equal, gradients_of(args, grad_out), gradients_of(args, grad_out)))
    out = BACKEND.combine(*(x.requires_grad_() for x in args))
    d_gates, *_ = torch.autograd.grad(out, args, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        d_gates.sum().backward()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    args = make_inputs((5, 3, 8), torch.float32, torch.float32)
    expected = gradients_of(args, torch.ones_like(args[1]))
    for place, right in enumerate(expected):
        given = [x.clone().requires_grad_(i == place) for i, x in enumerate(args)]
        BACKEND.combine(*given).sum().backward()
        assert torch.equal(given[place].grad, right)
        assert [x.grad is None for x in given] == [i != place for i in range(4)]


def test_operator_of_the_backward() -> None:
    args = make_inputs((5, 3, 24), torch.float16, torch.float32)
    operators = torch.ops.nsa_kernels_triton
    checks = ("test_schema", "test_faketensor")
    given = torch.ones_like(args[1]), *args
    torch.library.opcheck(operators.combine_backward.default, given, test_utils=checks)
    leaves = tuple(x.clone().requires_grad_() for x in args)
    checks = (*checks, "test_autograd_registration")
    torch.library.opcheck(operators.combine.default, leaves, test_utils=checks)
