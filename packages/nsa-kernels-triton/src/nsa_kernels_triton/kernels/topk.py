"""Exact top-k of block scores (Eq. 11), in ascending order of index; equal scores go to the lower index.

Non-negative floats order as their bits do, so the scores become int32 keys; -1 stands for no candidate. A threshold is
found by bisection on keys: bounds LO and HI such that at least `need` keys are >= LO and fewer are >= HI. It ends when
exactly `need` are, or when LO is the value of the last one chosen; then ties at LO are settled by index.

Long rows are a tournament. A first level chooses from each span of a row's blocks and leaves (key, block number) of
the winners, in ascending order, in as many slots for every span; a next level chooses from those. Since slots keep the
order of the blocks, ties are settled by position on every level.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.tiles import find_tile, key_rows


@triton.jit
def popcount(x):
    """How many bits of an int32 are set. LLVM makes one instruction of it."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit
def read_keys(OWN, SPILL, KEYS, position, there, LEVEL: tl.constexpr, SPILL_EVERY: tl.constexpr):
    """Keys at some positions of a row, which the pointers name: from scores on level 0, where NaN counts as 0."""
    if LEVEL == 0:
        score = tl.load(OWN + position, mask=there, other=0.0)
        if SPILL_EVERY > 0:
            spilled = there & (position > 0) & (position % SPILL_EVERY == 0)
            score += tl.load(SPILL + position // SPILL_EVERY - 1, mask=spilled, other=0.0)
        return tl.where(score > 0.0, score, 0.0).to(tl.int32, bitcast=True)
    else:
        return tl.load(KEYS + position, mask=there, other=-1)


@triton.jit
def raise_bound(keys, need, lo, hi, count, ENOUGH: tl.constexpr):
    """(lo, hi, count) with lo raised until at most need + ENOUGH of `keys` are >= lo, if ties allow; one axis."""
    while (count > need + ENOUGH) & (hi - lo > 1):
        middle = lo + (hi - lo) // 2
        found = tl.sum((keys >= middle).to(tl.int32), 0)
        if found >= need:
            lo = middle
            count = found
        else:
            hi = middle
    return lo, hi, count


@triton.jit
def members(chosen, bit):
    """Per lane, the bits of its chosen ones among [groups, 32, 4]."""
    return tl.sum(tl.sum(tl.where(chosen, bit, 0), 2), 0)


@triton.jit
def pick_few(OWN, SPILL, KEYS, start, keys, need, SPAN: tl.constexpr, LEVEL: tl.constexpr, SPILL_EVERY: tl.constexpr):
    """Positions of the `need` <= 32 greatest of `keys` [SPAN / 4, 4], ascending in the first lanes of 32. For one warp.

    `keys` are those of positions from `start` of a row, which the pointers name.

    The greatest of each lane's keys bound the threshold from below; what passes it, hardly more than is needed, is
    marked in one mask of bits a lane and dealt out again, one to a lane: from there on a key is one register.
    """
    GROUPS: tl.constexpr = SPAN // 128
    lane = tl.arange(0, 32)
    keys = tl.reshape(keys, [GROUPS, 32, 4])
    of_lane = tl.arange(0, GROUPS)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    bit = 1 << of_lane
    greatest = tl.max(tl.max(keys, 2), 0)
    least = tl.min(greatest, 0)
    top = tl.max(greatest, 0) + 1
    lo, hi, count = raise_bound(greatest, need, tl.maximum(least, 0), top, tl.where(least < 0, 1024, 32), 2)
    mask = members(keys >= lo, bit)
    many = popcount(mask)
    count = tl.sum(many, 0)
    hi = top
    while (count > 32) & (hi - lo > 1):
        middle = lo + (hi - lo) // 2
        mask_above = members(keys >= middle, bit)
        many_above = popcount(mask_above)
        found = tl.sum(many_above, 0)
        if found >= need:
            lo = middle
            mask = mask_above
            many = many_above
            count = found
        else:
            hi = middle
    if count > 32:  # lo is the threshold and more than 32 tie at it or pass it: the position of the last one chosen
        position = (of_lane // 4 * 32 + lane[None, :, None]) * 4 + of_lane % 4
        ties = need - tl.sum(popcount(members(keys > lo, bit)), 0)
        before = -1
        until = SPAN - 1
        while until - before > 1:
            half = (before + until) // 2
            if tl.sum(popcount(members((keys == lo) & (position <= half), bit)), 0) >= ties:
                until = half
            else:
                before = half
        mask = members((keys > lo) | ((keys == lo) & (position <= until)), bit)
        many = popcount(mask)
        count = need

    # Lane n takes survivor n, counted by lane and bit: the lane it is of by bisection on the running sum, then its bit.
    running = tl.cumsum(many, 0)
    source = lane * 0
    for step in tl.static_range(4, -1, -1):
        passed = tl.gather(running, source + ((1 << step) - 1), 0) <= lane
        source = tl.where(passed, source + (1 << step), source)
    source = tl.minimum(source, 31)
    mask = tl.gather(mask, source, 0)
    skip = lane - tl.gather(running - many, source, 0)
    for done in range(tl.max(many, 0) - 1):
        mask = tl.where(done < skip, mask & (mask - 1), mask)
    lowest = popcount((mask & -mask) - 1)
    position = (lowest // 4 * 32 + source) * 4 + lowest % 4
    live = lane < count
    position += start
    key = tl.where(live, read_keys(OWN, SPILL, KEYS, position, live, LEVEL, SPILL_EVERY), -1)
    lo, hi, count = raise_bound(key, need, lo, top, count, 0)
    chosen = key >= lo
    nowhere = 1 << 30
    if count > need:  # ties at the threshold
        ties = need - tl.sum((key > lo).to(tl.int32), 0)
        tied = tl.sort(tl.where(key == lo, position, nowhere))
        until = tl.sum(tl.where(lane == ties - 1, tied, 0), 0)
        chosen = (key > lo) | ((key == lo) & (position <= until))
    return tl.sort(tl.where(chosen, position, nowhere))


@triton.jit
def pick_many(keys, need, count, SPAN: tl.constexpr):
    """(keys, chosen, rank), each [SPAN]: which of keys [SPAN / 4, 4] are the `need` greatest of the `count` that are
    not -1, and how many chosen ones come before each. Any number of warps."""
    keys = tl.reshape(keys, [SPAN])
    lo, _, count = raise_bound(keys, need, tl.full([], 0, tl.int32), tl.max(keys, 0) + 1, count, 0)
    chosen = keys >= lo
    if count > need:  # ties at the threshold
        ties = need - tl.sum((keys > lo).to(tl.int32), 0)
        tied = (keys == lo).to(tl.int32)
        chosen = (keys > lo) | ((keys == lo) & (tl.cumsum(tied, 0) <= ties))
    return keys, chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1


@triton.jit(do_not_specialize=["batch_size", "first_tile"])
def topk_kernel(
    OWN,
    SPILL,
    KEYS,
    NUMBERS,
    NEXT_KEYS,
    NEXT_NUMBERS,
    OUT,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    batch_size,
    first_tile,
    width,
    next_width,
    num_kv_heads,
    LEVEL: tl.constexpr,
    LAST: tl.constexpr,
    SPAN: tl.constexpr,
    BEFORE: tl.constexpr,
    SLOTS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPILL_EVERY: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One level of the top-k of a chunk's rows. Program (ROWS rows of a tile and head, span of SPAN positions).

    Level 0 reads OWN [rows, width] and SPILL [rows, width / SPILL_EVERY] as `kernels.scores` leaves them (SPILL_EVERY
    0: there is none), a later one KEYS and NUMBERS [rows, width]: SLOTS for each span of BEFORE positions. The last
    level, of one span, writes OUT [Tq, Hk, TOPK], forced blocks and rows with places for all blocks included; others
    write NEXT_KEYS and NEXT_NUMBERS [rows, next_width], SLOTS a span. FEW: `pick_few` does it, one warp, at most 32
    free places, SPAN from 128 to 1024.

    Limited by latency: bisection is a chain of warp reductions. Many rows a multiprocessor hide it.
    """
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    PARTS: tl.constexpr = QUERIES // ROWS
    pair = tl.program_id(0) // PARTS
    head = pair % num_kv_heads
    sequence, first, end = find_tile(CU_SEQLENS_Q, first_tile + pair // num_kv_heads, batch_size, QUERIES)
    first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    query = (tl.program_id(0) % PARTS) * ROWS
    stop = tl.minimum(query + ROWS, tl.maximum(end - first, 0).to(tl.int32))
    start = tl.program_id(1) * SPAN
    for number in range(query, stop):
        row = first + number
        time = row + shift - first_key
        current = tl.where(time < 0, -1, time // BLOCK_SIZE).to(tl.int32)
        out = OUT + (row * num_kv_heads + head) * TOPK
        if LAST:
            place = tl.arange(0, triton.next_power_of_2(TOPK))
            if current < TOPK:
                tl.store(out + place, tl.where(place <= current, place, -1), mask=place < TOPK)
            else:
                forced = (place < INIT) | ((place >= INIT + FREE) & (place < TOPK))
                tl.store(out + place, tl.where(place < INIT, place, current + 1 - TOPK + place), mask=forced)
        length = current - LOCAL + 1
        for _level in tl.static_range(LEVEL):
            length = tl.cdiv(length, BEFORE) * SLOTS
        if FREE > 0 and (current >= TOPK) & (start < length):
            line = pair.to(tl.int64) * QUERIES + number
            own = OWN + line * width
            spill = SPILL + line * (width // (SPILL_EVERY if SPILL_EVERY > 0 else 1))
            old_keys = KEYS + line * width
            old_numbers = NUMBERS + line * width
            next_keys = NEXT_KEYS + line * next_width + tl.program_id(1) * SLOTS
            next_numbers = NEXT_NUMBERS + line * next_width + tl.program_id(1) * SLOTS
            fours = start + tl.arange(0, SPAN // 4) * 4
            position = fours[:, None] + tl.arange(0, 4)[None, :]
            nearby = (fours < length)[:, None] & (position >= 0)  # the same for four: a load of them is one instruction
            keys = read_keys(own, spill, old_keys, position, nearby, LEVEL, SPILL_EVERY)
            candidate = position < length
            if LEVEL == 0:
                candidate = candidate & (position >= INIT)
            keys = tl.where(candidate, keys, -1)
            count = tl.sum(tl.sum((keys >= 0).to(tl.int32), 1), 0)
            if LAST:
                need = tl.full([], FREE, tl.int32)  # the last level has them
            else:
                need = tl.minimum(count, FREE)
            if FEW:
                lane = tl.arange(0, 32)
                taken = lane < need
                chosen = pick_few(own, spill, old_keys, start, keys, need, SPAN, LEVEL, SPILL_EVERY)
                block = chosen
                if LEVEL > 0:
                    block = tl.load(old_numbers + chosen, mask=taken, other=0)
                if LAST:
                    tl.store(out + INIT + lane, block, mask=taken)
                else:
                    key = read_keys(own, spill, old_keys, chosen, taken, LEVEL, SPILL_EVERY)
                    tl.store(next_keys + lane, tl.where(taken, key, -1), mask=lane < SLOTS)
                    tl.store(next_numbers + lane, block, mask=taken)
            else:
                line_keys, chosen, rank = pick_many(keys, need, count, SPAN)
                block = start + tl.arange(0, SPAN)
                if LEVEL > 0:
                    block = tl.load(old_numbers + block, mask=chosen, other=0)
                if LAST:
                    tl.store(out + INIT + rank, block, mask=chosen)
                else:
                    slot = tl.arange(0, SLOTS)
                    tl.store(next_keys + slot, tl.full([SLOTS], -1, tl.int32), mask=slot >= need)
                    tl.store(next_keys + rank, line_keys, mask=chosen)
                    tl.store(next_numbers + rank, block, mask=chosen)
