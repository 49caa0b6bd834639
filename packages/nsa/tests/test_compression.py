"""Does each compression turn the l tokens of a block into its formula, per kv head, at every length?"""

import math
from collections.abc import Callable

import pytest
import torch
from nsa import NSAConfig
from nsa.compression import make_compression
from nsa.config import COMPRESSIONS
from nsa_varlen import VarlenLayout
from torch import Tensor, nn

LENGTHS = [0, 7, 8, 11, 12, 30]  # none, one short of a block, one block, one short of two, two, six


def by_hand(module: nn.Module, kind: str, x: Tensor, lengths: list[int], size: int, stride: int) -> Tensor:
    """The formula for one block and one head at a time."""
    rows, offset = [], 0
    for length in lengths:
        for start in range(0, length - size + 1, stride):
            block = x[offset + start : offset + start + size]
            heads = []
            for h in range(x.shape[1]):
                tokens = block[:, h]
                if kind == "mean":
                    heads.append(tokens.sum(0) / size)
                elif kind == "weighted_pool":
                    heads.append(sum(module.weight[h, i] * tokens[i] for i in range(size)))
                elif kind == "linear":
                    heads.append(tokens.reshape(-1) @ module.weight[h] + module.bias[h])
                else:
                    hidden = (tokens + module.position[:, h]).reshape(-1) @ module.weight_in[h] + module.bias_in[h]
                    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
                    heads.append(hidden @ module.weight_out[h] + module.bias_out[h])
            rows.append(torch.stack(heads))
        offset += length
    return torch.stack(rows)


@pytest.fixture
def make(make_config: Callable[..., NSAConfig]) -> Callable[[str], nn.Module]:
    def build(kind: str) -> nn.Module:
        module = make_compression(make_config(compression=kind), 6).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module

    return build


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_is_its_formula(kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]) -> None:
    module, x = make(kind), torch.randn(sum(LENGTHS), 2, 6, dtype=torch.float64)
    got = module(x, VarlenLayout.from_lengths(LENGTHS), make_config().blocks)
    # Sums of 48 products of order one in fp64.
    torch.testing.assert_close(got, by_hand(module, kind, x, LENGTHS, 8, 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_kv_heads_are_independent(
    kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]
) -> None:
    module, x, blocks = make(kind), torch.randn(30, 2, 6, dtype=torch.float64), make_config().blocks
    layout, edited = VarlenLayout.from_lengths([30]), x.clone()
    edited[:, 1] += 1
    before, after = module(x, layout, blocks), module(edited, layout, blocks)
    assert torch.equal(before[:, 0], after[:, 0])
    assert ((before - after)[:, 1].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", ["weighted_pool", "linear", "mlp"])
def test_each_kv_head_has_parameters_of_its_own(
    kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]
) -> None:
    x = torch.randn(8, 1, 6, dtype=torch.float64).expand(8, 2, 6)
    out = make(kind)(x, VarlenLayout.from_lengths([8]), make_config().blocks)
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["weighted_pool", "linear", "mlp"])
def test_the_place_in_the_block_counts(
    kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]
) -> None:
    module, x, layout = make(kind), torch.randn(8, 2, 6, dtype=torch.float64), VarlenLayout.from_lengths([8])
    blocks = make_config().blocks
    assert (module(x, layout, blocks) - module(x.flip(0), layout, blocks)).abs().max() > 1e-3


def test_a_new_weighted_pool_is_the_mean(make_config: Callable[..., NSAConfig]) -> None:
    config = make_config()
    x, layout = torch.randn(30, 2, 6, dtype=torch.float64), VarlenLayout.from_lengths([30])
    pool, mean = (
        make_compression(make_config(compression=kind), 6).double()(x, layout, config.blocks)
        for kind in ("weighted_pool", "mean")
    )
    torch.testing.assert_close(pool, mean, rtol=0, atol=1e-14)  # 8 fp64 roundings; 1/8 is exact


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_new_projections_start_like_linear_layers(kind: str) -> None:
    config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, compression=kind)
    for name, parameter in make_compression(config, 16).named_parameters():
        if name == "position":
            assert 0.5 * 0.02 < parameter.std() < 2 * 0.02
            continue
        fan_in = config.kernel_size * 16 if name in ("weight", "bias", "weight_in", "bias_in") else 4 * 16
        assert parameter.abs().max() <= fan_in**-0.5
        assert parameter.abs().max() > 0.8 * fan_in**-0.5  # of at least 32 uniform draws


def test_compression_hidden_size_is_the_width_of_the_mlp(make_config: Callable[..., NSAConfig]) -> None:
    narrow = make_compression(make_config(compression="mlp", compression_hidden_size=5), 6)
    assert narrow.weight_in.shape == (2, 8 * 6, 5)
    assert narrow.weight_out.shape == (2, 5, 6)
    assert make_compression(make_config(compression="mlp"), 6).bias_in.shape == (2, 4 * 8)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_no_block_gives_no_row(
    kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]
) -> None:
    x = torch.randn(7, 2, 6, dtype=torch.float64)
    assert make(kind)(x, VarlenLayout.from_lengths([7]), make_config().blocks).shape == (0, 2, 6)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_gradients(kind: str, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]) -> None:
    module, layout, blocks = make(kind), VarlenLayout.from_lengths([9, 12]), make_config().blocks
    x = torch.randn(21, 2, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, layout, blocks))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_dtype(
    kind: str, dtype: torch.dtype, make: Callable[[str], nn.Module], make_config: Callable[..., NSAConfig]
) -> None:
    module, x = make(kind), torch.randn(12, 2, 6, dtype=torch.float64)
    layout, blocks = VarlenLayout.from_lengths([12]), make_config().blocks
    exact, got = module(x, layout, blocks), module.to(dtype)(x.to(dtype), layout, blocks)
    assert got.dtype == dtype
    # Inputs, weights and the result round to `dtype`, sums of 48 products at least as well: 2 * sqrt(48) units of
    # values below 4 are never reached.
    assert (got.double() - exact).abs().max() < 2 * 7 * 4 * torch.finfo(dtype).eps / 2
