"""Ragged layouts, block geometry, masks, the oracle and the plain-torch backend of Native Sparse Attention."""

from nsa_varlen import dense, masks, reference
from nsa_varlen.__about__ import __version__
from nsa_varlen.buckets import Bucket
from nsa_varlen.collate import collate_tokens
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import CompressedLayout, VarlenLayout
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.packing import pack, unpack
from nsa_varlen.paged import PagedKV
from nsa_varlen.unfold import unfold_blocks

__all__ = [
    "BlockGeometry",
    "Bucket",
    "CompletedBlocks",
    "CompressedLayout",
    "NewTokens",
    "PagedKV",
    "PooledTokens",
    "VarlenLayout",
    "__version__",
    "collate_tokens",
    "dense",
    "masks",
    "pack",
    "reference",
    "unfold_blocks",
    "unpack",
]
