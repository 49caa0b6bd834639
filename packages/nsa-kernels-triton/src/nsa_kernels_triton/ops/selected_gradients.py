"""Gradients of selected attention: the launches of `kernels.choosers` and `kernels.block_gradients`."""

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.by_query import dq_by_query
from nsa_kernels_triton.ops.gradients import row_statistics
from nsa_kernels_triton.ops.launching import num_processors, on_device
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.ops.spread import Spread, spread_of
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, evenly, pieces, power_of_two

CELL = 32  # queries whose choice of a block is the bits of one int32
PARTS = 5 << 28  # bytes for the parts of dq, about; those of a cell and a head may exceed it
SUMS = 1 << 30  # bytes for dk and dv in fp32; those of a head may exceed it
MARKS = 256 << 20  # bytes for the marks of a chunk; those of a cell may exceed it


@torch.library.custom_op("nsa_kernels_triton::selected_attention_backward", mutates_args=())
@on_device
def selected_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `selected_attention`. Bitwise repeatable; keys that nobody chose get zeros."""
    call = SelectedCall(q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, scale)
    dq, dk, dv = _gradients(q, k, v)
    if not q.numel() or not k.numel() or call.num_slots == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    delta, lse_2 = row_statistics(out, grad_out, lse)
    spread = Spread() if deterministic else spread_of(call.indices, block_size)
    config = launch("selected_attention_backward", q.device, spread=spread.percent, **call.case)
    if not config["parts"]:
        case = launch("selected_attention_dq", q.device, spread=spread.percent, **call.case)
        dq_by_query(call, case, grad_out, lse_2, delta, dq)
    _by_block(call, config, (grad_out, lse_2, delta), (dq, dk, dv))
    return dq, dk, dv


@selected_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k, v)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), not yet written."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _by_block(
    call: SelectedCall, config: Launch, rows: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    """All of it in chunks of queries, some kv heads at a time."""
    dq, dk, dv = gradients
    keys = min(config["keys"], call.block_size)
    subs = call.block_size // keys
    cells = count_tiles(call.total_q, call.batch_size, CELL)
    num_blocks = count_tiles(call.total_k, call.batch_size, call.block_size)
    cell_parts = CELL * call.group_size * call.num_slots * subs * call.head_dim * call.q.element_size()
    cell_parts *= config["parts"]
    chunk = evenly(
        cells,
        min(
            config["chunk_rows"] // (CELL * call.group_size) + 1,  # 2^n queries may be one cell more than 2^n / CELL
            PARTS // max(1, cell_parts),
            MARKS // (8 * num_blocks),
        ),
    )
    sums = 4 * call.total_k * (call.head_dim + call.v_head_dim) if chunk < cells else 1
    heads = min(PARTS // max(1, chunk * cell_parts), SUMS // sums, MARKS // (8 * chunk * num_blocks))
    heads = evenly(call.num_kv_heads, heads)
    turn = _Turn(call, config, keys, chunk, num_blocks, heads, once=chunk == cells)
    if turn.once:  # then no block that nobody chose is written
        dk.zero_()
        dv.zero_()
    for first in range(0, call.num_kv_heads, heads):
        many = min(heads, call.num_kv_heads - first)
        own = slice(first, first + many)
        if turn.once:
            turn.run(first, many, 0, cells, rows, dq, dk[:, own], dv[:, own])
            continue
        sums_k, sums_v = turn.sums_k[: many * call.total_k], turn.sums_v[: many * call.total_k]
        sums_k, sums_v = (x.zero_().view(call.total_k, many, -1) for x in (sums_k, sums_v))
        for cell in range(0, cells, chunk):
            turn.run(first, many, cell, min(cell + chunk, cells), rows, dq, sums_k, sums_v)
        torch.mul(sums_k, call.scale / LOG2_E, out=dk[:, own])
        dv[:, own].copy_(sums_v)


class _Turn:
    """The lists, parts and sums of one chunk of queries and some kv heads, and its launches."""

    def __init__(
        self,
        call: SelectedCall,
        config: Launch,
        keys: int,
        chunk: int,
        num_blocks: int,
        heads: int,
        *,
        once: bool,
    ) -> None:
        self.call, self.config, self.keys, self.num_blocks, self.once = call, config, keys, num_blocks, once
        self.subs = call.block_size // keys
        self.rows = max(config["rows"], power_of_two(call.group_size))
        self.queries = self.rows // call.group_size  # of a tile
        self.piece = config["turns"] * self.queries
        rows = min(chunk * CELL, call.total_q)
        listed = rows * call.num_slots
        chosen = min(num_blocks, listed)  # most different blocks
        self.tiles = listed // self.queries + chosen

        def ints(*shape: int) -> Tensor:
            return call.indices.new_empty(shape)

        def floats(*shape: int) -> Tensor:
            return call.q.new_empty(shape, dtype=torch.float32)

        self.marks = ints(heads * chunk * num_blocks * 2)
        self.counts, self.starts, self.slots = (ints(heads, num_blocks) for _ in range(3))
        self.chosen = ints(rows, call.num_kv_heads)
        self.places = ints(rows, call.num_kv_heads, call.num_slots)
        self.items = ints(heads, listed // self.piece + chosen, 4)
        self.num_items, self.taken = ints(heads), ints(1)
        self.listed = ints(heads, self.tiles * self.queries)
        self.most_slots = 2 * listed // self.piece
        self.slots_dk = floats(heads * self.most_slots * call.block_size * call.head_dim)
        self.slots_dv = floats(heads * self.most_slots * call.block_size * call.v_head_dim)
        self.parts = None
        if config["parts"]:
            self.parts = call.q.new_empty(heads * self.subs * self.tiles * self.rows, call.head_dim)
        if not once:
            self.sums_k = floats(heads * call.total_k, call.head_dim)
            self.sums_v = floats(heads * call.total_k, call.v_head_dim)

    def run(
        self,
        first_head: int,
        heads: int,
        first: int,
        end: int,
        rows: tuple[Tensor, Tensor, Tensor],
        dq: Tensor,
        sums_k: Tensor,
        sums_v: Tensor,
    ) -> None:
        """Cells `first` to `end` of `heads` kv heads."""
        from nsa_kernels_triton.kernels.block_gradients import block_gradients_kernel, fold_kernel, sum_parts_kernel
        from nsa_kernels_triton.kernels.choosers import items_kernel, list_kernel, mark_kernel, rank_kernel

        call, config, num_blocks, cells = self.call, self.config, self.num_blocks, end - first
        members = slice(first_head * call.group_size, (first_head + heads) * call.group_size)
        own = slice(first_head, first_head + heads)
        marking, ranking, itemizing, folding, adding = (
            launch(name, call.q.device) for name in ("marking", "ranking", "itemizing", "folding", "adding")
        )
        chosen = call.indices[:, own], call.cu_seqlens_q, call.cu_seqlens_k
        sizes = call.batch_size, call.num_kv_heads, call.num_slots, num_blocks
        entries = {"BLOCK_SIZE": call.block_size, "CELL": CELL, "SLOTS": power_of_two(call.num_slots)}
        marks = self.marks[: heads * cells * num_blocks * 2].zero_()
        mark_kernel[heads, cells](
            *(*chosen, marks, self.chosen, *sizes, first),
            **entries,
            **marking.options,
        )
        rank_kernel[-(-num_blocks // ranking["width"]), heads](
            *(marks, self.counts, num_blocks, cells),
            WIDTH=ranking["width"],
            DEPTH=ranking["depth"],
            **ranking.options,
        )
        most_items, most_listed = self.items.shape[1], self.listed.shape[1]
        items_kernel[(heads,)](
            *(self.counts, self.starts, self.slots, self.items, self.num_items, num_blocks, most_items),
            QUERIES=self.queries,
            PIECE=self.piece,
            WIDTH=itemizing["width"],
            **itemizing.options,
        )
        list_kernel[heads, cells](
            *(*chosen, marks, self.starts, self.listed, self.places, *sizes, most_listed, first),
            **entries,
            **marking.options,
        )
        grad_out, lse_2, delta = (x[:, members] for x in rows)
        q, k, v = call.q[:, members], call.k[:, own], call.v[:, own]
        dims = dict(zip(("K0", "K1"), pieces(call.head_dim), strict=True)) | {"DIM": call.head_dim}
        both = dict(zip(("V0", "V1"), pieces(call.v_head_dim), strict=True)) | {"V_DIM": call.v_head_dim} | dims
        programs = min(most_items * heads * self.subs, num_processors(call.q.device) * config["programs"])
        block_gradients_kernel[(programs,)](
            *(q, k, v, grad_out, lse_2, delta, self.items, self.num_items, self.taken.zero_(), self.listed),
            *(call.cu_seqlens_q, call.cu_seqlens_k, sums_k, sums_v, self.slots_dk, self.slots_dv),
            *(self.parts, call.batch_size, most_items, most_listed, self.most_slots, first, heads),
            call.scale,
            *(x.stride(i) for x in (q, k, v, grad_out) for i in (0, 1)),
            NUM_KV_HEADS=call.num_kv_heads,
            GROUP_SIZE=call.group_size,
            BLOCK_SIZE=call.block_size,
            CELL=CELL,
            KEYS=self.keys,
            ROWS=self.rows,
            WIDE=self.chosen.shape[0] * max(q.stride(0), grad_out.stride(0)) >= 2**31,
            ONCE=self.once,
            STAGES=config.num_stages,
            **both,
            **config.options,
        )
        fold_keys = min(folding["keys"], call.block_size)
        fold_kernel[num_blocks, heads, call.block_size // fold_keys](
            *(self.counts, self.slots, self.slots_dk, self.slots_dv, call.cu_seqlens_k, sums_k, sums_v),
            *(call.batch_size, num_blocks, self.most_slots, call.scale),
            PIECE=self.piece,
            NUM_KV_HEADS=call.num_kv_heads,
            ONCE=self.once,
            BLOCK_SIZE=call.block_size,
            KEYS=fold_keys,
            **both,
            **folding.options,
        )
        if self.parts is None:
            return
        sum_parts_kernel[-(-self.chosen.shape[0] * call.group_size // adding["rows"]), heads](
            *(self.parts, self.places, self.chosen, call.cu_seqlens_q, dq[:, members]),
            *(call.batch_size, call.num_kv_heads, call.num_slots, first, end, self.tiles, call.scale / LOG2_E),
            GROUP_SIZE=call.group_size,
            SUBS=self.subs,
            CELL=CELL,
            TILE_QUERIES=self.queries,
            TILE_ROWS=self.rows,
            ROWS=adding["rows"],
            STAGES=adding.num_stages,
            **dims,
            **adding.options,
        )
