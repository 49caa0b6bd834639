"""Native Sparse Attention as a layer: projections, rotation, compression, gates, and a cache if there is one."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from nsa_varlen import VarlenLayout, pack, unpack
from nsa_varlen.packing import check_mask_of
from torch import Tensor, nn

from nsa import ops
from nsa.attention import NSAAux, nsa_attention
from nsa.autocasting import autocast_dtype
from nsa.cache import NSACache
from nsa.compression import make_compression, pool_of
from nsa.config import NSAConfig
from nsa.gates import GateMLP
from nsa.rope import make_rope

if TYPE_CHECKING:
    from nsa.layer_observer import LayerObserver


class NSAAttention(nn.Module):
    """y = W_o sum over c in (cmp, slc, win) of gate_c * attention(q, K_c, V_c).

    Keys and values have a projection per branch unless `config.shared_kv`; gates come from a `GateMLP`.

    `torch.compile(layer, fullgraph=True)` makes one graph of it, forward and backward, where the routes lead to
    operators of torch.library, as those of backend `triton` are; `sdpa` breaks the graph at its operations. It takes x
    [B, S, hidden_size], and packed x with a layout made outside, of which `layout.compressed(config.blocks)` was asked
    there: how many rows there are is not in x. Nor is it in a `padding_mask`: `nsa_varlen.pack` goes outside too.

    Example:
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> layer = NSAAttention(config)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> layer(torch.randn(107, 64), layout=VarlenLayout.from_lengths([100, 7])).shape
        torch.Size([107, 64])
    """

    observer: "LayerObserver | None" = None  # `nsa.observe` sets it

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")
        self.config = config
        streams = 1 if config.shared_kv else 3
        width, kv_heads = config.hidden_size, config.num_kv_heads
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(width, streams * kv_heads * config.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(width, streams * kv_heads * config.value_dim, bias=config.bias)
        self.o_proj = nn.Linear(config.num_heads * config.value_dim, width, bias=False)
        self.compress_k = make_compression(config, config.head_dim)
        self.compress_v = make_compression(config, config.value_dim)
        self.gates = GateMLP(config)
        self.rope = make_rope(config)

    def forward(
        self,
        x: Tensor,
        *,
        layout: VarlenLayout | None = None,
        padding_mask: Tensor | None = None,
        cache: NSACache | None = None,
    ) -> Tensor:
        """Attend among the tokens of x, and with a cache also to those before them.

        Args:
            x: [B, S, hidden_size], or packed [T, hidden_size] with `layout`.
            layout: of the packed tokens of x alone (as many keys as queries).
            padding_mask: bool [B, S], True for real tokens of a padded x; outputs at padding are 0.
            cache: x continues its sequences; it is appended, then attends. No gradient may be recorded.

        Returns:
            The same shape as x.

        Raises:
            TypeError, ValueError: arguments that do not fit; the cache is left as it was.
        """
        self._check(x, layout, padding_mask, cache)
        attend = self._attend if self.observer is None else self.observer.noted(self._attend)
        if padding_mask is not None:
            packed, layout, pad_index = pack(x, padding_mask)
            return unpack(attend(packed, layout, cache), pad_index)
        if layout is None:
            layout = VarlenLayout.from_shape(x.shape[0], x.shape[1], x.device)
            return attend(x.flatten(0, 1), layout, cache).unflatten(0, x.shape[:2])
        return attend(x, layout, cache)

    def decode(self, x: Tensor, cache: NSACache, counts: Tensor | None = None) -> Tensor:
        """Append the newest tokens of each sequence and attend, as a CUDA graph can hold it.

        The same as `forward` with a cache, but lengths are those that the device has when it runs. `cache.reserve`
        before and `cache.advance` after are the caller's, or `nsa.DecodeGraph`'s.

        Args:
            x: [B, N, hidden_size], N at most `cache.most_decoded`.
            counts: int32 [B]; of sequence b the first counts[b] rows are tokens, the others padding. None is all.

        Returns:
            [B, N, hidden_size], 0 for padding.

        Raises:
            TypeError, ValueError: arguments that do not fit.
            RuntimeError: as of `NSACache.decode`.

        Example:
            >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
            >>> layer, cache = NSAAttention(config), NSACache(config, batch_size=2, max_tokens=256)
            >>> with torch.no_grad():
            ...     prefill = layer(torch.randn(2, 100, 64), cache=cache)
            ...     cache.reserve(1)
            ...     out = layer.decode(torch.randn(2, 1, 64), cache)
            >>> cache.advance(1)
            >>> out.shape, cache.lengths
            (torch.Size([2, 1, 64]), (101, 101))
        """
        self._check(x, None, None, None)
        self._check_cache(x, None, cache)
        if x.ndim != 3:
            raise ValueError(f"x: expected shape [B, N, {self.config.hidden_size}], got {list(x.shape)}")
        step, batch = cache.decode(x.shape[1], counts), x.shape[:2]

        q, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates = self._project(x.flatten(0, 1))
        q_cmp, q, k_cmp, k_slc, k_win = self._rotate_new(q, k_cmp, k_slc, k_win, step.positions.flatten())
        q, q_cmp, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates = (
            y.unflatten(0, batch) for y in (q, q_cmp, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates)
        )
        compress = pool_of(self.compress_k, self.compress_v) or self._compress
        new = step.new_tokens((k_slc, v_slc), (k_win, v_win), (k_cmp, v_cmp), compress)
        observer = self.observer
        attend = ops.decode_attention if observer is None else partial(observer.decode_attention, cache, step)
        out, block_indices = attend(
            q, *step.cmp, *step.slc, *step.win, gates, step.counts, self.config.blocks, q_cmp=q_cmp, new=new
        )
        step.count(block_indices)
        step.commit()
        return self.o_proj(out.flatten(2))

    def _attend(self, x: Tensor, layout: VarlenLayout, cache: NSACache | None) -> Tensor:
        blocks = self.config.blocks
        q, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates = self._project(x)
        if cache is None:
            positions = layout.positions()
            q_cmp, q, k_cmp, k_slc, k_win = self._rotate_new(q, k_cmp, k_slc, k_win, positions)
            k_cmp, v_cmp = self._compress(k_cmp, v_cmp, positions, layout, layout.compressed_starts(blocks))
            kv = k_cmp, v_cmp, k_slc, v_slc, k_win, v_win
            out, _ = self._attention(None)(q, *kv, gates, layout, blocks, q_cmp=q_cmp, return_aux=True)
        else:
            with cache.extend(layout.host.cu_seqlens_q.diff().tolist()) as step:
                positions = step.layout.positions()
                q_cmp, q, k_cmp, k_slc, k_win = self._rotate_new(q, k_cmp, k_slc, k_win, positions)
                step.write_slc(k_slc, v_slc)
                step.write_win(k_win, v_win)
                step.write_cmp(k_cmp, v_cmp, self._compress)
                out, aux = self._attention(cache)(
                    q, *step.cmp, *step.slc, *step.win, gates, step.layout, blocks, q_cmp=q_cmp, return_aux=True
                )
                step.count(aux.block_indices)
        return self.o_proj(out.flatten(1))

    def _attention(self, cache: NSACache | None) -> Callable[..., tuple[Tensor, NSAAux]]:
        """`nsa_attention`, by way of the observer if there is one."""
        return nsa_attention if self.observer is None else partial(self.observer.attention, cache)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(q, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates) of packed x, nothing rotated yet."""
        q = self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        keys = self._branches(self.k_proj(x), self.config.head_dim)
        values = self._branches(self.v_proj(x), self.config.value_dim)
        return q, *keys, *values, self.gates(x)

    def _branches(self, projected: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the cmp, slc and win branches, [T, Hk, dim] each; one shared tensor with `shared_kv`."""
        split = projected.unflatten(-1, (-1, self.config.num_kv_heads, dim)).unbind(1)
        return (split[0], split[0], split[0]) if self.config.shared_kv else split

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope is None else self.rope(x, positions)

    def _rotate_new(
        self, q: Tensor, k_cmp: Tensor, k_slc: Tensor, k_win: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(q_cmp, q, k_cmp, k_slc, k_win) at the new tokens' positions.

        q_cmp stays unrotated with rope_cmp="none"; k_cmp is rotated with "before" alone.
        """
        rotated, rotated_slc = self._rotate(q, positions), self._rotate(k_slc, positions)
        rotated_win = rotated_slc if k_win is k_slc else self._rotate(k_win, positions)
        q_cmp = q if self.config.rope_cmp == "none" else rotated
        if self.config.rope_cmp == "before":
            k_cmp = rotated_slc if k_cmp is k_slc else self._rotate(k_cmp, positions)
        return q_cmp, rotated, k_cmp, rotated_slc, rotated_win

    def _compress(self, k: Tensor, v: Tensor, _: Tensor, raw: VarlenLayout, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Compress the branch's rows k and v before compression; block i begins at position starts[i]."""
        blocks = self.config.blocks
        k_cmp = self.compress_k(k, raw, blocks)
        if self.config.rope_cmp == "after":
            k_cmp = self._rotate(k_cmp, starts)
        return k_cmp, self.compress_v(v, raw, blocks)

    def _check(
        self, x: Tensor, layout: VarlenLayout | None, padding_mask: Tensor | None, cache: NSACache | None
    ) -> None:
        weight = self.q_proj.weight
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim not in (2, 3) or x.shape[-1] != self.config.hidden_size:
            expected = f"[B, S, {self.config.hidden_size}] or packed [T, {self.config.hidden_size}]"
            raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
        if x.dtype != weight.dtype and autocast_dtype(x.device) is None:
            raise TypeError(f"x: expected dtype {weight.dtype} of the layer, got {x.dtype}")
        if x.device != weight.device:
            raise ValueError(f"x: expected device {weight.device} of the layer, got {x.device}")
        if x.ndim == 2:
            if layout is None or padding_mask is not None:
                got = "None" if padding_mask is None else "a padding_mask"
                raise ValueError(f"layout: expected one for packed x [T, hidden_size], and no padding_mask, got {got}")
            if not isinstance(layout, VarlenLayout):
                raise TypeError(f"layout: expected a VarlenLayout, got {type(layout).__name__}")
            if layout.total_q != x.shape[0] or layout.device != x.device:
                raise ValueError(
                    f"layout: expected total_q={x.shape[0]} on {x.device}, got {layout.total_q} on {layout.device}"
                )
            if not layout.is_whole():
                raise ValueError(
                    "layout: expected as many keys as queries in each sequence (the cache adds the earlier ones), "
                    f"got cu_seqlens_k={layout.host.cu_seqlens_k.tolist()}"
                )
        elif layout is not None:
            raise ValueError("layout: expected None for x [B, S, hidden_size] (pass padding_mask), got one")
        if padding_mask is not None:
            check_mask_of(x, padding_mask, "padding_mask")
        if cache is not None:
            self._check_cache(x, layout, cache)

    def _check_cache(self, x: Tensor, layout: VarlenLayout | None, cache: NSACache) -> None:
        if not isinstance(cache, NSACache):
            raise TypeError(f"cache: expected an NSACache, got {type(cache).__name__}")
        if cache.config != self.config:
            raise ValueError(f"cache: expected one made for {self.config}, got {cache.config}")
        batch_size = x.shape[0] if layout is None else layout.batch_size
        if cache.batch_size != batch_size:
            raise ValueError(f"cache: expected batch_size {batch_size}, got {cache.batch_size}")
        if cache.device != x.device:
            raise ValueError(f"cache: expected device {x.device} of x, got {cache.device}")
        dtype = autocast_dtype(x.device) or x.dtype
        if cache.dtype != dtype:
            raise TypeError(f"cache: expected dtype {dtype} of the projections, got {cache.dtype}")
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise ValueError("cache: expected no gradient to be recorded, got grad mode on; use torch.no_grad()")
