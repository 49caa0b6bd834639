"""Triton kernels for Native Sparse Attention."""

from nsa_kernels_triton.__about__ import __version__

__all__ = ["__version__"]
