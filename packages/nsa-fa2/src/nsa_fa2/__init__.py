"""FlashAttention-2 backends for Native Sparse Attention."""

from nsa_fa2.__about__ import __version__

__all__ = ["__version__"]
