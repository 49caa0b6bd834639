"""A decode step in two to four launches: see the kernels `decode_compressed`, `choice`, `selected` and `merging`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from nsa_varlen import BlockGeometry, PagedKV
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from torch import Tensor
from torch.nn.functional import pad

from nsa_kernels_triton import configurations
from nsa_kernels_triton.ops.decode_plan import DecodePlan, DecodeSizes, decode_plan
from nsa_kernels_triton.ops.launching import Prepared, num_processors, on_device
from nsa_kernels_triton.tiles import LOG2_E

SCRATCH_BYTES = 1 << 31  # more sequences than fit take turns

Stream = tuple[PagedKV, PagedKV]
Launch = tuple[str, Callable[..., object], tuple[Any, ...]]  # stage that it belongs to, what is called, with what


@on_device
def decode_attention(
    q: Tensor,
    q_cmp: Tensor,
    cmp: Stream,
    slc: Stream,
    win: Stream,
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    scale: float,
    new: NewTokens | None,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, Hq, Dv], block_indices int32 [B, N, Hk, topk]): see `TritonBackend.decode_attention`."""
    batch_size, tokens, num_heads, _ = q.shape
    num_kv_heads = slc[0].num_heads
    out = q.new_empty(batch_size, tokens, num_heads, slc[1].head_dim)
    indices = q.new_empty(batch_size, tokens, num_kv_heads, blocks.topk, dtype=torch.int32)
    if not out.numel() or not slc[0].block_table.shape[1]:  # nobody asks, or nobody has a token
        if new is not None:
            for kv in cmp:
                kv.lengths.copy_(blocks.num_compressed(slc[0].lengths))
        return out.zero_(), indices.fill_(-1)
    q, q_cmp, gates, counts = (x.contiguous() for x in (q, q_cmp, gates, counts))
    call: Any = q, q_cmp, cmp, slc, win, gates, counts, new, out, indices
    sizes = _sizes(q, cmp[0], slc, win[0], blocks, new)
    plan = decode_plan(sizes, configurations.overrides())
    most = max(1, SCRATCH_BYTES // (4 * plan.region * num_kv_heads))
    if batch_size <= most:
        for _, run, args in _launches(plan, blocks.window_size, scale, *call):
            run(*args)
        return out, indices
    for start in range(0, batch_size, most):
        some: Any = [_of_sequences(x, slice(start, start + most)) for x in call]
        plan = decode_plan(sizes._replace(batch_size=len(some[0])), configurations.overrides())
        for _, run, args in _launches(plan, blocks.window_size, scale, *some):
            run(*args)
    return out, indices


@dataclass(frozen=True)
class Stage:
    """Some launches of a step, on memory that is kept: again and again the same.

    Fields:
        launches: what is called with what, in order.
        results: the step's (out, block_indices), which are returned: they hold what has been computed so far.
    """

    launches: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...]
    results: tuple[Tensor, Tensor]

    def __call__(self) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(self.results[0]):
            for call, args in self.launches:
                call(*args)
        return self.results


@on_device
def decode_stages(
    q: Tensor,
    q_cmp: Tensor,
    cmp: Stream,
    slc: Stream,
    win: Stream,
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    scale: float,
    new: NewTokens | None,
) -> dict[str, Stage]:
    """A step's launches by stage, in their order, each having run once: see `TritonBackend.decode_stages`.

    Raises:
        ValueError: the sequences take turns, as scratch memory does not suffice for all of them.
    """
    num_kv_heads = slc[0].num_heads
    out = q.new_empty(*q.shape[:3], slc[1].head_dim)
    indices = q.new_empty(*q.shape[:2], num_kv_heads, blocks.topk, dtype=torch.int32)
    if not out.numel() or not slc[0].block_table.shape[1]:  # no launch
        return {}
    q, q_cmp, gates, counts = (x.contiguous() for x in (q, q_cmp, gates, counts))
    plan = decode_plan(_sizes(q, cmp[0], slc, win[0], blocks, new), configurations.overrides())
    most = max(1, SCRATCH_BYTES // (4 * plan.region * num_kv_heads))
    if len(q) > most:
        raise ValueError(f"q: expected at most {most} sequences, which scratch memory suffices for, got {len(q)}")
    call = q, q_cmp, cmp, slc, win, gates, counts, new, out, indices
    launches: dict[str, list[tuple[Callable[..., object], tuple[Any, ...]]]] = {}
    for name, run, args in _launches(plan, blocks.window_size, scale, *call):
        run(*args)
        launches.setdefault(name, []).append((run, args))
    return {name: Stage(tuple(found), (out, indices)) for name, found in launches.items()}


class _Kernels(NamedTuple):
    """A plan's kernels, in order of their launch."""

    compressed: Prepared
    choice: Prepared | None
    levels: tuple[Prepared, ...]
    selected: Prepared
    merge: Prepared | None


@lru_cache(maxsize=1024)
def _kernels(plan: DecodePlan) -> _Kernels:
    from nsa_kernels_triton.kernels.decode_choice import decode_choice_kernel
    from nsa_kernels_triton.kernels.decode_choosing import decode_levels_kernel
    from nsa_kernels_triton.kernels.decode_compressed import decode_compressed_kernel
    from nsa_kernels_triton.kernels.decode_merging import decode_merge_kernel
    from nsa_kernels_triton.kernels.decode_selected import decode_selected_kernel

    return _Kernels(
        Prepared(decode_compressed_kernel, *plan.compressed),
        Prepared(decode_choice_kernel, *plan.choice) if plan.choice else None,
        tuple(Prepared(decode_levels_kernel, *level) for level in plan.levels),
        Prepared(decode_selected_kernel, *plan.selected),
        Prepared(decode_merge_kernel, *plan.merge) if plan.merge else None,
    )


def _launches(
    plan: DecodePlan,
    window_size: int,
    scale: float,
    q: Tensor,
    q_cmp: Tensor,
    cmp: Stream,
    slc: Stream,
    win: Stream,
    gates: Tensor,
    counts: Tensor,
    new: NewTokens | None,
    out: Tensor,
    indices: Tensor,
) -> Iterator[Launch]:
    """A step's launches in order, to be run one by one: the next is made while the last is on its way.

    `cmp` holds all that chooses: its kernels share what they compute.
    """
    compressed, choice, levels, selected, merge = _kernels(plan)
    batch_size, lengths, scale = len(q), slc[0].lengths.contiguous(), scale * LOG2_E
    cmp_lengths = cmp[0].lengths.contiguous()
    scratch = q.new_empty(batch_size * slc[0].num_heads * plan.region, dtype=torch.float32)
    (cmp_table, v_cmp_table), (slc_table, v_slc_table), (win_table, v_win_table) = map(_tables, (cmp, slc, win))
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = ((k.pages, v.pages) for k, v in (cmp, slc, win))
    rows = _new_rows(new)
    ring, rotated, *spaces = _new_sizes(new, rows)
    cmp_pages, slc_pages, win_pages = cmp_table.shape[1], slc_table.shape[1], win_table.shape[1]
    args: tuple[Any, ...] = (
        *(q_cmp, scratch, indices, lengths, counts, cmp_lengths),
        *(k_cmp, v_cmp, cmp_table, v_cmp_table, k_slc, v_slc, slc_table, v_slc_table),
        *(k_win, v_win, win_table, v_win_table, *rows, batch_size, scale, plan.region, plan.width),
        *(cmp_pages, slc_pages, win_pages, ring, rotated, *spaces),
    )
    yield "cmp", compressed, args
    if choice is not None:
        args = (
            *(scratch, lengths, counts, v_cmp, cmp_table if v_cmp_table is None else v_cmp_table),
            *(slc_table, indices, batch_size, plan.region, plan.width, cmp_pages, slc_pages),
        )
        yield "cmp", choice, args
    for level in levels:
        yield "cmp", level, (scratch, plan.region)
    args = (
        *(q, scratch, lengths, counts, k_slc, v_slc, slc_table, v_slc_table),
        *(k_win, v_win, win_table, v_win_table, rows[4], rows[5], indices, gates, out),
        *(scale, window_size, plan.region, slc_pages, win_pages, spaces[4], spaces[5]),
    )
    yield "slc_win", selected, args
    if merge is not None:
        yield "combine", merge, (scratch, counts, gates, out, plan.region)
    if new is not None:
        for kv in cmp:
            if kv.lengths is not cmp_lengths:
                yield "cmp", kv.lengths.copy_, (cmp_lengths,)


def _sizes(
    q: Tensor, k_cmp: PagedKV, slc: Stream, k_win: PagedKV, blocks: BlockGeometry, new: NewTokens | None
) -> DecodeSizes:
    k_slc, v_slc = slc
    batch_size, tokens, num_heads, head_dim = q.shape
    cmp = None if new is None else new.cmp
    appended = "" if cmp is None else "pooled" if isinstance(cmp, PooledTokens) else "completed"
    return DecodeSizes(
        *(configurations.family(q.device), num_processors(q.device), batch_size, tokens, k_slc.num_heads),
        *(num_heads // k_slc.num_heads, head_dim, v_slc.head_dim, q.element_size()),
        *(blocks.kernel_size, blocks.kernel_stride, blocks.block_size, blocks.topk),
        *(blocks.init_blocks, blocks.local_blocks, k_cmp.page_size, k_slc.page_size, k_win.page_size),
        *(max(1, k_cmp.block_table.shape[1]), k_slc.block_table.shape[1]),
        *(appended, isinstance(cmp, PooledTokens) and cmp.interleaved),
    )


def _tables(stream: Stream) -> tuple[Tensor, Tensor | None]:
    """Page tables of one stream, contiguous and of one width; None for that of the values if it is the keys'."""
    k, v = stream
    if v.block_table is k.block_table and k.block_table.shape[1] and k.block_table.is_contiguous():
        return k.block_table, None
    width = max(1, k.block_table.shape[1], v.block_table.shape[1])
    table, v_table = (pad(x.block_table, (0, width - x.block_table.shape[1]), value=-1) for x in (k, v))
    return table.contiguous(), None if v.block_table is k.block_table else v_table.contiguous()


def _new_rows(new: NewTokens | None) -> list[Tensor | None]:
    """Rows of the new tokens, rings, weights and rotation, as the first kernel takes them."""
    if new is None:
        return [None] * 11
    rows = [_rows(x) for x in (new.cmp.k, new.cmp.v, new.k_slc, new.v_slc, new.k_win, new.v_win)]
    if isinstance(new.cmp, CompletedBlocks):
        return [*rows, *[None] * 5]
    weights = [None if x is None else x.contiguous() for x in (new.cmp.k_weights, new.cmp.v_weights)]
    rotation = None if new.cmp.rotation is None else new.cmp.rotation.contiguous()
    return [*rows, new.cmp.k_tail, new.cmp.v_tail, *weights, rotation]


def _rows(x: Tensor) -> Tensor:
    """`x` [B, N, H, D] if its tokens are evenly spaced and each token's heads side by side in memory, or a copy."""
    batch_size, tokens, heads, dim = x.shape
    even = 1 in (batch_size, tokens) or x.stride(0) == tokens * x.stride(1)
    whole = (dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == dim)
    return x if even and whole else x.contiguous()


def _new_sizes(new: NewTokens | None, rows: list[Tensor | None]) -> tuple[int, ...]:
    """Rows of a ring, rows of the rotation, and the distances between tokens of each of the six rows."""
    if new is None:
        return (0,) * 8
    spaces = [x.stride(1) if x.shape[1] > 1 else x.stride(0) for x in rows[:6] if x is not None]
    if isinstance(new.cmp, CompletedBlocks):
        return 0, 0, *spaces
    rotation = new.cmp.rotation
    return new.cmp.k_tail.shape[1], 0 if rotation is None else rotation.shape[1], *spaces


def _of_sequences(x: Any, part: slice) -> Any:
    """Some sequences of an argument: of a tensor, of pages, of what holds them."""
    if isinstance(x, Tensor):
        return x[part]
    if isinstance(x, tuple):
        k, v = x
        table = k.block_table[part]
        v_table = table if v.block_table is k.block_table else v.block_table[part]
        return PagedKV(k.pages, table, k.lengths[part]), PagedKV(v.pages, v_table, v.lengths[part])
    if isinstance(x, NewTokens):
        shared = ("k_weights", "v_weights", "rotation")
        cmp: Any = {name: y[part] for name, y in vars(x.cmp).items() if isinstance(y, Tensor) and name not in shared}
        rows = {name: y[part] for name, y in vars(x).items() if isinstance(y, Tensor)}
        return replace(x, **rows, cmp=replace(x.cmp, **cmp))
    return x
