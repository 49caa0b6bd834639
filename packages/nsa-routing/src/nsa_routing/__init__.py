"""Which backend runs which operation of Native Sparse Attention, and why."""

from nsa_routing.__about__ import __version__

__all__ = ["__version__"]
