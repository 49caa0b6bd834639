"""The FlashAttention backends through routing, on a GPU: what happens when one fails, and a layer with a cache."""

import logging
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nsa_fa2
import nsa_routing
import pytest
import torch
import yaml
from nsa import NSAAttention, NSACache, NSAConfig, ops
from nsa_routing import plan_for
from nsa_routing.planning import Accepted
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.testing import random_inputs
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCKS = BlockGeometry()
WINDOW = "window_attention"


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, VarlenLayout]:
    layout = VarlenLayout.from_lengths([700, 300], device="cuda")
    q, k, v, _ = random_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    return q, k, v, layout


@pytest.fixture
def fa2_torch_first(flags: Callable, tmp_path: Path) -> None:
    """An automatic route for the window that takes fa2-torch at any length, whatever the device's profile says."""
    (able,) = plan_for(_problem(), nsa_routing.Policy(backends=((WINDOW, "fa2-torch"),))).candidates
    if not isinstance(able, Accepted):
        pytest.skip(able.reason)
    opened = {"name": "opened", "source": "this test", "extends": "base", "presets": {"safe": {"fa2-torch": "always"}}}
    path = tmp_path / "opened.yaml"
    path.write_text(yaml.safe_dump(opened))
    flags(PROFILE=str(path))


def _problem() -> nsa_routing.Problem:
    return nsa_routing.Problem(WINDOW, "cuda", torch.bfloat16, 64, 64, 4, deterministic=False, max_seqlen_k=700)


def close(got: Tensor, expected: Tensor) -> None:
    """Two sound bf16 results of one operation: each within a rounding of the weights and one of the result, 2^-8."""
    assert float((got.float() - expected.float()).abs().max()) <= 4 * 2.0**-8 * float(expected.abs().max())


@pytest.mark.usefixtures("fa2_torch_first")
def test_a_poisoned_result_is_recomputed_in_the_same_call(
    inputs: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v, layout = inputs
    honest, _ = ops.window_attention(q, k, v, layout, BLOCKS)
    assert nsa_routing.closed() == frozenset()
    forward = nsa_fa2.FA2_TORCH.kernel.forward

    def poisoned(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        out, lse = forward(*args, **options)
        out.view(-1)[17] = torch.nan
        return out, lse

    monkeypatch.setattr(nsa_fa2.FA2_TORCH.kernel, "forward", poisoned)
    out, _ = ops.window_attention(q, k, v, layout, BLOCKS)
    assert bool(out.isfinite().all())
    close(out, honest)
    assert nsa_routing.closed() == {("fa2-torch", WINDOW, "cuda:0")}
    assert "non-finite" in caplog.text


@pytest.mark.usefixtures("fa2_torch_first")
@pytest.mark.parametrize(
    "error, closes",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("flash-attn 2.8.3 was built without a kernel for head_dim 64 in torch.bfloat16"), True),
    ],
    ids=["memory", "not built"],
)
def test_forced_fallback(
    error: Exception, closes: bool, inputs: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v, layout = inputs
    honest, _ = ops.window_attention(q, k, v, layout, BLOCKS)

    def failing(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(nsa_fa2.FA2_TORCH.kernel, "forward", failing)
    with caplog.at_level(logging.WARNING):
        out, _ = ops.window_attention(q, k, v, layout, BLOCKS)
    close(out, honest)
    assert bool(nsa_routing.closed()) == closes
    assert "another backend takes over" in caplog.text


@pytest.mark.parametrize("name", ["fa2", "fa2-torch"])
@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
def test_a_layer_trains_prefills_and_decodes_by_each(name: str, op: str, flags: Callable) -> None:
    """The layer's outputs and gradients, prefill into pages in two chunks and decode steps, against sdpa."""
    policy = nsa_routing.Policy(backends=((op, name),))
    problem = nsa_routing.Problem(op, "cuda", torch.bfloat16, 64, 64, 4, deterministic=False)
    (able,) = plan_for(problem, policy).candidates
    if not isinstance(able, Accepted):
        pytest.skip(able.reason)
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64)
    torch.manual_seed(0)
    layer = NSAAttention(config).to("cuda", torch.bfloat16)
    x = torch.randn(1, 333, 256, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        layer.zero_grad()
        trained = layer(x)
        trained.float().square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
        cache = NSACache(config, 1, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            ends = (0, 200, 330, 331, 332, 333)
            steps = [layer(x[:, i:j], cache=cache) for i, j in pairwise(ends)]
        return [trained.detach(), torch.cat(steps, 1), *gradients]

    flags(BACKEND="sdpa")
    expected = run()
    flags(BACKEND=f"{op}={name}")
    got = run()
    assert len(got) == len(expected) > 8
    for index, (x_got, x_expected) in enumerate(zip(got, expected, strict=True)):
        error = (x_got.float() - x_expected.float()).norm() / x_expected.float().norm().clamp_min(1e-12)
        assert float(error) <= 0.03, (index, float(error))  # what is wrong, a mask or a scale, is off by more


def test_torchs_own_kernels_need_no_flash_attn() -> None:
    """fa2-torch and cudnn run, and `explain` speaks of fa2, without flash_attn being imported."""
    code = """
import sys, torch
from nsa_fa2 import CUDNN, FA2_TORCH
from nsa_varlen import BlockGeometry, VarlenLayout
x = torch.randn(64, 2, 64, device="cuda", dtype=torch.bfloat16)
layout, blocks = VarlenLayout.from_lengths([64], device="cuda"), BlockGeometry()
FA2_TORCH.window_attention(x, x, x, layout, blocks)
CUDNN.compressed_attention(x, x[:3], x[:3], layout, blocks)
print("flash_attn" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
