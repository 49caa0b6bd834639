"""Gradients of selected attention: dk and dv block by block, dq as their parts or query by query.

The launches of `kernels.block_gradients`. What lists of blocks and queries it works from is in `ops.choosers`.
"""

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.by_query import dq_by_query
from nsa_kernels_triton.ops.choosers import CELL, MARKS, MOST_CELLS, Choosers, count_blocks
from nsa_kernels_triton.ops.gradients import row_statistics, unwritten
from nsa_kernels_triton.ops.launching import num_processors, on_device, rows
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.ops.spread import Spread, spread_of
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, evenly, pieces, power_of_two

PARTS = 5 << 28  # bytes for the parts of dq, about; those of a cell and a head may exceed it
SUMS = 1 << 30  # bytes for sums in fp32, about; those of a head, and what several items share in a cell, may exceed it


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
    dq, dk, dv = unwritten(q, k, v)
    if not q.numel() or not k.numel() or call.num_slots == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_out = rows(grad_out)
    delta, lse_2 = row_statistics(out, grad_out, lse)
    spread = Spread() if deterministic else spread_of(call.indices, block_size)
    config = launch("selected_attention_backward", q.device, spread=spread.percent, **call.case)
    if not config["parts"]:
        dq_config = launch("selected_attention_dq", q.device, spread=spread.percent, **call.case)
        dq_by_query(call, dq_config, grad_out, lse_2, delta, dq)
    _BlockGradients(call, config, (grad_out, lse_2, delta), (dq, dk, dv)).run()
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
    return unwritten(q, k, v)


class _BlockGradients:
    """A call's gradients block by block: in chunks of queries, for some kv heads at a time."""

    def __init__(
        self,
        call: SelectedCall,
        config: Launch,
        rows: tuple[Tensor, Tensor, Tensor],
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self.call, self.config, self.rows, self.gradients = call, config, rows, gradients
        self.keys = min(config["keys"], call.block_size)
        self.subs = call.block_size // self.keys
        self.tile_rows = max(config["rows"], power_of_two(call.group_size))
        queries = self.tile_rows // call.group_size
        piece = config["turns"] * queries
        row_sums = 4 * (call.head_dim + call.v_head_dim)

        # Bytes for a cell of one head.
        parts = config["parts"] * CELL * call.group_size * call.num_slots * self.subs * call.head_dim
        parts *= call.q.element_size()
        marks = 8 * count_blocks(call)
        slots = 2 * CELL * call.num_slots * call.block_size * row_sums // piece
        self.cells = count_tiles(call.total_q, call.batch_size, CELL)
        wanted = config["chunk_rows"] // (CELL * call.group_size) + 1  # 2^n queries may take one cell more
        fitting = PARTS // max(1, parts), MARKS // marks, SUMS // max(1, slots)
        self.chunk = chunk = evenly(self.cells, min(wanted, MOST_CELLS, *fitting))
        self.once = chunk == self.cells
        sums = chunk * slots + (0 if self.once else row_sums * call.total_k)
        fitting = PARTS // max(1, chunk * parts), MARKS // (chunk * marks), SUMS // max(1, sums)
        self.heads = evenly(call.num_kv_heads, min(fitting))

        def floats(*shape: int) -> Tensor:
            return call.q.new_empty(shape, dtype=torch.float32)

        self.choosers = Choosers(call, chunk, self.heads, queries, piece)
        shared = self.heads * self.choosers.most_slots * call.block_size
        self.slots = floats(shared, call.head_dim), floats(shared, call.v_head_dim)
        self.parts = None
        if config["parts"]:
            part_rows = self.heads * self.subs * self.choosers.tiles * self.tile_rows
            self.parts = call.q.new_empty(part_rows, call.head_dim)

    def run(self) -> None:
        """Write dk and dv, and dq if it is summed from parts."""
        call, (_, dk, dv) = self.call, self.gradients
        if self.once:  # blocks that nobody chose are not written
            dk.zero_()
            dv.zero_()
        for first in range(0, call.num_kv_heads, self.heads):
            own = slice(first, min(first + self.heads, call.num_kv_heads))
            if self.once:
                self._chunk(own, 0, self.cells, dk[:, own], dv[:, own])
                continue
            sums_k, sums_v = (torch.zeros_like(x[:, own], dtype=torch.float32).contiguous() for x in (dk, dv))
            for cell in range(0, self.cells, self.chunk):
                self._chunk(own, cell, min(cell + self.chunk, self.cells), sums_k, sums_v)
            torch.mul(sums_k, call.scale / LOG2_E, out=dk[:, own])
            dv[:, own].copy_(sums_v)

    def _chunk(self, own: slice, first: int, end: int, sums_k: Tensor, sums_v: Tensor) -> None:
        """Cells `first` to `end` of the kv heads `own`: what they add to dk and dv goes to the sums."""
        from nsa_kernels_triton.kernels.block_gradients import block_gradients_kernel, fold_kernel

        call, config, found = self.call, self.config, self.choosers
        heads, members = own.stop - own.start, _members(own, call.group_size)
        found.find(own, first, end)
        q, k, v = call.q[:, members], call.k[:, own], call.v[:, own]
        grad_out, lse_2, delta = (x[:, members] for x in self.rows)
        items, listed = found.items.shape[1], found.listed.shape[1]
        dims = {
            **dict(zip(("K0", "K1"), pieces(call.head_dim), strict=True)),
            **dict(zip(("V0", "V1"), pieces(call.v_head_dim), strict=True)),
            **{"DIM": call.head_dim, "V_DIM": call.v_head_dim},
            **{"NUM_KV_HEADS": call.num_kv_heads, "BLOCK_SIZE": call.block_size, "ONCE": self.once},
        }
        programs = min(items * heads * self.subs, num_processors(call.q.device) * config["programs"])
        block_gradients_kernel[(programs,)](
            *(q, k, v, grad_out, lse_2, delta, found.items, found.num_items, found.taken, found.listed),
            *(call.cu_seqlens_q, call.cu_seqlens_k, sums_k, sums_v, *self.slots, self.parts),
            *(call.batch_size, items, listed, found.most_slots, first, heads, call.scale),
            *(x.stride(i) for x in (q, k, v, grad_out) for i in (0, 1)),
            GROUP_SIZE=call.group_size,
            CELL=CELL,
            KEYS=self.keys,
            ROWS=self.tile_rows,
            WIDE=any(
                found.chosen.shape[0] * x.stride(0) + call.group_size * x.stride(1) >= 2**31 for x in (q, grad_out)
            ),
            STAGES=config.num_stages,
            **dims,
            **config.options,
        )
        folding = launch("folding", call.q.device)
        fold_keys = min(folding["keys"], call.block_size)
        fold_kernel[found.num_blocks, heads, call.block_size // fold_keys](
            *(found.counts, found.slots, *self.slots, call.cu_seqlens_k, sums_k, sums_v),
            *(call.batch_size, found.num_blocks, found.most_slots, call.scale),
            PIECE=found.piece,
            KEYS=fold_keys,
            **dims,
            **folding.options,
        )
        if self.parts is not None:
            self._sum_parts(self.parts, members, heads, first, end)

    def _sum_parts(self, parts: Tensor, members: slice, heads: int, first: int, end: int) -> None:
        from nsa_kernels_triton.kernels.block_gradients import sum_parts_kernel

        call, found, adding = self.call, self.choosers, launch("adding", self.call.q.device)
        sum_parts_kernel[-(-found.chosen.shape[0] * call.group_size // adding["rows"]), heads](
            *(parts, found.places, found.chosen, call.cu_seqlens_q, self.gradients[0][:, members]),
            *(call.batch_size, call.num_kv_heads, call.num_slots, first, end, found.tiles, call.scale / LOG2_E),
            GROUP_SIZE=call.group_size,
            SUBS=self.subs,
            CELL=CELL,
            TILE_QUERIES=found.queries,
            TILE_ROWS=self.tile_rows,
            ROWS=adding["rows"],
            DIM=call.head_dim,
            **dict(zip(("K0", "K1"), pieces(call.head_dim), strict=True)),
            STAGES=adding.num_stages,
            **adding.options,
        )


def _members(own: slice, group_size: int) -> slice:
    """The query heads of some kv heads."""
    return slice(own.start * group_size, own.stop * group_size)
