"""Tensor descriptors of keys and values, through which Hopper's copy engine loads a tile at once."""

from typing import Any

from torch import Tensor

from nsa_kernels_triton.tiles import pieces


def tiles_of(x: Tensor, rows: int) -> Any:
    """A descriptor of tiles [rows, D] of `x` [T, H, D] as [T, H * D]; None where the engine cannot address it.

    It takes 16-byte steps, int32 coordinates and heads side by side, whose D columns are a power of two.
    """
    total, num_heads, dim = x.shape
    steps = x.data_ptr(), x.stride(0) * x.element_size()
    whole = pieces(dim) == (dim, 0) and x.stride()[1:] == (dim, 1)
    if not whole or not 0 < total < 2**31 or any(step % 16 for step in steps):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [total, num_heads * dim], [x.stride(0), 1], [rows, dim])


def kv_tiles(k: Tensor, v: Tensor, keys: int, *, wanted: int) -> tuple[Any, Any]:
    """Descriptors of `keys` rows of k and v; (None, None) where they are not wanted or either cannot have one."""
    described = (tiles_of(k, keys), tiles_of(v, keys)) if wanted else (None, None)
    return (None, None) if any(x is None for x in described) else described
