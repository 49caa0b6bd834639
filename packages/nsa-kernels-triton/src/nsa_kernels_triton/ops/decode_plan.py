"""How a decode step is cut into programs, and where its scratch memory holds what: from sizes alone."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from nsa_kernels_triton import configurations
from nsa_kernels_triton.configurations import Launch
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.tiles import padded_bytes, pieces, power_of_two

MOST_CANDIDATES = 512  # that the last choice goes over; more are thinned out before
COMPARED = 1 << 14  # pairs of candidates that a program compares at a time: they are in registers
ALIGNED = 32  # numbers that parts of the scratch memory begin at multiples of


class DecodeSizes(NamedTuple):
    """What a plan depends on.

    Fields:
        family, processors: of the device: its configurations, how many multiprocessors it has.
        batch_size, tokens, num_kv_heads, group_size, head_dim, v_head_dim, itemsize: of q [B, N, Hk * G, Dk] and v.
        kernel_size ... window_size: of the blocks.
        cmp_page, slc_page, win_page: rows of a page.
        cmp_pages, slc_pages: pages that a sequence has room for.
        appended: how new rows come: "" (there are none), "pooled" or "completed".
        interleaved: how pairs lie that are rotated.
    """

    family: str
    processors: int
    batch_size: int
    tokens: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    cmp_page: int
    slc_page: int
    win_page: int
    cmp_pages: int
    slc_pages: int
    appended: str
    interleaved: bool


class Step(NamedTuple):
    """One launch: the grid, and the constants and options that the kernel is called with."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The launches of a decode step, in order, and its scratch memory.

    Fields:
        compressed, choice, selected: see the kernels.
        levels: between choice and selected, where there are many candidates.
        merge: None where selected merges.
        region: numbers of scratch memory for each sequence and kv head.
        width: of them, logits of one query row.
    """

    compressed: Step
    choice: Step | None
    levels: tuple[Step, ...]
    selected: Step
    merge: Step | None
    region: int
    width: int


class _Regions:
    """Gives parts of the scratch memory out one after the other."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, size: int) -> int:
        start = self.end
        self.end += ceil(size / ALIGNED) * ALIGNED
        return start


@lru_cache(maxsize=1024)
def decode_plan(sizes: DecodeSizes, overrides: object) -> DecodePlan:
    """The plan for some sizes. `overrides` says which numbers are not those of the configuration files.

    Keys are split until there are `programs` programs on each multiprocessor, at most `splits` ways. Where there are
    enough without, kernels are spared: values are added with the logits, outputs merged with the selected blocks; and
    if one chunk of blocks is all there is to choose from, the first kernel does that, and there is no second one.
    """
    of = sizes
    rows = of.tokens * of.group_size
    pairs, room = of.batch_size * of.num_kv_heads, of.slc_pages * of.slc_page
    row_bytes = padded_bytes(of.head_dim, of.v_head_dim, of.itemsize)
    case = {"row_bytes": row_bytes, "itemsize": of.itemsize, "rows": rows, "pairs": pairs, "room": room}
    tile_rows = min(64, max(16, power_of_two(rows)))
    row_tiles = ceil(rows / tile_rows)
    size = tile_rows * row_tiles

    def config(kernel: str) -> Launch:
        return configurations.choose(kernel, of.family, **case)

    def splits(programs: int, most: int, work: int, of_tiles: int = row_tiles) -> int:
        """A power of two."""
        wanted = min(most, max(1, of.processors * programs // (pairs * of_tiles)), power_of_two(work))
        return power_of_two(wanted + 1) // 2

    compressed, choice, selected, merging = map(
        config, ("decode_compressed", "decode_choice", "decode_selected", "decode_merge")
    )
    is_early = bool(compressed["early"]) and not interpreted()
    early = {"EARLY": is_early} | ({"launch_pdl": True} if is_early else {})
    cmp_keys = _tile(compressed["keys"], of.cmp_page)
    win_keys = _tile(selected["keys"], of.win_page)
    slc_keys = _tile(selected["keys"], of.block_size)
    width = of.cmp_pages * of.cmp_page
    cmp_splits = splits(compressed["programs"], compressed["splits"], width // cmp_keys)
    slc_splits = splits(selected["programs"], selected["splits"], of.topk, of.tokens)

    free = of.topk - of.init_blocks - of.local_blocks
    slots = power_of_two(free)
    competing = max(1, room // of.block_size - of.local_blocks) if free else 1
    chunk = max(choice["chunk"], 2 * slots)
    if competing <= chunk:
        chunk = max(16, power_of_two(competing))
    chunks = ceil(competing / chunk)
    values_first = compressed["values"] > (cmp_splits > 1)
    alone = values_first and cmp_splits == 1 and chunks == 1 and row_tiles == 1 and bool(choice["alone"])
    value_splits = 0
    if not values_first:
        value_splits = splits(choice["value_programs"], choice["value_splits"], width // cmp_keys)
    out_splits = value_splits or cmp_splits

    take = _Regions()
    dv = of.v_head_dim
    places = {"M_AT": take.take(cmp_splits * size), "L_AT": take.take(cmp_splits * size)}
    places["O_AT"] = take.take(out_splits * size * dv)
    for name, count in (("WIN", slc_splits), ("SLC", slc_splits)):
        places |= {f"{name}_M_AT": take.take(count * size), f"{name}_L_AT": take.take(count * size)}
        places[f"{name}_O_AT"] = take.take(count * size * dv)
    count, candidates_at = 0, 0
    levels = []
    if chunks > 1:
        count = chunks * slots
        candidates_at = first_candidates = take.take(3 * of.tokens * count)
        while count > MOST_CANDIDATES:
            fewer = ceil(count / chunk)
            next_at = take.take(3 * of.tokens * fewer * slots)
            constants = {"N": of.tokens, "FREE": free, "CHUNK": chunk, "SLOTS": slots, "FROM_AT": candidates_at}
            constants |= {"FROM": count, "TO_AT": next_at, "CHUNKS": fewer} | early | choice.options
            levels.append(Step((pairs * of.tokens * fewer, 1, 1), constants))
            count, candidates_at = fewer * slots, next_at
    logits_at = take.take(size * width)

    def at(*names: str) -> dict[str, int]:
        return {name: places[name] for name in names}

    k_pieces = dict(zip(("K0", "K1"), pieces(of.head_dim), strict=True))
    v_pieces = dict(zip(("V0", "V1"), pieces(dv), strict=True))
    heads = {"N": of.tokens, "HEADS": of.num_kv_heads, "GROUP": of.group_size}
    dims = {"DK": of.head_dim, "DV": dv, **k_pieces, **v_pieces}
    pooling = {"KERNEL_SIZE": of.kernel_size, "KERNEL_STRIDE": of.kernel_stride}
    chosen = {"BLOCK_SIZE": of.block_size, "TOPK": of.topk, "INIT": of.init_blocks, "LOCAL": of.local_blocks}
    tiles = {"ROWS": tile_rows, "ROW_TILES": row_tiles}
    own, window = ("M_AT", "L_AT", "O_AT"), ("WIN_M_AT", "WIN_L_AT", "WIN_O_AT")
    listing = {"CHUNK": chunk, "SLOTS": slots, "HEADS_AT_ONCE": min(choice["heads"], power_of_two(of.group_size))}
    first = Step(
        (pairs * row_tiles * cmp_splits + (of.batch_size * of.tokens if of.appended else 0), 1, 1),
        heads
        | pooling
        | dims
        | tiles
        | chosen
        | listing
        | at(*own)
        | {"CHOOSE": alone, "APPEND": of.appended, "INTERLEAVED": of.interleaved}
        | {"CMP_PAGE": of.cmp_page, "SLC_PAGE": of.slc_page, "WIN_PAGE": of.win_page}
        | {"KEYS": cmp_keys, "SPLITS": cmp_splits, "VALUES": not value_splits, "LOGITS_AT": logits_at}
        | {"K_WIDTH": max(16, power_of_two(of.head_dim)), "V_WIDTH": max(16, power_of_two(dv))}
        | {"EARLY": is_early}
        | compressed.options,
    )
    second = Step(
        (pairs * (of.tokens * chunks + row_tiles * value_splits), 1, 1),
        heads
        | pooling
        | {"DV": dv, **v_pieces}
        | tiles
        | chosen
        | listing
        | at(*own)
        | {"CHUNKS": chunks, "CMP_PAGE": of.cmp_page, "SLC_PAGE": of.slc_page, "KEYS": cmp_keys}
        | {"SPLITS": cmp_splits, "VALUE_SPLITS": value_splits, "LOGITS_AT": logits_at}
        | {"CANDIDATES_AT": first_candidates if chunks > 1 else 0}
        | early
        | choice.options,
    )
    merging_apart = slc_splits > 1
    third = Step(
        (pairs * of.tokens * slc_splits, 1, 1),
        heads
        | dims
        | chosen
        | at(*own, *window, "SLC_M_AT", "SLC_L_AT", "SLC_O_AT")
        | {"PAGE": of.slc_page, "ROWS": max(16, power_of_two(of.group_size)), "SIZE": size, "KEYS": slc_keys}
        | {"WIN_PAGE": of.win_page, "WIN_KEYS": win_keys}
        | {"FRESH": bool(compressed["early"] and of.appended)}
        | {"SPLITS": slc_splits, "PART": power_of_two(of.topk) // slc_splits, "COUNT": count}
        | {"WIDTH": power_of_two(count), "COMPARED": min(power_of_two(count), COMPARED // power_of_two(count))}
        | {"MERGE": not merging_apart}
        | {"CMP_SPLITS": out_splits, "ADDED": bool(value_splits)}
        | {"CANDIDATES_AT": candidates_at}
        | early
        | selected.options,
    )
    merge_rows = min(merging["rows"], power_of_two(rows))
    columns = min(merging["columns"], power_of_two(dv))
    merge_tiles = {"ROWS": merge_rows, "ROW_TILES": ceil(rows / merge_rows)}
    merge_tiles |= {"COLUMNS": columns, "COLUMN_TILES": ceil(dv / columns)}
    last = Step(
        (pairs * merge_tiles["ROW_TILES"] * merge_tiles["COLUMN_TILES"], 1, 1),
        heads
        | {"DV": dv, "SIZE": size, "ADDED": bool(value_splits)}
        | merge_tiles
        | at(*own, *window, "SLC_M_AT", "SLC_L_AT", "SLC_O_AT")
        | {"CMP_SPLITS": out_splits, "SLC_SPLITS": slc_splits}
        | early
        | merging.options,
    )
    choosing, merging_too = None if alone else second, last if merging_apart else None
    return DecodePlan(first, choosing, tuple(levels), third, merging_too, take.end, width)


def _tile(most: int, whole: int) -> int:
    """The largest power of two up to `most` that divides `whole`."""
    return min(most, whole & -whole)
