"""The backend that is always there: every operation in plain torch, on any device, forward and backward.

Compute is O(N * (topk * block_size + window_size + N / kernel_stride)), memory is bounded: tiles of logits, never a
[Tq, Tk] matrix. Half precision is computed in fp32 and rounded once at the end. Planning reads the sequence offsets on
the host; `VarlenLayout.host` says when that synchronises, and block-wise selected attention reads its block counts.
"""

from nsa_varlen.sdpa._backend import BACKEND, SdpaBackend

__all__ = ["BACKEND", "SdpaBackend"]
