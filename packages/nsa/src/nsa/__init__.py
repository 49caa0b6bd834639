"""Native Sparse Attention: configuration, layer, operations and cache."""

from nsa.__about__ import __version__

__all__ = ["__version__"]
