"""Triton kernels for Native Sparse Attention: the backend `triton`."""

from nsa_kernels_triton.__about__ import __version__
from nsa_kernels_triton.backend import BACKEND, TritonBackend

__all__ = ["BACKEND", "TritonBackend", "__version__"]
