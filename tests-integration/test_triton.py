"""The Triton kernels through routing, interpreted on the CPU: a request launches them, and nothing else does."""

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import nsa_kernels_triton
import pytest
import torch
from nsa import NSAAttention, NSACache, NSAConfig, ops
from nsa_kernels_triton import configurations
from nsa_kernels_triton.contracts import OPS, interpreted
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, reference
from nsa_varlen.op_inputs import op_inputs
from nsa_varlen.sdpa import BACKEND as SDPA

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

LENGTHS = [40, 0, 100], [40, 9, 130]
FP32 = 5e-5  # what an fp32 kernel may be off by at unit-scale inputs


class Case(NamedTuple):
    """One way to run an operation, and the kernels that it launches; those of its backward, if it has one.

    `configuration`: tables of launch configurations, after each the numbers that hold in it instead. `lengths`: of
    queries and of keys; a decode step has one query of each sequence that has keys.
    """

    op: str
    kernels: set[str]
    num_heads: int = 4
    num_kv_heads: int = 2
    blocks: dict[str, int] | None = None
    configuration: tuple[Any, ...] = ()
    backward: frozenset[str] = frozenset()
    lengths: tuple[list[int], list[int]] = LENGTHS


SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 32, "topk": 4}
PAIRED = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 4}
BY_QUERY = {"by_block": 0, "tma": 0, "rows": 16, "keys": 16}
BY_BLOCK = {"by_block": 1, "tma": 0, "rows": 16, "chunk_rows": 4096, "programs": 2, "turns": 2}
BACKWARD = {"rows": 16, "keys": 16, "chunk_rows": 4096, "programs": 2, "turns": 2}
INTERVAL_BACKWARD = frozenset({"delta_kernel", "interval_dq_kernel", "interval_dkdv_kernel"})
CHOOSERS = frozenset({"mark_kernel", "tally_kernel", "rank_kernel", "items_kernel", "list_kernel"})
DECODING = {f"decode_{name}_kernel" for name in ("compressed", "choice", "levels", "selected", "merge")}
SELECTED_BACKWARD = CHOOSERS | {"delta_kernel", "block_gradients_kernel", "fold_kernel"}
CASES = {
    "pooling": Case("compress_mean", {"compress_mean_kernel"}, backward=frozenset({"compress_mean_backward_kernel"})),
    "compressed": Case("compressed_attention", {"interval_attention_kernel"}, backward=INTERVAL_BACKWARD),
    "window": Case(
        "window_attention", {"interval_attention_kernel"}, blocks={"window_size": 16}, backward=INTERVAL_BACKWARD
    ),
    "combine": Case("combine", {"combine_kernel"}, backward=frozenset({"combine_backward_kernel"})),
    "choice": Case("select_blocks", {"block_scores_kernel", "topk_kernel"}, 8, 1, blocks=SMALL),
    "paired choice": Case(
        "select_blocks",
        {"paired_block_scores_kernel", "topk_kernel"},
        blocks=PAIRED,
        configuration=("block_scores", {"keys": 32, "columns": 128, "num_warps": 4}),
    ),
    "by query": Case(
        "selected_attention",
        {"union_kernel", "shared_kernel"},
        blocks=SMALL,
        configuration=("selected_attention", BY_QUERY),
    ),
    "by block": Case(
        "selected_attention",
        {"count_kernel", "lay_out_kernel", "file_kernel", "near_kernel", "filed_kernel", "merge_kernel"},
        blocks=SMALL,
        configuration=("selected_attention", BY_BLOCK),
    ),
    "a decode step": Case("decode_attention", {"decode_compressed_kernel", "decode_selected_kernel"}, blocks=SMALL),
    "a decode step cut small": Case(
        "decode_attention",
        DECODING - {"decode_levels_kernel"},
        blocks=SMALL,
        configuration=(
            *("decode_compressed", {"splits": 4, "programs": 64}, "decode_selected", {"splits": 2, "programs": 64}),
        ),
    ),
    "a decode step of many blocks": Case(
        "decode_attention",
        DECODING,
        num_heads=1,
        num_kv_heads=1,
        blocks={"kernel_size": 32, "kernel_stride": 32, "block_size": 32, "topk": 35},
        configuration=(
            *("decode_compressed", {"splits": 4, "programs": 64}, "decode_selected", {"splits": 2, "programs": 64}),
            *("decode_choice", {"chunk": 64}),
        ),
        lengths=([1], [32 * 64 * 17]),
    ),
    "gradients by query": Case(
        "selected_attention",
        {"union_kernel", "shared_kernel"},
        blocks=SMALL,
        configuration=("selected_attention_backward", BACKWARD | {"parts": 0}),
        backward=SELECTED_BACKWARD | {"union_kernel", "shared_dq_kernel"},
    ),
    "gradients by block": Case(
        "selected_attention",
        {"union_kernel", "shared_kernel"},
        blocks=SMALL,
        configuration=("selected_attention_backward", BACKWARD | {"parts": 1}),
        backward=SELECTED_BACKWARD | {"sum_parts_kernel"},
    ),
}


@contextmanager
def launches() -> Iterator[set[str]]:
    """Names of the kernels that are launched within."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[str] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", noted)
        yield seen


def check(case: Case) -> None:
    """A routed call that names the backend launches the case's kernels, and its results are the oracle's.

    So with its gradients, if it has any: on the scale of the largest, for they are sums over many rows.
    """
    queries, keys = case.lengths
    if case.op == "decode_attention":
        queries = [min(1, length) for length in keys]
    args, kwargs = op_inputs(
        *(case.op, queries, keys),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=16,
        blocks=case.blocks,
        dtype=torch.float32,
        device="cpu",
        requires_grad=bool(case.backward),
    )
    doubles = [in_double(x) for x in args]
    expected = getattr(reference, case.op)(*doubles, **kwargs)
    with ExitStack() as stack:
        for table, numbers in zip(case.configuration[::2], case.configuration[1::2], strict=True):
            stack.enter_context(configurations.overridden(table, **numbers))
        with launches() as seen:
            found = getattr(ops, case.op)(*args, **kwargs, backend="triton", **determined(case))
        assert seen == case.kernels
        found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
        for got, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), exact.double(), rtol=0, atol=FP32 if is_float(got) else 0)
        if case.backward:
            with launches() as seen:
                found[0].sum().backward()
            assert seen == case.backward
            expected[0].sum().backward()
            for x, exact in zip(args, doubles, strict=False):
                if is_float(x):
                    largest = float(exact.grad.abs().max())
                    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=FP32 * max(1.0, largest))


def determined(case: Case) -> dict[str, bool]:
    """Nothing sampled beside: an overlap that is measured may launch a kernel more."""
    return {"deterministic": True} if case.op.endswith("attention") and case.op != "decode_attention" else {}


def in_double(x: Any) -> Any:
    """The same values in fp64, in a leaf of its own."""
    if isinstance(x, PagedKV):
        return PagedKV(x.pages.double(), x.block_table, x.lengths)
    return x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x == "gradients by query" else ()) for x in CASES]
)
def test_a_request_launches_the_kernels(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_sdpa_in_their_place_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right results are not enough: they must come from the kernels."""
    op = CASES[name].op
    monkeypatch.setattr(nsa_kernels_triton.TritonBackend, op, getattr(type(SDPA), op))
    with pytest.raises(AssertionError, match="kernel"):
        check(CASES[name])


def test_every_kernel_has_a_case() -> None:
    from nsa_kernels_triton import kernels

    modules = [import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    own = {name for m in modules for name, value in vars(m).items() if name.endswith("_kernel") and callable(value)}
    assert set().union(*(case.kernels | case.backward for case in CASES.values())) == own
    assert {case.op for case in CASES.values() if case.backward} == set(OPS) - {"select_blocks", "decode_attention"}
    assert {case.op for case in CASES.values()} == set(OPS)


def test_an_automatic_route_on_a_cpu_takes_none() -> None:
    layout = VarlenLayout.from_lengths([40])
    x = torch.randn(40, 2, 16)
    with launches() as seen:
        ops.compress_mean(x, layout, BlockGeometry())
    assert seen == set()


@pytest.mark.parametrize("layer", [{}, {"NSA_PRESET": "perf"}], ids=["safe", "perf"])
def test_what_a_request_cannot_have_is_said(layer: dict[str, str], flags: Callable) -> None:
    flags(**{name.removeprefix("NSA_"): value for name, value in layer.items()})
    layout = VarlenLayout.from_lengths([40])
    x = torch.randn(40, 2, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="takes float16, bfloat16 and float32, not float64"):
        ops.compress_mean(x, layout, BlockGeometry(), backend="triton")


def test_the_layer_learns_as_on_sdpa(flags: Callable) -> None:
    """Gradients of every parameter and of x, over a ragged batch, on the scale of the largest of each tensor.

    fp32 kernels may be off by FP32 on the scale of their results; a parameter's gradient passes through five of them.
    """
    torch.manual_seed(0)
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 32, "window_size": 10}
    places = {"topk": 2, "init_blocks": 0, "local_blocks": 1}
    layer = NSAAttention(NSAConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, **sizes, **places))
    layout = VarlenLayout.from_lengths([100, 0, 20])
    x, grad_out = torch.randn(120, 32), torch.randn(120, 32)

    def gradients(backend: str) -> dict[str, torch.Tensor]:
        flags(BACKEND=backend)
        leaf = x.clone().requires_grad_()
        named = {"x": leaf} | dict(layer.named_parameters())
        return dict(zip(named, torch.autograd.grad(layer(leaf, layout=layout), named.values(), grad_out), strict=True))

    found, expected = (gradients(backend) for backend in ("triton", "sdpa"))
    for name, right in expected.items():
        assert (found[name] - right).abs().max() <= 5 * FP32 * right.abs().max(), name


@pytest.mark.parametrize(
    "compression, rope_cmp", [("mean", "after"), ("weighted_pool", "after"), ("linear", "before"), ("mlp", "none")]
)
def test_the_layer_decodes_as_on_sdpa(compression: str, rope_cmp: str, flags: Callable) -> None:
    """Steps of one and of two tokens, over the emission of blocks and the beginning of a page, of a ragged batch.

    Two fp32 results of unit scale may lie twice as far apart as each from the exact one, and later steps read what
    earlier ones stored.
    """
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 32, "window_size": 10, "topk": 4}
    config = NSAConfig(
        32, num_heads=2, num_kv_heads=1, head_dim=16, compression=compression, rope_cmp=rope_cmp, **sizes
    )
    torch.manual_seed(0)
    layer, lengths = NSAAttention(config).eval(), [170, 5]
    prompt, steps = torch.randn(sum(lengths), 32), torch.randn(4, 2, 2, 32)

    def decoded(backend: str) -> list[torch.Tensor]:
        flags(BACKEND="sdpa")
        cache = NSACache(config, 2, 256, page_size=32)
        layer(prompt, layout=VarlenLayout.from_lengths(lengths), cache=cache)
        flags(BACKEND=f"decode_attention={backend}")
        found = []
        for number, x in enumerate(steps):
            counts = [1, 2] if number % 2 else [2, 1]
            cache.reserve(counts)
            found.append(layer.decode(x, cache, torch.tensor(counts, dtype=torch.int32)))
            cache.advance(counts)
        return found

    with torch.no_grad(), launches() as seen:
        found = decoded("triton")
    assert {"decode_compressed_kernel", "decode_selected_kernel"} <= seen
    with torch.no_grad():
        expected = decoded("sdpa")
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=2 * FP32)
