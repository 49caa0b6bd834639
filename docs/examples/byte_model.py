"""A small language model of bytes with random weights: what it says means nothing, but a wrong key would change it."""

from nsa import NSAAttention, NSACache, NSAConfig
from nsa_varlen import VarlenLayout
from torch import Tensor, nn


class Block(nn.Module):
    """x + norm(attention(norm(x))), then x + mlp(norm(x)): the inner norm lets attention count with random weights."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = NSAAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.norms[1](attended)
        return x + self.mlp(self.norms[2](x))


class ByteModel(nn.Module):
    """Embedding, blocks, head. Every block's attention has a cache of its own."""

    def __init__(self, config: NSAConfig, num_blocks: int = 3) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_blocks))
        self.head = nn.Linear(config.hidden_size, 256)

    def extend(
        self, tokens: Tensor, layout: VarlenLayout, caches: list[NSACache] | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Packed tokens int64 [T], behind those in the caches -> logits [R, 256] of `rows` int64 [R]; None is all."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block.add(x, block.attention(block.norms[0](x), layout=layout, cache=cache))
        return self.head(x if rows is None else x[rows])

    def decode(self, tokens: Tensor, counts: Tensor, caches: list[NSACache]) -> Tensor:
        """Tokens int64 [B, 1], of which sequence b has counts[b] (int32), 0 or 1 -> logits [B, 1, 256]."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.add(x, block.attention.decode(block.norms[0](x), cache, counts))
        return self.head(x)
