"""A decode step's window for one token and kv head, tile by tile."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits
from nsa_kernels_triton.kernels.softmax import update


@triton.jit
def attend_to_window(
    q0, q1, K, V, TABLE, V_TABLE, begin, stop, earliest, position, last, head, scale, m, norm, acc0, acc1,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, KEYS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The softmax's state after tiles [begin, stop) of KEYS rows, of which [earliest, position] are seen.

    Tiles begin where pages allow a tile to be of one page; the next one's number is loaded a tile ahead. `last` is the
    last page that there is.
    """
    key = tl.arange(0, KEYS)
    page = tl.load(TABLE + tl.minimum(begin * KEYS // PAGE, last))
    for tile in tl.range(begin, stop):
        at = tile * KEYS + key
        behind = at >= earliest
        seen = behind & (at <= position)
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = behind & (at <= tl.where(page >= 0, position, -1))
        if SAME:
            v_slot = slot
            v_loaded = loaded
        else:
            v_page = tl.load(V_TABLE + tile * KEYS // PAGE)
            v_slot = v_page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
            v_loaded = behind & (at <= tl.where(v_page >= 0, position, -1))
        page = tl.load(TABLE + tl.minimum((tile + 1) * KEYS // PAGE, last))
        k_rows = K + (slot * HEADS + head) * DK
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
        s = tl.where(seen[None, :], s, float("-inf"))
        v_rows = V + (v_slot * HEADS + head) * DV
        v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
        v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
        m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
    return m, norm, acc0, acc1
