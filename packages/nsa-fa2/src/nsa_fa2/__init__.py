"""FlashAttention-2 for the branches of Native Sparse Attention that are ordinary attention.

Three backends with one code behind them: `fa2` (the package flash-attn), `fa2-torch` (the FlashAttention-2 in torch)
and `cudnn` (through torch). Nothing here imports flash_attn until an operation of `fa2` runs.
"""

from nsa_fa2.__about__ import __version__
from nsa_fa2.backend import CUDNN, FA2, FA2_TORCH, FlashBackend

__all__ = ["CUDNN", "FA2", "FA2_TORCH", "FlashBackend", "__version__"]
