"""Does an observer see where operations go, which backends failed, and that compiled code hides from it?"""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from nsa import NSAAttention, NSACache, NSAConfig, Observer, observe
from nsa_routing import breaker, closed
from torch import Tensor

PREFILL = (
    *("compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine"),
)


@pytest.fixture
def layer() -> NSAAttention:
    torch.manual_seed(0)
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 32, "topk": 2, "init_blocks": 0, "local_blocks": 1}
    return NSAAttention(NSAConfig(16, num_heads=4, num_kv_heads=2, head_dim=8, window_size=6, **sizes))


def routes(observer: Observer) -> dict[str, str]:
    prefix = "layer.0.route."
    numbers = observer.snapshot()
    return {name.removeprefix(prefix): str(x) for name, x in numbers.items() if name.startswith(prefix)}


@pytest.fixture
def perf(install: Callable, machine: Callable, flags: Callable) -> Callable[..., object]:
    """sdpa as `triton` on an H100, in the preset that takes it; `spoil` is what becomes of results."""

    def make(check: str = "always", **spoil: Callable) -> object:
        backend = install("triton")["triton"]
        backend.spoil.update(spoil)
        machine(90)
        flags(PRESET="perf", CHECK_FINITE=check)
        return backend

    return make


@torch.no_grad()
def test_a_route_changes_when_it_is_closed(perf: Callable, layer: NSAAttention) -> None:
    perf()
    with observe(layer) as observer:
        layer(torch.randn(1, 40, 16))
        assert routes(observer) == dict.fromkeys(PREFILL, "triton")
        breaker.breaker("triton", "window_attention", "cpu").closed = True
        numbers = observer.snapshot()
        assert routes(observer) == dict.fromkeys(PREFILL, "triton") | {"window_attention": "sdpa"}
    assert numbers["closed"] == numbers["closed.window_attention.triton.cpu"] == 1
    assert numbers["failures"] == 0


@torch.no_grad()
def test_a_fallback_is_counted_and_said(perf: Callable, layer: NSAAttention, caplog: pytest.LogCaptureFixture) -> None:
    """The window's result is not finite: `sdpa` computes it again, and the route is closed."""
    perf(window_attention=lambda result: (torch.full_like(result[0], torch.nan), result[1]))
    caplog.set_level(logging.INFO, "nsa")
    x = torch.randn(1, 40, 16)
    with observe(layer, log_every=1, parity_every=1) as observer:
        out = layer(x)
        numbers = observer.snapshot()
    assert closed() == {("triton", "window_attention", "cpu")}
    assert numbers["failures"] == numbers["failures.window_attention.triton.cpu"] == 1
    assert numbers["closed.window_attention.triton.cpu"] == 1
    assert numbers["layer.0.nonfinite"] == 0
    assert out.isfinite().all()
    (said,) = [message for message in caplog.messages if message.startswith("nsa prefill")]
    assert said.endswith(" failures=1")
    assert ",selected_attention:triton,window_attention:sdpa" in said


@torch.no_grad()
def test_what_nobody_checks_is_seen_by_the_observer(perf: Callable, layer: NSAAttention) -> None:
    """NSA_CHECK_FINITE=off, and a backend that is wrong: NaN here, a fault of half there."""
    perf("off", window_attention=lambda result: (torch.full_like(result[0], torch.nan), result[1]))
    with observe(layer) as observer:
        layer(torch.randn(1, 40, 16))
    assert observer.snapshot()["layer.0.nonfinite"] == 40 * 4 * 8
    perf("off", combine=lambda result: result + 0.5)
    with observe(layer, parity_every=1) as observer:
        layer(torch.randn(1, 40, 16))
    assert observer.snapshot()["layer.0.parity_mae"] == pytest.approx(0.5, abs=1e-5)
    assert routes(observer) == dict.fromkeys(PREFILL, "triton"), "the comparison is none of the layer's problems"


@torch.no_grad()
def test_a_decode_step_has_one_route(perf: Callable, layer: NSAAttention) -> None:
    perf()
    cache = NSACache(layer.config, 1, 64)
    with observe(layer, parity_every=1) as observer:
        cache.reserve(1)
        layer.decode(torch.randn(1, 1, 16), cache)
        cache.advance(1)
    assert routes(observer) == {"decode_attention": "triton"}


# --- compiled code


@pytest.fixture
def compiled(install: Callable, opaque: type, flags: Callable) -> Iterator[Callable[[NSAAttention], Callable]]:
    """One graph, by a backend of operators."""
    torch._dynamo.reset()
    install(opaque("opaque"))
    flags(BACKEND="opaque")
    yield lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_code_is_left_out_and_says_so(
    compiled: Callable, layer: NSAAttention, caplog: pytest.LogCaptureFixture
) -> None:
    run, x = compiled(layer), torch.randn(2, 40, 16)
    expected: Tensor = run(x)
    with observe(layer, parity_every=1, log_every=1) as observer:
        assert "layer.0.compiled" not in observer.snapshot()
        for _ in range(3):
            assert torch.equal(run(x), expected)
        numbers = observer.snapshot()
        assert (numbers["layer.0.steps"], numbers["layer.0.compiled"]) == (0, 1)
        layer(x)
        assert observer.snapshot()["layer.0.steps"] == 1, "what is not compiled is observed"
    assert torch.equal(run(x), expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["nsa layer=0 was compiled by torch.compile: compiled steps are not observed"]
