"""When a kernel fails in the middle of a real forward, does the layer's mathematics come out as if it had not?

A backend named `triton` runs sdpa and spoils what one operation returns; the last resort is the real sdpa.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa import nsa_attention, ops
from nsa_routing import closed, poll
from nsa_routing.tuning import PREFILL_OPS
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, testing
from nsa_varlen.op_inputs import op_inputs
from nsa_varlen.sdpa import BACKEND
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=6)
LAYOUT = VarlenLayout.from_lengths([9, 0, 20], [11, 2, 20])
FLOATING = [op for op in PREFILL_OPS if op != "select_blocks"]
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def bad(value: float, where: str = "out") -> Callable[[Any], Any]:
    """Multiply, so that gradients would be spoilt too, and set one element."""

    def spoil(result: Any) -> Any:
        out, *rest = result if isinstance(result, tuple) else (result,)
        if where == "lse":
            (lse,) = rest
            lse[..., -1] = value
            return out * 3, lse
        out = out * 3
        out = out.index_fill(0, torch.tensor([out.shape[0] - 1]), value)
        return (out, *rest) if rest else out

    return spoil


def raising(error: Exception) -> Callable[[Any], Any]:
    def spoil(result: Any) -> Any:
        raise error

    return spoil


COMPILATION = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})


def forward_and_backward(**options: Any) -> list[Tensor]:
    """Output and gradients of q, k, v and gates; `k` and `v` serve every branch."""
    q, k, v, gates = testing.random_inputs(LAYOUT, dtype=torch.float32).leaves()
    k_cmp, v_cmp = (ops.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    out = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, LAYOUT, BLOCKS, **options)
    out.square().sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad, gates.grad]


@pytest.fixture
def truth(install: Callable) -> list[Tensor]:
    """By sdpa alone, whose results are the same in every run."""
    install()
    return forward_and_backward()


@pytest.fixture
def triton(install: Callable, delegate: type, machine: Callable, flags: Callable) -> Callable[..., Any]:
    """Make a spoiling `triton` what perf takes; its results are checked in the same call."""

    def use(**spoil: Callable[[Any], Any]) -> Any:
        made = delegate("triton", **spoil)
        install(made)
        machine(90)
        flags(PRESET="perf", CHECK_FINITE="always")
        return made

    return use


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_a_sound_backend_runs_everything(triton: Callable, truth: list[Tensor]) -> None:
    made = triton()
    assert_same(forward_and_backward(), truth)
    assert set(made.ran) == set(PREFILL_OPS)
    assert closed() == frozenset()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("op", FLOATING)
def test_a_bad_out_changes_nothing(op: str, value: str, triton: Callable, truth: list[Tensor]) -> None:
    made = triton(**{op: bad(VALUES[value])})
    assert_same(forward_and_backward(), truth)
    assert closed() == {("triton", op, "cpu")}
    made.ran.clear()
    assert_same(forward_and_backward(), truth)
    assert set(made.ran) == set(PREFILL_OPS) - {op}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("op", [op for op in PREFILL_OPS if op.endswith("attention")])
def test_a_bad_lse_changes_nothing(op: str, value: str, triton: Callable, truth: list[Tensor]) -> None:
    triton(**{op: bad(VALUES[value], "lse")})
    assert_same(forward_and_backward(), truth)
    assert closed() == {("triton", op, "cpu")}


def test_everything_bad_at_once_changes_nothing(triton: Callable, truth: list[Tensor]) -> None:
    made = triton(**dict.fromkeys(FLOATING, bad(torch.nan)))
    assert_same(forward_and_backward(), truth)
    assert closed() == {("triton", op, "cpu") for op in FLOATING}
    made.ran.clear()
    assert_same(forward_and_backward(), truth)
    assert made.ran == ["select_blocks"]


@pytest.mark.parametrize("op", PREFILL_OPS)
@pytest.mark.parametrize(
    "error, stays_open",
    [(torch.cuda.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (COMPILATION("x"), False)],
    ids=["memory", "host memory", "compile"],
)
def test_what_does_not_run_changes_nothing(
    error: Exception, stays_open: bool, op: str, triton: Callable, truth: list[Tensor]
) -> None:
    triton(**{op: raising(error)})
    assert_same(forward_and_backward(), truth)
    assert closed() == (frozenset() if stays_open else {("triton", op, "cpu")})


@pytest.mark.parametrize("op", PREFILL_OPS)
def test_any_other_exception_is_the_callers(op: str, triton: Callable) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    triton(**{op: raising(error)})
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        forward_and_backward()
    assert caught.value is error


def test_who_asked_for_it_is_told(triton: Callable) -> None:
    triton(window_attention=bad(torch.nan))
    message = (
        r"^window_attention on triton, cpu: returned non-finite values for finite inputs; raised; .* NSA_BACKEND=window"
        r"_attention=triton NSA_CHECK_FINITE=off and call window_attention\(float32\[29, 4, 8\], float32\[33, 2, 8\], "
        r"float32\[33, 2, 8\], VarlenLayout.from_lengths\(\[9, 0, 20\], \[11, 2, 20\]\), BlockGeometry\(kernel_size=4, "
    )
    with pytest.raises(RuntimeError, match=message):
        forward_and_backward(backend="triton")


def test_flagged_results_close_the_route_for_later_calls(
    triton: Callable, flags: Callable, truth: list[Tensor]
) -> None:
    triton(combine=bad(torch.nan))
    flags(CHECK_FINITE="flag")
    assert forward_and_backward()[0].isnan().any()
    assert poll() == frozenset(), "the whole is known to be bad, not whose fault it is"
    assert forward_and_backward()[0].isnan().any()
    assert poll() == {("triton", "combine", "cpu")}
    assert_same(forward_and_backward(), truth)


def test_a_true_overflow_is_nobodys_fault(triton: Callable, caplog: Any) -> None:
    """Three times 60,000 is beyond fp16, on sdpa too."""
    made = triton()
    gates, o = torch.ones(2, 1, 3, dtype=torch.float16), torch.full((2, 1, 4), 60_000.0, dtype=torch.float16)
    assert ops.combine(gates, o, o, o).isinf().all()
    assert (made.ran, closed(), caplog.records) == (["combine"], frozenset(), [])


def test_spare_rows_of_pages_are_not_inputs(triton: Callable, install: Callable) -> None:
    """They hold NaN here; a bad result is still judged, and a good one is not blamed."""
    q, k, v, _ = testing.random_inputs(LAYOUT, dtype=torch.float32)
    paged = [testing.to_pages(x, LAYOUT.cu_seqlens_k.diff().tolist(), 16) for x in (k, v)]
    assert all(x.pages.isnan().any() for x in paged)
    made = triton()
    expected = ops.window_attention(q, *paged, LAYOUT, BLOCKS)
    assert (made.ran, closed()) == (["window_attention"], frozenset())
    triton(window_attention=bad(torch.nan))
    got = ops.window_attention(q, *paged, LAYOUT, BLOCKS)
    assert closed() == {("triton", "window_attention", "cpu")}
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def decoding() -> tuple[Any, ...]:
    """Two sequences, one and two new tokens of 70 and 20: one row is padding; pages hold NaN where no row is."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}
    args, _ = op_inputs("decode_attention", [1, 2], [70, 20], **sizes)
    assert all(x.pages.isnan().any() for x in args if isinstance(x, PagedKV))
    return args


@pytest.mark.parametrize("check", ["always", "flag"])
def test_decoding_is_no_fault(check: str, triton: Callable, flags: Callable) -> None:
    made = triton()
    flags(CHECK_FINITE=check)
    out, block_indices = ops.decode_attention(*decoding())
    assert (made.ran, poll(), closed()) == (["decode_attention"], frozenset(), frozenset())
    assert not out[0, 1].any(), "padding"
    assert (block_indices[0, 1] == -1).all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("check", ["always", "flag"])
def test_a_bad_decode_is_judged(value: str, check: str, triton: Callable, flags: Callable) -> None:
    args = decoding()
    expected = BACKEND.decode_attention(*args)
    made = triton(decode_attention=bad(VALUES[value]))
    flags(CHECK_FINITE=check)
    got = ops.decode_attention(*args)
    if check == "flag":
        assert not got[0].isfinite().all(), "what went out went out"
        assert poll() == frozenset(), "whose fault it is, the next call finds out"
        ops.decode_attention(*args)
        assert poll() == {("triton", "decode_attention", "cpu")}
        got = ops.decode_attention(*args)
    assert closed() == {("triton", "decode_attention", "cpu")}
    assert made.ran == ["decode_attention"] * (2 if check == "flag" else 1)
    assert_same(list(got), list(expected))


@pytest.mark.parametrize("check", ["always", "flag"])
def test_bad_inputs_of_a_decode_are_the_callers(check: str, triton: Callable, flags: Callable) -> None:
    made = triton()
    flags(CHECK_FINITE=check)
    q, *rest = decoding()
    q[1, 0] = torch.nan
    for _ in range(3):  # with a flag the second one looks at what it is given
        assert ops.decode_attention(q, *rest)[0].isnan().any()
        assert (made.ran, poll(), closed()) == (["decode_attention"], frozenset(), frozenset())
        made.ran.clear()


def test_bad_inputs_are_the_callers(triton: Callable) -> None:
    made = triton()
    q, k, v, _ = testing.random_inputs(LAYOUT, dtype=torch.float32)
    v[-1] = torch.nan
    assert ops.window_attention(q, k, v, LAYOUT, BLOCKS)[0].isnan().any()
    assert (made.ran, closed()) == (["window_attention"], frozenset())


def test_empty_batches_are_no_fault(triton: Callable) -> None:
    made = triton()
    layout = VarlenLayout.from_lengths([0, 0])
    q, k, v, _ = testing.random_inputs(layout, dtype=torch.float32)
    out, lse = ops.window_attention(q, k, v, layout, BLOCKS)
    assert (out.shape[0], lse.shape[1], made.ran, closed()) == (0, 0, ["window_attention"], frozenset())
