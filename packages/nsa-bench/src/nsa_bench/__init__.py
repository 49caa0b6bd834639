"""Benchmarks and trends for Native Sparse Attention."""

from nsa_bench.__about__ import __version__

__all__ = ["__version__"]
