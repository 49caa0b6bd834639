"""Native Sparse Attention: configuration, layer, operations and cache."""

from nsa import ops
from nsa.__about__ import __version__
from nsa.attention import NSAAux, nsa_attention
from nsa.cache import NSACache, SequenceState, SharedPrefix
from nsa.checkpointing import reuse_block_indices
from nsa.config import NSAConfig
from nsa.decode_graph import DecodeGraph
from nsa.layer import NSAAttention
from nsa.observing import Observer, observe
from nsa.pages import CacheFull, PagePool

__all__ = [
    "CacheFull",
    "DecodeGraph",
    "NSAAttention",
    "NSAAux",
    "NSACache",
    "NSAConfig",
    "Observer",
    "PagePool",
    "SequenceState",
    "SharedPrefix",
    "__version__",
    "nsa_attention",
    "observe",
    "ops",
    "reuse_block_indices",
]
