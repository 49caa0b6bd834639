"""Do the inputs fit every operation, and are they what the operation meets in a layer?"""

from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.op_inputs import op_inputs
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.sdpa._backend import OPS
from torch import Tensor

SMALL = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 3, "window_size": 5}
SIZES: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "v_head_dim": 6,
    "blocks": SMALL,
    "dtype": torch.float32,
    "device": "cpu",
}
FLOATS = {  # how many arguments record gradients
    "compress_mean": 1,
    "compressed_attention": 3,
    "select_blocks": 0,
    "selected_attention": 3,
    "window_attention": 3,
    "combine": 4,
    "decode_attention": 0,
}


def make(op: str, **changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return op_inputs(op, [17, 1], [20, 30], **(SIZES | changed))


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [BACKEND, reference], ids=["sdpa", "oracle"])
def test_every_operation_runs_on_them(op: str, backend: Any) -> None:
    args, kwargs = make(op)
    result = getattr(backend, op)(*args, **kwargs)
    rows = {"compress_mean": 9 + 14, "decode_attention": 2}.get(op, 17 + 1)  # num_cmp(20) = 9, num_cmp(30) = 14
    assert len(result if isinstance(result, Tensor) else result[0]) == rows


@pytest.mark.parametrize("op", OPS)
def test_equal_seeds_give_equal_values_and_others_do_not(op: str) -> None:
    first, again, other = (tensors(make(op, seed=seed)[0]) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("op", OPS)
def test_leaves_record_gradients_where_the_operation_has_one(op: str) -> None:
    args, kwargs = make(op, requires_grad=True)
    leaves = [x for x in tensors(args) if x.requires_grad]
    assert len(leaves) == FLOATS[op]
    assert all(x.is_leaf for x in leaves)
    assert not any(x.requires_grad for x in tensors(make(op)[0]))
    if leaves:
        result = getattr(BACKEND, op)(*args, **kwargs)
        out = result if isinstance(result, Tensor) else result[0]
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtype_is_that_of_all_but_lse_and_indices(op: str, dtype: torch.dtype) -> None:
    args, kwargs = make(op, dtype=dtype)
    assert tensors(args)[0].dtype == dtype
    others = {"select_blocks": [torch.float32], "selected_attention": [torch.int32], "decode_attention": [torch.int32]}
    assert [x.dtype for x in tensors(args) if x.dtype != dtype] == others.get(op, [])
    getattr(BACKEND, op)(*args, **kwargs)


def test_later_operations_get_what_earlier_ones_make() -> None:
    """The raw k is the same for every operation, so the oracle can retrace the chain."""
    layout, blocks = VarlenLayout.from_lengths([17, 1], [20, 30]), BlockGeometry(**SMALL)
    (q, k, v, indices, *_), _ = make("selected_attention")
    (q_cmp, k_cmp, v_cmp, *_), _ = make("compressed_attention")
    (_, _, lse, *_), _ = make("select_blocks")
    assert torch.equal(q, q_cmp)
    bound = 4 * torch.finfo(torch.float32).eps * 5  # four rounded additions of values below 5
    for x, x_cmp in ((k, k_cmp), (v, v_cmp)):
        assert (reference.compress_mean(x, layout, blocks) - x_cmp).abs().max() <= bound
    _, exact = reference.compressed_attention(q.double(), k_cmp.double(), v_cmp.double(), layout, blocks)
    assert torch.equal(exact.isinf(), lse.isinf())
    assert (exact - lse)[exact.isfinite()].abs().max() <= 5e-5  # the bound of fp32 backends
    assert torch.equal(indices, BACKEND.select_blocks(q, k_cmp, lse, layout, blocks))


def test_sizes_are_those_asked_for() -> None:
    (q, k, v, layout, blocks), kwargs = op_inputs("window_attention", [7], **(SIZES | {"v_head_dim": None}))
    assert (q.shape, k.shape, v.shape, kwargs) == ((7, 4, 8), (7, 2, 8), (7, 2, 8), {})
    assert (layout.total_k, blocks) == (7, BlockGeometry(**SMALL))
    assert op_inputs("window_attention", [7], **(SIZES | {"blocks": None}))[0][4] == BlockGeometry()


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        ("attention", {}, ValueError, r"^op: expected one of \['compress_mean', .*\], got 'attention'$"),
        ("combine", {"dtype": torch.int32}, TypeError, r"^dtype: expected a floating-point dtype, got torch\.int32$"),
        ("combine", {"num_heads": 3}, ValueError, r"^num_heads: expected a multiple of num_kv_heads=2, got 3$"),
        ("combine", {"head_dim": 0}, ValueError, r"^head_dim: expected at least 1, got 0$"),
        ("combine", {"blocks": {"stride": 2}}, ValueError, r"^blocks: expected fields of \[.*\], got 'stride'$"),
        ("combine", {"blocks": {"topk": 1}}, ValueError, r"^topk: expected at least"),
    ],
)
def test_what_does_not_fit_is_named(op: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(op, **changed)
