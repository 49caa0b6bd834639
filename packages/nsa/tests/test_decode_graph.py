"""A captured decode step: what one that is not captured does, wherever the sequences are, and no waiting."""

from dataclasses import replace

import pytest
import torch
from nsa import CacheFull, DecodeGraph, NSAAttention, NSACache, NSAConfig, PagePool
from nsa_routing import backends, reset
from nsa_varlen import VarlenLayout
from nsa_varlen.transfer import to_device
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = NSAConfig(128, num_heads=8, num_kv_heads=2, head_dim=32, topk=4, window_size=96)


class Model:
    """Two layers whose caches share a pool, with a residual."""

    def __init__(self, config: NSAConfig, batch_size: int, num_pages: int, dtype: torch.dtype, **options: int) -> None:
        torch.manual_seed(0)
        self.layers = nn.ModuleList(NSAAttention(config) for _ in range(2)).to("cuda", dtype)
        pool = PagePool.for_config(config, num_pages, device="cuda", dtype=dtype)
        self.caches = [NSACache(config, batch_size, 1024, pool=pool, **options) for _ in range(2)]

    @torch.no_grad()
    def prefill(self, lengths: list[int]) -> None:
        x = torch.randn(sum(lengths), 128, device="cuda", dtype=self.caches[0].dtype)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = x + layer(x, layout=VarlenLayout.from_lengths(lengths, device="cuda"), cache=cache)

    def step(self, x: Tensor, counts: Tensor) -> Tensor:
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = x + layer.decode(x, cache, counts)
        return x

    @torch.no_grad()
    def eager(self, x: Tensor, counts: list[int]) -> Tensor:
        for cache in self.caches:
            cache.reserve(counts)
        out = self.step(x, to_device(torch.tensor(counts, dtype=torch.int32), x.device))
        for cache in self.caches:
            cache.advance(counts)
        return out


@pytest.fixture
def flagged(monkeypatch: pytest.MonkeyPatch, fresh_routes: None) -> None:
    """No check of each result, for which the host would wait."""
    monkeypatch.setenv("NSA_CHECK_FINITE", "flag")


@pytest.mark.parametrize("compression", ["mean", "mlp"])
@pytest.mark.parametrize(
    "route, dtype",
    [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("triton", torch.bfloat16)],
    ids=["sdpa-fp32", "sdpa-bf16", "triton-bf16"],
)
def test_replay_is_the_eager_step_bitwise(
    route: str, dtype: torch.dtype, compression: str, flagged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over emissions, blocks and pages, with 1 to 4 tokens a step, sequences that pause, leave and join."""
    if route not in backends.installed_backends():
        pytest.skip(f"needs a package with the backend {route}")
    monkeypatch.setenv("NSA_BACKEND", f"decode_attention={route}")
    reset()
    config = replace(CONFIG, compression=compression)
    captured, plain = (Model(config, 3, 128, dtype) for _ in range(2))
    for model in (captured, plain):
        torch.manual_seed(1)
        model.prefill([60, 0, 127])
    with torch.no_grad():
        graph = DecodeGraph(captured.step, captured.caches, torch.zeros(3, 4, 128, device="cuda", dtype=dtype))
    assert captured.caches[0].lengths == (60, 0, 127)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(60):
            torch.manual_seed(number)
            x = torch.randn(3, 4, 128, device="cuda", dtype=dtype)
            counts = [1, number % 5, 4 if number % 3 else 0]
            if number == 30:
                for model in (captured, plain):
                    for cache in model.caches:
                        cache.free(2)
                        cache.fork(0, 2)
            if number == 40:
                for model in (captured, plain):
                    for cache in model.caches:
                        cache.truncate(1, cache.lengths[1] - 3)
            expected = plain.eager(x, counts)
            got = graph.replay(x, counts)
            torch._assert_async((got == expected).all())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for one, other in zip(captured.caches, plain.caches, strict=True):
        assert one.lengths == other.lengths == tuple(one.device_lengths.tolist())
        assert one.lengths[0] > 60 + 50


def test_a_replay_keeps_no_memory(flagged: None) -> None:
    model = Model(CONFIG, 4, 128, torch.bfloat16)
    model.prefill([200, 3, 64, 500])
    x = torch.randn(4, 1, 128, device="cuda", dtype=torch.bfloat16)
    graph = DecodeGraph(model.step, model.caches, x)
    graph.replay(x)
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        graph.replay(x)
    assert torch.cuda.memory_allocated() <= before


def test_a_full_pool_stops_a_replay_before_it_runs(flagged: None) -> None:
    model = Model(CONFIG, 1, 8, torch.bfloat16)
    model.prefill([64])  # one page for each of two streams, and one of compressed blocks, in two layers: 6
    x = torch.randn(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    graph = DecodeGraph(model.step, model.caches, x)
    before = (64,), [64]
    with pytest.raises(CacheFull, match=r"^pages: needed 2, got 0 free of 8$"):
        graph.replay(x)
    for cache in model.caches:
        assert (cache.lengths, cache.device_lengths.tolist()) == before
        cache.free(0)
    for _ in range(64):
        graph.replay(x)
    assert model.caches[0].lengths == (64,)


@pytest.mark.parametrize(
    "caches, shape, device, message",
    [
        (0, (1, 1, 128), "cuda", "^caches: expected at least one, got none$"),
        (1, (1, 1, 128), "cpu", "^x: expected a CUDA device, that of the caches, got cpu and cuda:0$"),
        (1, (2, 1, 128), "cuda", r"^x: expected \[1, N, ...\] of the caches' batch, got \[2, 1, 128\]$"),
    ],
)
def test_arguments_that_do_not_fit(caches: int, shape: tuple[int, ...], device: str, message: str) -> None:
    model = Model(CONFIG, 1, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        DecodeGraph(model.step, model.caches[:caches], torch.zeros(shape, device=device, dtype=torch.bfloat16))


def test_inputs_of_another_shape(flagged: None) -> None:
    model = Model(CONFIG, 1, 16, torch.bfloat16)
    x = torch.zeros(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    graph = DecodeGraph(model.step, model.caches, x)
    with pytest.raises(
        ValueError, match=r"^x: expected torch.bfloat16 \[1, 1, 128\], got torch.float32 \[1, 1, 128\]$"
    ):
        graph.replay(x.float())
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
        graph.replay(x.tolist())
    with pytest.raises(ValueError, match=r"^counts: expected at most 1, got \[2\]$"):
        graph.replay(x, [2])
