"""Ragged layouts, block geometry, masks, the oracle and the plain-torch backend of Native Sparse Attention."""

from nsa_varlen.__about__ import __version__

__all__ = ["__version__"]
