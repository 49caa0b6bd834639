"""A decode step's choice of blocks: their scores (Eq. 9, 10), and of those that compete the best, by counting.

A chunk of CHUNK blocks is chosen from by counting, for each, how many are better. One chunk is all: its winners are the
token's block indices. Of several, each leaves its winners as candidates, in ascending order, in SLOTS places;
`decode_levels_kernel` thins out many of them, and the kernel of the selected blocks chooses for good. The keys are the
scores' bits, which order as non-negative floats do; -1 is no candidate.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_kernels_triton.kernels.interval import num_compressed


@triton.jit
def log_sums(M, L, row, there, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Logarithm, base 2, of the sum over the splits for each query row; 0 for rows that see nothing."""
    split = tl.arange(0, SPLITS)
    places = split[:, None] * SIZE + row[None, :]
    m = tl.load(M + places, mask=there[None, :], other=float("-inf"))
    norm = tl.load(L + places, mask=there[None, :], other=0.0)
    # No product is summed: multiplied and added at once, it would be rounded otherwise in each thread that has the sum.
    part = tl.where(norm > 0, m + tl.log2(tl.where(norm > 0, norm, 1.0)), float("-inf"))
    top = tl.max(part, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(part - shift[None, :]), 0)
    return tl.where(total > 0, shift + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def block_scores(
    LINES, M, L, first_row, chunk, total,
    width, GROUP: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, CHUNK: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk's blocks for one token: overlap, in strides, times probability, summed over the group [CHUNK].

    Compressed block BETA*j + o overlaps block j by min(o + ALPHA, BETA) - max(o, 0) strides.
    """
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = chunk * (CHUNK * BETA) + tl.arange(0, CHUNK * BETA)
    own = tl.zeros([CHUNK * BETA], tl.float32)
    score = tl.zeros([CHUNK], tl.float32)
    for start in tl.static_range(0, GROUP, HEADS_AT_ONCE):
        member = start + tl.arange(0, HEADS_AT_ONCE)
        there = member < GROUP
        row = first_row + member
        lse = log_sums(M, L, row, there, SIZE, SPLITS)
        lines = LINES + row.to(tl.int64) * width
        seen = there[:, None] & (inside < total)[None, :]
        s = tl.load(lines[:, None] + inside[None, :], mask=seen, other=float("-inf"))
        own += tl.sum(tl.exp2(s - lse[:, None]), 0)
        for before in tl.static_range(1, ALPHA):
            earlier = block * BETA - before
            seen = there[:, None] & ((earlier >= 0) & (earlier < total))[None, :]
            s = tl.load(lines[:, None] + earlier[None, :], mask=seen, other=float("-inf"))
            score += (ALPHA - before if ALPHA - before < BETA else BETA) * tl.sum(tl.exp2(s - lse[:, None]), 0)
    place = tl.arange(0, CHUNK * BETA) % BETA
    own *= tl.minimum(place + ALPHA, BETA) - place
    return score + tl.sum(tl.reshape(own, [CHUNK, BETA]), 1)


@triton.jit
def best(keys, FREE: tl.constexpr, CHUNK: tl.constexpr):
    """Which of `keys` [CHUNK] are the FREE greatest that are not -1; of equal ones the first."""
    place = tl.arange(0, CHUNK)
    # Rows beat columns: sums down the columns stay within threads.
    better = keys[:, None] > keys[None, :]
    better = better | ((keys[:, None] == keys[None, :]) & (place[:, None] < place[None, :]))
    return (keys >= 0) & (tl.sum(better.to(tl.int32), 0) < FREE)


@triton.jit
def leave(KEYS, apart, keys, numbers, pages, won, SLOTS: tl.constexpr):
    """Store the winners in SLOTS places, in order; numbers and pages lie `apart` behind. Places may be left over."""
    slot = tl.arange(0, SLOTS)
    rank = tl.cumsum(won.to(tl.int32), 0) - 1
    tl.store(KEYS + slot, tl.full([SLOTS], -1, tl.int32), mask=slot >= tl.sum(won.to(tl.int32), 0))
    tl.store(KEYS + rank, keys, mask=won)
    tl.store(KEYS + apart + rank, numbers, mask=won)
    tl.store(KEYS + 2 * apart + rank, pages, mask=won)


@triton.jit
def settle(
    HERE, OUT, TABLE, score, current, chunk, token, N: tl.constexpr, PAGES_OF: tl.constexpr, TOPK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
    CANDIDATES_AT: tl.constexpr,
):  # fmt: skip
    """From a chunk's scores: block indices if it is the only one, else candidates with the pages they lie in.

    PAGES_OF: blocks of a page.
    """
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    place = tl.arange(0, CHUNK)
    block = chunk * CHUNK + place
    score = tl.where(score > 0.0, score, 0.0)  # NaN counts as 0
    keys = tl.where((block >= INIT) & (block <= current - LOCAL), score.to(tl.int32, bitcast=True), -1)
    won = best(keys, FREE, CHUNK)
    if CHUNKS == 1:
        tl.store(OUT + INIT + tl.cumsum(won.to(tl.int32), 0) - 1, block, mask=won)
    else:
        page = tl.load(TABLE + block // PAGES_OF, mask=keys >= 0, other=-1)
        KEYS = (HERE + CANDIDATES_AT).to(tl.pointer_type(tl.int32)) + (token * CHUNKS + chunk) * SLOTS
        leave(KEYS, N * CHUNKS * SLOTS, keys, block, page, won, SLOTS)


@triton.jit
def leave_none(
    HERE, chunk, token, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, CANDIDATES_AT: tl.constexpr
):  # fmt: skip
    """No candidates of a chunk."""
    KEYS = (HERE + CANDIDATES_AT).to(tl.pointer_type(tl.int32)) + (token * CHUNKS + chunk) * SLOTS
    slot = tl.arange(0, SLOTS)
    tl.store(KEYS + slot, tl.full([SLOTS], -1, tl.int32))


@triton.jit
def store_forced(OUT, current, TOPK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr):
    """What of a token's block indices needs no choice: forced blocks, or all blocks where there are places for all.

    `current` is the token's own block, -1 for padding.
    """
    place = tl.arange(0, triton.next_power_of_2(TOPK))
    if current < TOPK:
        tl.store(OUT + place, tl.where(place <= current, place, -1), mask=place < TOPK)
    else:
        forced = (place < INIT) | ((place >= TOPK - LOCAL) & (place < TOPK))
        tl.store(OUT + place, tl.where(place < INIT, place, current + 1 - TOPK + place), mask=forced)


@triton.jit
def current_block(LENGTHS, COUNTS, sequence, token, BLOCK_SIZE: tl.constexpr):
    """The block of a token's position, -1 for padding."""
    count = tl.load(COUNTS + sequence)
    position = tl.load(LENGTHS + sequence) - count + token
    return tl.where(token < count, position // BLOCK_SIZE, -1)


@triton.jit
def choose(
    LENGTHS, COUNTS, HERE, OUT, TABLE, sequence, token, chunk, width,
    N: tl.constexpr, GROUP: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, PAGES_OF: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOPK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, CANDIDATES_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
):  # fmt: skip
    """One chunk of one token's choice, for one kv head, from the logits. OUT: the token's block indices."""
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    current = current_block(LENGTHS, COUNTS, sequence, token, BLOCK_SIZE)
    if CHUNKS == 1:
        store_forced(OUT, current, TOPK, INIT, LOCAL)
    if (FREE > 0) & (current >= TOPK) & (chunk * CHUNK <= current - LOCAL):
        position = tl.load(LENGTHS + sequence) - tl.load(COUNTS + sequence) + token
        score = block_scores(
            *(HERE + LOGITS_AT, HERE + M_AT, HERE + L_AT, token * GROUP, chunk),
            *(num_compressed(position, KERNEL_SIZE, KERNEL_STRIDE), width, GROUP, HEADS_AT_ONCE, CHUNK),
            *(KERNEL_SIZE // KERNEL_STRIDE, BLOCK_SIZE // KERNEL_STRIDE, SIZE, SPLITS),
        )
        settle(
            *(HERE, OUT, TABLE, score, current, chunk, token, N, PAGES_OF, TOPK, INIT, LOCAL, CHUNK, CHUNKS, SLOTS),
            CANDIDATES_AT,
        )
    elif CHUNKS > 1:
        leave_none(HERE, chunk, token, CHUNKS, SLOTS, CANDIDATES_AT)


@triton.jit
def decode_levels_kernel(
    SCRATCH,
    region,
    N: tl.constexpr,
    FREE: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    FROM_AT: tl.constexpr,
    FROM: tl.constexpr,
    TO_AT: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Of FROM candidates of each token, the FREE best of every CHUNK: CHUNKS * SLOTS. Grid (B * HEADS * N * CHUNKS)."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    token = pid // CHUNKS % N
    here = SCRATCH + (pid // (CHUNKS * N)).to(tl.int64) * region
    OLD = (here + FROM_AT).to(tl.pointer_type(tl.int32)) + token * FROM
    NEW = (here + TO_AT).to(tl.pointer_type(tl.int32)) + (token * CHUNKS + chunk) * SLOTS
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = tl.load(OLD + place, mask=place < FROM, other=-1)
    numbers = tl.load(OLD + N * FROM + place, mask=keys >= 0, other=0)
    pages = tl.load(OLD + 2 * (N * FROM) + place, mask=keys >= 0, other=-1)
    leave(NEW, N * CHUNKS * SLOTS, keys, numbers, pages, best(keys, FREE, CHUNK), SLOTS)
