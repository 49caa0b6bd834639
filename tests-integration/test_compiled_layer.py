"""Is a compiled layer the layer, whatever its routes? And is it one graph where the operations are operators?"""

from collections.abc import Callable, Iterator

import pytest
import torch
from nsa import NSAAttention, NSAConfig, reuse_block_indices
from nsa_kernels_triton import BACKEND as TRITON
from nsa_kernels_triton.contracts import interpreted
from nsa_routing import closed, poll
from nsa_routing.tuning import PREFILL_OPS
from nsa_varlen import VarlenLayout
from nsa_varlen.sdpa import BACKEND as SDPA
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

# Graph breaks inside sdpa are allowed. These two warnings are about what Dynamo itself does around them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # advice, not taken: fp32 is compared
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def layer() -> NSAAttention:
    torch.manual_seed(0)
    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "window_size": 6}
    return NSAAttention(NSAConfig(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, **sizes))


def run(layer: Callable[..., Tensor], x: Tensor, layout: VarlenLayout | None = None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, layout=layout)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), grad


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["padded", "packed"])
def test_a_compiled_layer_equals_the_layer(packed: bool, layer: NSAAttention) -> None:
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(40, 24) if packed else torch.randn(2, 20, 24)
    layout = VarlenLayout.from_lengths([11, 29]) if packed else None
    for got, expected in zip(run(compiled, x, layout), run(layer, x, layout), strict=True):
        assert torch.equal(got, expected)


def test_a_compiled_layer_takes_the_routes_of_the_layer(
    layer: NSAAttention, install: Callable, machine: Callable, flags: Callable
) -> None:
    made = install("triton")["triton"]
    machine(90)
    flags(PRESET="perf", CHECK_FINITE="off")
    x = torch.randn(1, 20, 24)
    with torch.no_grad():
        expected = layer(x)
        ran, made.ran = made.ran, []
        got = torch.compile(layer, backend="eager")(x)
    assert torch.equal(got, expected)
    assert set(made.ran) == set(ran) == set(PREFILL_OPS)
    assert closed() == frozenset()


# --- one graph, forward and backward: backends whose operations are operators of torch.library

VARIANTS = {
    "mean": {},
    "mlp": {"compression": "mlp", "rope_cmp": "before", "rope_interleaved": True},
    "weighted_pool": {"compression": "weighted_pool", "shared_kv": True, "bias": True},
    "linear": {"compression": "linear", "rope_theta": None},
}
LENGTHS = [9, 41]


def make_layer(**changes: object) -> NSAAttention:
    """Blocks of 32, the smallest that the Triton kernels take; in 41 tokens the block of a query's own is a choice."""
    torch.manual_seed(0)
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 32, "topk": 2, "init_blocks": 0, "local_blocks": 1}
    return NSAAttention(
        NSAConfig(hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, window_size=6, **sizes, **changes)
    )


ONE_GRAPH = [("opaque", name, "flag") for name in VARIANTS] + [("opaque", "mean", "off")]
# Checks are nothing to a compression.
ONE_GRAPH += [pytest.param("opaque", name, "off", marks=pytest.mark.slow) for name in VARIANTS if name != "mean"]
# Interpreted kernels are slow, and the rest of the graph is the same.
ONE_GRAPH += [pytest.param("triton", "mean", "flag", marks=pytest.mark.slow)]


@pytest.fixture(params=["opaque", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, install: Callable, opaque: type, flags: Callable) -> str:
    """A backend of operators, obeyed in every operation."""
    if request.param == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    install(TRITON if request.param == "triton" else opaque("opaque"))
    flags(BACKEND=request.param)
    return request.param


def batch(packed: bool, layer: NSAAttention) -> tuple[Tensor, VarlenLayout | None]:
    if not packed:
        return torch.randn(2, 41, 16), None
    layout = VarlenLayout.from_lengths(LENGTHS)
    layout.compressed(layer.config.blocks)
    return torch.randn(sum(LENGTHS), 16), layout


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_the_forward_is_one_graph(packed: bool, backend: str) -> None:
    layer = make_layer()
    x, layout = batch(packed, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, layout=layout), layer(x, layout=layout))


def gradients(layer: Callable[..., Tensor], of: NSAAttention, x: Tensor, layout: VarlenLayout | None) -> list[Tensor]:
    """The output and the gradients of x and every parameter."""
    x = x.clone().requires_grad_()
    out = layer(x, layout=layout)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, *of.parameters()))]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """aot_eager runs the same kernels in the same order but decomposes some and sums a tensor's several gradients in
    another order: a few roundings of sums of at most 82 terms. They are those of the largest gradient where one is
    the difference of large numbers, as that of a bias of the compressed keys, which a softmax takes out again.
    """
    largest = max(float(y.abs().amax()) for y in expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("backend, name, check", ONE_GRAPH, indirect=["backend"])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
def test_forward_and_backward_are_one_graph(packed: bool, name: str, check: str, backend: str, flags: Callable) -> None:
    flags(CHECK_FINITE=check)
    layer = make_layer(**VARIANTS[name])
    x, layout = batch(packed, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, layer, x, layout), gradients(layer, layer, x, layout))
    assert poll() == frozenset()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["padded", "packed"])
def test_other_lengths_make_no_more_than_two_graphs(
    packed: bool, install: Callable, opaque: type, flags: Callable
) -> None:
    """One for the first lengths and one, with symbols for the numbers that the second changed, for all others."""
    install(opaque("opaque"))
    flags(BACKEND="opaque")
    layer = make_layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in ([20, 40], [25, 45], [33, 50], [60, 38], [70, 41]):
        layout = VarlenLayout.from_lengths(lengths)
        layout.compressed(layer.config.blocks)
        x = torch.randn(sum(lengths), 16) if packed else torch.randn(2, lengths[0], 16)
        gradients(compiled, layer, x, layout if packed else None)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reuse", [True, False], ids=["reused", "again"])
def test_a_compiled_checkpoint_selects_once(
    reuse: bool, install: Callable, opaque: type, flags: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator that selects is in the backward's graph only without `reuse_block_indices`."""
    install(opaque("opaque"))
    flags(BACKEND="opaque")
    select, selections = type(SDPA).select_blocks, []
    monkeypatch.setattr(
        type(SDPA), "select_blocks", lambda *args, **options: selections.append(0) or select(*args, **options)
    )
    layer, x = make_layer(), torch.randn(2, 41, 16)
    options = {"context_fn": reuse_block_indices} if reuse else {}

    def run(x: Tensor, layout: None) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, **options)

    expected = gradients(layer, layer, x, None)
    selections.clear()
    got = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), layer, x, None)
    assert len(selections) == (1 if reuse else 2)
    assert_close(got, expected)


@pytest.mark.parametrize(
    "backend, region",
    [("opaque", torch.bfloat16), pytest.param("triton", torch.float16, marks=pytest.mark.slow)],
    indirect=["backend"],
)
@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast_and_one_graph_go_together(where: str, region: torch.dtype, backend: str) -> None:
    """Parameters stay fp32; a region may lie inside the compiled function or around its call."""
    layer, x = make_layer(), torch.randn(2, 41, 16)

    def run(x: Tensor, layout: None) -> Tensor:
        with torch.autocast("cpu", dtype=region):
            return layer(x)

    expected = gradients(run, layer, x, None)
    if where == "inside":
        got = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), layer, x, None)
    else:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=region):
            got = gradients(compiled, layer, x, None)
    assert [y.dtype for y in got] == [y.dtype for y in expected] == [region, *[torch.float32] * (len(expected) - 1)]
    # A sum in another order may round to the neighbour, and the backward's few products carry that on.
    assert_close(got, expected, 4 * torch.finfo(region).eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_layer_on_a_gpu_is_one_graph_of_its_kernels(packed: bool, dtype: torch.dtype, flags: Callable) -> None:
    """What TorchInductor generates around the Triton kernels, and what it keeps for their backward."""
    flags(BACKEND="triton")
    torch.manual_seed(0)
    blocks = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 16, "window_size": 32}  # all blocks
    layer = NSAAttention(NSAConfig(128, num_heads=8, num_kv_heads=2, head_dim=64, **blocks)).to("cuda", dtype)
    x, layout = torch.randn(2, 300, 128, device="cuda", dtype=dtype), None
    if packed:
        x, layout = x.flatten(0, 1), VarlenLayout.from_lengths([90, 510], device="cuda")
        layout.compressed(layer.config.blocks)
    got = gradients(torch.compile(layer, fullgraph=True), layer, x, layout)
    expected = gradients(layer, layer, x, layout)
    assert all(y.isfinite().all() for y in got)
    # A fused chain rounds once where single operations round each: some roundings of a chain of ten or so.
    assert_close(got, expected, 16 * torch.finfo(dtype).eps)
    assert poll() == frozenset()
