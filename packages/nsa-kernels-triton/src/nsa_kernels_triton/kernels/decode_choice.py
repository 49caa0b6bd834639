"""A decode step, second kernel: block scores and their choice, beside it compressed values and the window.

Three kinds of programs share a grid, so that those that wait (the choice) run beside those that load.

The choice takes CHUNK blocks a program: their scores (Eq. 9, 10), and of the blocks that compete the FREE best by
counting how many are better. One chunk is all: it writes the block indices. Of several, each leaves its winners as
candidates, in ascending order, keys and block numbers in SLOTS places; `decode_levels_kernel` thins out many of them,
and the next kernel chooses for good. The keys are the scores' bits, which order as non-negative floats do; -1 is none.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.decode_compressed import load_queries, row_of, store_part
from nsa_kernels_triton.kernels.interval import num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, update


@triton.jit
def log_sums(M, L, row, there, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Logarithm, base 2, of the sum over the splits for each query row; 0 for rows that see nothing."""
    split = tl.arange(0, SPLITS)
    places = split[:, None] * SIZE + row[None, :]
    m = tl.load(M + places, mask=there[None, :], other=float("-inf"))
    norm = tl.load(L + places, mask=there[None, :], other=0.0)
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(norm * tl.exp2(m - shift[None, :]), 0)
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
def winners(keys, FREE: tl.constexpr, CHUNK: tl.constexpr):
    """Which of `keys` [CHUNK] are the FREE greatest that are not -1; of equal ones the first."""
    place = tl.arange(0, CHUNK)
    better = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (place[None, :] < place[:, None]))
    return (keys >= 0) & (tl.sum(better.to(tl.int32), 1) < FREE)


@triton.jit
def leave(KEYS, NUMBERS, keys, numbers, won, SLOTS: tl.constexpr):
    """Store the winners in SLOTS places, in order; places that are left over hold no candidate."""
    slot = tl.arange(0, SLOTS)
    place = tl.cumsum(won.to(tl.int32), 0) - 1
    tl.store(KEYS + slot, tl.full([SLOTS], -1, tl.int32), mask=slot >= tl.sum(won.to(tl.int32), 0))
    tl.store(KEYS + place, keys, mask=won)
    tl.store(NUMBERS + place, numbers, mask=won)


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
    LENGTHS, COUNTS, HERE, OUT, pid, width,
    N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr,
    CANDIDATES_AT: tl.constexpr, LOGITS_AT: tl.constexpr, sequence, head, token, chunk,
):  # fmt: skip
    """One chunk of one token's choice, for one kv head."""
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    current = current_block(LENGTHS, COUNTS, sequence, token, BLOCK_SIZE)
    out = OUT + ((sequence * N + token) * HEADS + head).to(tl.int64) * TOPK
    if CHUNKS == 1:
        store_forced(out, current, TOPK, INIT, LOCAL)
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    last = current - LOCAL  # that competes
    KEYS = (HERE + CANDIDATES_AT).to(tl.pointer_type(tl.int32)) + (token * CHUNKS + chunk) * SLOTS
    if (FREE > 0) & (current >= TOPK) & (chunk * CHUNK <= last):
        total = tl.load(LENGTHS + sequence) - tl.load(COUNTS + sequence) + token
        total = num_compressed(total, KERNEL_SIZE, KERNEL_STRIDE)
        score = block_scores(
            *(HERE + LOGITS_AT, HERE + M_AT, HERE + L_AT, token * GROUP, chunk, total, width),
            *(GROUP, HEADS_AT_ONCE, CHUNK, ALPHA, BETA, SIZE, SPLITS),
        )
        score = tl.where(score > 0.0, score, 0.0)  # NaN counts as 0
        keys = tl.where((block >= INIT) & (block <= last), score.to(tl.int32, bitcast=True), -1)
        won = winners(keys, FREE, CHUNK)
        if CHUNKS == 1:
            tl.store(out + INIT + tl.cumsum(won.to(tl.int32), 0) - 1, block, mask=won)
        else:
            leave(KEYS, KEYS + N * CHUNKS * SLOTS, keys, block, won, SLOTS)
    elif CHUNKS > 1:
        slot = tl.arange(0, SLOTS)
        tl.store(KEYS + slot, tl.full([SLOTS], -1, tl.int32))


@triton.jit
def add_values(
    HERE, COUNTS, V_CMP, TABLE, sequence, head, row_tile, split, total, width,
    N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, VALUE_SPLITS: tl.constexpr,
    SIZE: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, O_AT: tl.constexpr, LOGITS_AT: tl.constexpr,
):  # fmt: skip
    """Compressed attention's output over the tiles of one split: probabilities times values, to be added up."""
    most_tiles = width // KEYS
    page = tl.load(TABLE + tl.minimum(split, most_tiles - 1) * KEYS // PAGE)
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(row_tile, ROWS, GROUP, N, count)
    lse = log_sums(HERE + M_AT, HERE + L_AT, row, there, SIZE, SPLITS)
    _, _, acc0, acc1 = empty(ROWS, V0, V1)
    line = HERE + LOGITS_AT + row.to(tl.int64) * width
    key = tl.arange(0, KEYS)
    for tile in tl.range(split, tl.where(count > 0, tl.cdiv(total, KEYS), 0), VALUE_SPLITS):
        block = tile * KEYS + key
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = (block < total) & (page >= 0)
        page = tl.load(TABLE + tl.minimum(tile + VALUE_SPLITS, most_tiles - 1) * KEYS // PAGE)
        v_rows = V_CMP + (slot * HEADS + head) * DV
        v0 = load_piece(v_rows, loaded, 0, V0, DV)
        v1 = load_piece(v_rows, loaded, V0, V1, DV)
        seen = there[:, None] & (block < total)[None, :]
        s = tl.load(line[:, None] + block[None, :], mask=seen, other=float("-inf"))
        p = tl.exp2(s - lse[:, None]).to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0, input_precision="ieee")
        if v1 is not None:
            acc1 = tl.dot(p, v1, acc1, input_precision="ieee")
    rows = HERE + O_AT + (split * SIZE + row).to(tl.int64) * DV
    everywhere = row >= 0
    store_piece(rows, acc0, everywhere, 0, V0, DV)
    if V1 > 0:
        store_piece(rows, acc1, everywhere, V0, V1, DV)


@triton.jit
def attend_to_window(
    HERE, Q, LENGTHS, COUNTS, K_WIN, V_WIN, TABLE, V_TABLE, sequence, head, row_tile, split, scale, window_size,
    N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, SIZE: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, O_AT: tl.constexpr,
    SAME: tl.constexpr,
):  # fmt: skip
    """The window over one split of its tiles, which begin where pages allow a tile to be of one page."""
    length = tl.load(LENGTHS + sequence)
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(row_tile, ROWS, GROUP, N, count)
    q0, q1 = load_queries(Q, sequence, head, token, member, there, N, HEADS, GROUP, DK, K0, K1)
    position = tl.where(there, length - count + token, -1)
    earliest = tl.maximum(length - count + 1 - window_size, 0)
    first = earliest // KEYS
    tiles = tl.where(count > 0, tl.cdiv(length, KEYS) - first, 0)
    part = tl.cdiv(tiles, WINDOW_SPLITS)
    begin = first + split * part
    stop = tl.minimum(begin + part, first + tiles)
    key = tl.arange(0, KEYS)
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    last = tl.maximum(length - 1, 0) // PAGE
    page = tl.load(TABLE + tl.minimum(begin * KEYS // PAGE, last))
    for tile in tl.range(begin, stop):
        at = tile * KEYS + key
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = (at >= earliest) & (at < length) & (page >= 0)
        if SAME:
            v_slot = slot
            v_loaded = loaded
        else:
            v_page = tl.load(V_TABLE + tile * KEYS // PAGE)
            v_slot = v_page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
            v_loaded = (at >= earliest) & (at < length) & (v_page >= 0)
        page = tl.load(TABLE + tl.minimum((tile + 1) * KEYS // PAGE, last))
        k_rows = K_WIN + (slot * HEADS + head) * DK
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
        seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window_size)
        s = tl.where(seen, s, float("-inf"))
        v_rows = V_WIN + (v_slot * HEADS + head) * DV
        v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
        v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
        m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
    store_part(HERE + M_AT + split * SIZE, HERE + L_AT + split * SIZE, HERE + O_AT + split * SIZE * DV,
               row, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip


@triton.jit(do_not_specialize=["scale", "window_size"])
def decode_choice_kernel(
    Q,
    SCRATCH,
    LENGTHS,
    COUNTS,
    V_CMP,
    V_CMP_TABLE,
    K_WIN,
    V_WIN,
    K_WIN_TABLE,
    V_WIN_TABLE,
    OUT,
    batch_size,
    scale,
    window_size,
    region,
    width,
    cmp_table,
    win_table,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
    CMP_PAGE: tl.constexpr,
    WIN_PAGE: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    CMP_KEYS: tl.constexpr,
    WIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_SPLITS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    WIN_M_AT: tl.constexpr,
    WIN_L_AT: tl.constexpr,
    WIN_O_AT: tl.constexpr,
    CANDIDATES_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
):
    """Grid (B * HEADS * (N * CHUNKS + ROW_TILES * (VALUE_SPLITS + WINDOW_SPLITS))). VALUE_SPLITS 0: summed already.

    Limited by the bytes of v_cmp and the window where many programs run, by the choice's latency where few do.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    SIZE: tl.constexpr = ROWS * ROW_TILES
    choosing = batch_size * (N * CHUNKS)
    adding = batch_size * (ROW_TILES * VALUE_SPLITS)
    if pid < choosing:
        sequence = pid // (N * CHUNKS)
        token = pid // CHUNKS % N
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        choose(
            *(LENGTHS, COUNTS, here, OUT, pid, width, N, HEADS, GROUP, HEADS_AT_ONCE, ALPHA, BETA, KERNEL_SIZE),
            *(KERNEL_STRIDE, BLOCK_SIZE, TOPK, INIT, LOCAL, CHUNK, CHUNKS, SLOTS, SIZE, SPLITS, M_AT, L_AT),
            *(CANDIDATES_AT, LOGITS_AT, sequence, head, token, pid % CHUNKS),
        )
    elif pid < choosing + adding:
        pid = pid - choosing
        VALUE_PROGRAMS: tl.constexpr = ROW_TILES * VALUE_SPLITS if VALUE_SPLITS > 0 else 1
        SOME_SPLITS: tl.constexpr = VALUE_SPLITS if VALUE_SPLITS > 0 else 1
        sequence = pid // VALUE_PROGRAMS
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        total = num_compressed(tl.load(LENGTHS + sequence) - 1, KERNEL_SIZE, KERNEL_STRIDE)
        if VALUE_SPLITS > 0:
            add_values(
                *(here, COUNTS, V_CMP, V_CMP_TABLE + sequence.to(tl.int64) * cmp_table, sequence, head),
                *(pid // SOME_SPLITS % ROW_TILES, pid % SOME_SPLITS, total, width, N, HEADS, GROUP, CMP_PAGE),
                *(DV, V0, V1, ROWS, CMP_KEYS, SPLITS, VALUE_SPLITS, SIZE, M_AT, L_AT, O_AT, LOGITS_AT),
            )
    else:
        pid = pid - (choosing + adding)
        sequence = pid // (ROW_TILES * WINDOW_SPLITS)
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        table = K_WIN_TABLE + sequence.to(tl.int64) * win_table
        v_table = table
        if V_WIN_TABLE is not None:
            v_table = V_WIN_TABLE + sequence.to(tl.int64) * win_table
        attend_to_window(
            *(here, Q, LENGTHS, COUNTS, K_WIN, V_WIN, table, v_table, sequence, head),
            *(pid // WINDOW_SPLITS % ROW_TILES, pid % WINDOW_SPLITS, scale, window_size, N, HEADS, GROUP, WIN_PAGE),
            *(DK, K0, K1, DV, V0, V1, ROWS, WIN_KEYS, WINDOW_SPLITS, SIZE, WIN_M_AT, WIN_L_AT, WIN_O_AT),
            V_WIN_TABLE is None,
        )


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
):
    """Of FROM candidates of each token, the FREE best of every CHUNK: CHUNKS * SLOTS. Grid (B * HEADS * N * CHUNKS)."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    token = pid // CHUNKS % N
    here = SCRATCH + (pid // (CHUNKS * N)).to(tl.int64) * region
    OLD = (here + FROM_AT).to(tl.pointer_type(tl.int32)) + token * FROM
    NEW = (here + TO_AT).to(tl.pointer_type(tl.int32)) + (token * CHUNKS + chunk) * SLOTS
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = tl.load(OLD + place, mask=place < FROM, other=-1)
    won = winners(keys, FREE, CHUNK)
    numbers = tl.load(OLD + N * FROM + place, mask=won, other=0)
    leave(NEW, NEW + N * CHUNKS * SLOTS, keys, numbers, won, SLOTS)
