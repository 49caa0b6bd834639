"""How the l tokens of a block become one compressed key or value: the phi of Eq. 7."""

from typing import NamedTuple

import torch
from nsa_varlen import BlockGeometry, VarlenLayout, unfold_blocks
from torch import Tensor, nn
from torch.nn import functional as F

from nsa import ops
from nsa.config import NSAConfig

POOLED = ("mean", "weighted_pool")  # compressions that are weighted sums of the block's tokens


def make_compression(config: NSAConfig, dim: int) -> nn.Module:
    """The module that `config.compression` names, for rows of `dim`; forward(x, layout, blocks) -> [Tc, H, dim].

    Example:
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, compression="mlp")
        >>> x = torch.randn(48, 2, 16)
        >>> make_compression(config, 16)(x, VarlenLayout.from_lengths([48]), config.blocks).shape
        torch.Size([2, 2, 16])
    """
    heads, size = config.num_kv_heads, config.kernel_size
    if config.compression == "mean":
        return MeanCompression()
    if config.compression == "weighted_pool":
        return WeightedPoolCompression(heads, size)
    if config.compression == "linear":
        return LinearCompression(heads, size, dim)
    hidden = 4 * config.head_dim if config.compression_hidden_size is None else config.compression_hidden_size
    return MLPCompression(heads, size, dim, hidden)


class Pool(NamedTuple):
    """Weights [Hk, kernel_size] by which keys and values of a block are summed; None is the mean."""

    k: Tensor | None
    v: Tensor | None


def pool_of(compress_k: nn.Module, compress_v: nn.Module) -> Pool | None:
    """What two modules of `make_compression` do, where it is no more than a weighted sum; else None."""
    weights = [x.weight if type(x) is WeightedPoolCompression else None for x in (compress_k, compress_v)]
    pooled = all(type(x) in (MeanCompression, WeightedPoolCompression) for x in (compress_k, compress_v))
    return Pool(*weights) if pooled else None


class MeanCompression(nn.Module):
    """x_cmp[i] = mean of the block's tokens. No parameters."""

    def forward(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """[Tk, H, D] -> [Tc, H, D]."""
        return ops.compress_mean(x, layout, blocks)


class WeightedPoolCompression(nn.Module):
    """x_cmp[i] = sum over the block's tokens of weight[h, token] * x. Starts as the mean: weight = 1/l."""

    def __init__(self, num_kv_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_kv_heads, kernel_size), 1 / kernel_size))

    def forward(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """[Tk, H, D] -> [Tc, H, D]."""
        return torch.einsum("hl,nlhd->nhd", self.weight, unfold_blocks(x, layout, blocks))


class LinearCompression(nn.Module):
    """x_cmp[i] = W[h] applied to the block's tokens laid end to end, plus a bias."""

    def __init__(self, num_kv_heads: int, kernel_size: int, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = _projection(num_kv_heads, kernel_size * dim, dim)

    def forward(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """[Tk, H, D] -> [Tc, H, D]."""
        return _project(_flat_blocks(unfold_blocks(x, layout, blocks)), self.weight, self.bias)


class MLPCompression(nn.Module):
    """The paper's: an MLP over the block's tokens, each with the encoding of its place in the block added.

    x_cmp[i] = W2[h] gelu(W1[h] (x + position) + b1[h]) + b2[h]
    """

    def __init__(self, num_kv_heads: int, kernel_size: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(kernel_size, num_kv_heads, dim))
        self.weight_in, self.bias_in = _projection(num_kv_heads, kernel_size * dim, hidden)
        self.weight_out, self.bias_out = _projection(num_kv_heads, hidden, dim)

    def forward(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """[Tk, H, D] -> [Tc, H, D]."""
        placed = _flat_blocks(unfold_blocks(x, layout, blocks) + self.position)
        return _project(F.gelu(_project(placed, self.weight_in, self.bias_in)), self.weight_out, self.bias_out)


def _projection(heads: int, size_in: int, size_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [H, in, out] and bias [H, out] per kv head, initialised as nn.Linear's: uniform within 1/sqrt(in)."""
    bound = size_in**-0.5
    weight = torch.empty(heads, size_in, size_out).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(torch.empty(heads, size_out).uniform_(-bound, bound))


def _flat_blocks(unfolded: Tensor) -> Tensor:
    """[Tc, l, H, D] -> [Tc, H, l*D]."""
    return unfolded.transpose(1, 2).flatten(2)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    projected = torch.einsum("nhi,hio->nho", x, weight)
    return projected + bias.to(projected.dtype)  # under autocast the product is half precision, the bias is not
