"""Is a compiled layer the layer, whatever its routes?"""

from collections.abc import Callable, Iterator

import pytest
import torch
from nsa import NSAAttention, NSAConfig
from nsa_routing import OPS, closed
from nsa_varlen import VarlenLayout
from torch import Tensor

# Graph breaks inside sdpa are allowed. These two warnings are about what Dynamo itself does around them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
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


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
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
    assert set(made.ran) == set(ran) == set(OPS)
    assert closed() == frozenset()
