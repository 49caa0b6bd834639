"""Decode steps to test a backend's `decode_attention` with: pages of any shape, new tokens, and what must come of them.

`case.check(backend)` is the whole question: the oracle's result in fp64, and everything stored as sdpa stores it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_varlen import masks, reference
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.paged import PagedKV
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import FP32, assert_within_budget, plain_attention, poisoned_empty, selection_margin, to_pages
from nsa_varlen.unfold import unfold_blocks

STREAMS = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


@dataclass(frozen=True, eq=False)
class DecodeCase:
    """Arguments of one decode step, by name."""

    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def changed(self, **changes: Any) -> "DecodeCase":
        """The same step with other arguments."""
        return DecodeCase(self.arguments | changes)

    def copy(self) -> "DecodeCase":
        """The same step on memory of its own, laid out alike; tensors that are one stay one."""
        return self._converted(_cloned)

    def double(self) -> "DecodeCase":
        """The same values in fp64."""
        return self._converted(lambda x: x.double() if x.is_floating_point() else x.clone())

    def part(self, sequences: slice) -> "DecodeCase":
        """Some of the sequences, in the same pages."""

        def convert(name: str, x: Any) -> Any:
            if isinstance(x, PagedKV):
                return PagedKV(x.pages, x.block_table[sequences], x.lengths[sequences])
            if isinstance(x, NewTokens | PooledTokens | CompletedBlocks):
                return type(x)(**{field: convert(field, value) for field, value in vars(x).items()})
            shared = name in ("k_weights", "v_weights", "rotation") or not isinstance(x, Tensor)
            return x if shared else x[sequences]

        return DecodeCase({name: convert(name, x) for name, x in self.arguments.items()})

    def run(self, backend: Any) -> tuple[Tensor, Tensor]:
        """(out, block_indices)."""
        found: tuple[Tensor, Tensor] = backend.decode_attention(**self.arguments)
        return found

    def packed(self, name: str) -> Tensor:
        """The rows of a stream, or the queries, one sequence after the other."""
        x = self[name]
        if isinstance(x, PagedKV):
            layout = VarlenLayout.from_lengths(x.lengths.tolist(), device=x.device)
            return x.rows(layout.sequence_of_keys(), layout.key_positions())
        return x[torch.arange(x.shape[1], device=x.device) < self["counts"][:, None]]

    def layout(self) -> VarlenLayout:
        """The new tokens of each sequence as queries, all as keys."""
        return VarlenLayout.from_lengths(self["counts"].tolist(), self["k_slc"].lengths.tolist(), self["q"].device)

    def certified(self) -> Tensor:
        """Whose choice no rounding can change, bool [Tq, Hk]: see `selection_margin`. Everything is stored already."""
        queries, scale = (
            self.packed("q" if self.arguments.get("q_cmp") is None else "q_cmp"),
            self.arguments.get("scale"),
        )
        margin, error = selection_margin(queries, self.packed("k_cmp"), self.layout(), self["blocks"], scale=scale)
        return margin > 2 * error

    def plain(self, block_indices: Tensor) -> Tensor:
        """What plain torch makes of the same rows in their dtype: [B, N, Hq, Dv]."""
        layout, blocks, scale = self.layout(), self["blocks"], self.arguments.get("scale")
        there = torch.arange(self["q"].shape[1], device=self["q"].device) < self["counts"][:, None]
        seen = {
            "cmp": masks.compressed_mask(layout, blocks)[:, None],
            "slc": masks.selected_mask(block_indices[there], layout, blocks),
            "win": masks.window_mask(layout, blocks)[:, None],
        }
        q_cmp = "q" if self.arguments.get("q_cmp") is None else "q_cmp"
        queries = {name: self.packed(q_cmp if name == "cmp" else "q") for name in seen}
        found = [
            plain_attention(queries[name], self.packed(f"k_{name}"), self.packed(f"v_{name}"), mask, scale)
            for name, mask in seen.items()
        ]
        gates = self["gates"][there].to(found[0].dtype)
        out = self["q"].new_zeros(*self["q"].shape[:3], self["v_slc"].head_dim)
        out[there] = sum(gates[..., i, None] * x for i, x in enumerate(found))
        return out

    def check(self, backend: Any, *, ties: bool = False) -> tuple[Tensor, Tensor]:
        """Fail unless `backend` returns what the oracle does, and stores what sdpa does; (out, block_indices).

        The step runs on a copy. Every row's choice must be certified, or with `ties` have no scores but equal ones.
        """
        mine, other = self.copy(), self.copy()
        with poisoned_empty():
            out, indices = mine.run(backend)
        if self.arguments.get("new") is None:
            assert_untouched(mine, self)
        else:
            other.run(BACKEND)
            assert_stored_alike(mine, other)
        stored = mine.changed(new=None)
        if not ties and not bool(stored.certified().all()):
            raise AssertionError("seed: expected choices with certified margins, got near ties")
        exact, chosen = stored.double().run(reference)
        if (out.dtype, out.shape, indices.dtype) != (self["q"].dtype, exact.shape, torch.int32):
            raise AssertionError(f"expected {exact.shape} of q's dtype, got {out.dtype} {out.shape} {indices.dtype}")
        assert_equal("block_indices", indices, chosen)
        if out.dtype == torch.float32:
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=FP32)
        else:
            assert_within_budget(out, stored.plain(indices), exact, "out")
        return out, indices

    def _converted(self, convert: Any) -> "DecodeCase":
        made: dict[int, Any] = {}

        def once(x: Any) -> Any:
            if isinstance(x, PagedKV | NewTokens | PooledTokens | CompletedBlocks):
                if id(x) not in made:
                    made[id(x)] = type(x)(**{name: once(value) for name, value in vars(x).items()})
                return made[id(x)]
            if not isinstance(x, Tensor):
                return x
            if id(x) not in made:
                made[id(x)] = convert(x)
            return made[id(x)]

        return DecodeCase({name: once(x) for name, x in self.arguments.items()})


def decode_case(
    lengths: Sequence[int],
    counts: Sequence[int],
    blocks: BlockGeometry,
    *,
    rows: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    pages: tuple[int, int, int] = (32, 32, 32),
    apart: bool = False,
    room: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    new: str | None = None,
    rotated: str | None = None,
    scale: float | None = None,
    tries: int = 20,
    ties: bool = False,
) -> DecodeCase:
    """A step on unit normal rows, the first seed from `seed` whose choices are certified.

    Compressed rows are unit normal, too, unless new ones are made by the step.

    What nobody needs is NaN: rows of pages that no token fills, padding, pages that tables name beyond the lengths.
    Pages of the window that no query sees are gone from its tables.

    Args:
        lengths, counts: of each sequence all tokens, and the new ones.
        rows: N; None is the most of counts.
        pages: rows of a page of cmp, slc and win.
        apart: values lie in other pages than their keys, by wider tables.
        room: tokens that tables have room for; None is the longest sequence.
        new: "mean", "weights" or "blocks": the new tokens are still to be stored, and how compressed blocks are made.
        rotated: "halves" or "interleaved": how new compressed keys are rotated.
        tries: seeds to try.
        ties: q is 0, so that scores tie and no margin is looked for.

    Raises:
        ValueError: no seed has the margin.
    """
    for number in range(seed, seed + tries):
        generator = torch.Generator("cpu").manual_seed(number)
        case = _made(
            list(lengths),
            list(counts),
            blocks,
            generator,
            rows=max(counts, default=1) if rows is None else rows,
            heads=heads,
            kv_heads=kv_heads,
            dims=(head_dim, head_dim if v_head_dim is None else v_head_dim),
            page_sizes=pages,
            apart=apart,
            room=max([1, *lengths]) if room is None else room,
            dtype=dtype,
            new=new,
            rotated=rotated,
            scale=scale,
            ties=ties,
        )
        if ties or bool(case["stored"].certified().all()):
            arguments = {name: x for name, x in case.arguments.items() if name != "stored"}
            return DecodeCase(arguments)._converted(lambda x: x.to(device))
    raise ValueError(f"tries: expected a seed with a certified margin among {tries}, got none")


def _made(
    lengths: list[int],
    counts: list[int],
    blocks: BlockGeometry,
    generator: torch.Generator,
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    page_sizes: tuple[int, int, int],
    apart: bool,
    room: int,
    dtype: torch.dtype,
    new: str | None,
    rotated: str | None,
    scale: float | None,
    ties: bool,
) -> DecodeCase:
    layout, batch = VarlenLayout.from_lengths(lengths), len(lengths)
    before = [length - count for length, count in zip(lengths, counts, strict=True)]
    first, last = ([blocks.num_compressed(n) for n in x] for x in (before, lengths))
    ends = {name: last if "cmp" in name else lengths for name in STREAMS}
    sizes = dict(zip(("cmp", "slc", "win"), page_sizes, strict=True))
    most = {"cmp": max(1, blocks.num_compressed(room)), "slc": room, "win": room}

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    raw = {name: rand(sum(lengths), kv_heads, dims[name[0] == "v"]) for name in STREAMS}
    weights: dict[str, Tensor | None] = {"k": None, "v": None}
    if new == "weights":  # sums of unit scale
        weights = {side: rand(kv_heads, blocks.kernel_size) * blocks.kernel_size**-0.5 for side in "kv"}
    blocks_room = -(-most["cmp"] // sizes["cmp"]) * sizes["cmp"]
    rotation = None
    if rotated is not None:
        angle = torch.randn(blocks_room + 2, dims[0] // 2, generator=generator) * 3
        rotation = torch.stack((angle.cos(), angle.sin()))
    found = {name: raw[name] for name in STREAMS if "cmp" not in name}
    for side in "kv":
        if new in (None, "blocks"):  # anything will do: means would be small beside the other branches
            found[f"{side}_cmp"] = rand(sum(last), kv_heads, dims[side == "v"])
            continue
        unfolded, weight = unfold_blocks(raw[f"{side}_cmp"].double(), layout, blocks), weights[side]
        x = unfolded.mean(1) if weight is None else torch.einsum("hl,nlhd->nhd", weight.double(), unfolded)
        found[f"{side}_cmp"] = x.to(dtype)
    if rotation is not None:
        number = torch.cat([torch.arange(n) for n in [*last, 0]])
        turned = _turned(found["k_cmp"].double(), rotation.double()[:, number], rotated == "interleaved")
        found["k_cmp"] = turned.to(dtype)

    streams: dict[str, PagedKV] = {}
    for i, name in enumerate(STREAMS):
        branch = name[2:]
        kv = to_pages(found[name], ends[name], sizes[branch], seed=i if apart else i // 2)
        wide = -(-most[branch] // sizes[branch]) + (apart and name[0] == "v")
        # Entries beyond a sequence's pages: none, or one that was reserved and holds anything.
        table = torch.full((batch, max(wide, kv.block_table.shape[1])), -1, dtype=torch.int32)
        table[:, : kv.block_table.shape[1]] = kv.block_table
        used = set(kv.block_table.flatten().tolist())
        spare = next(page for page in range(len(kv.pages)) if page not in used)
        for sequence in range(1, batch, 2):
            table[sequence, -(-ends[name][sequence] // sizes[branch]) :] = spare
        if branch == "win":
            for sequence, start in enumerate(before):
                table[sequence, : max(0, start + 1 - blocks.window_size) // sizes["win"]] = -1
        streams[name] = PagedKV(kv.pages, table, kv.lengths)
    if not apart:
        for name in ("cmp", "slc", "win"):
            k = streams[f"k_{name}"]
            streams[f"v_{name}"] = PagedKV(streams[f"v_{name}"].pages, k.block_table, k.lengths)
    there = torch.arange(rows) < torch.tensor(counts, dtype=torch.int32)[:, None]

    def padded(x: Tensor) -> Tensor:
        return torch.where(there[:, :, None, None], x, torch.nan)

    q, q_cmp = rand(batch, rows, heads, dims[0]), rand(batch, rows, heads, dims[0])
    if ties:
        q, q_cmp = torch.zeros_like(q), torch.zeros_like(q_cmp)
    arguments: dict[str, Any] = {"q": padded(q), **streams}
    arguments["gates"] = padded(rand(batch, rows, heads, 3).sigmoid())
    arguments["counts"] = torch.tensor(counts, dtype=torch.int32)
    arguments |= {"blocks": blocks, "q_cmp": padded(q_cmp), "scale": scale}
    stored = DecodeCase(dict(arguments))
    if new is None:
        return DecodeCase(arguments | {"stored": stored})

    lengths_of: dict[int, Tensor] = {}
    for name, kv in streams.items():
        starts, given = first if "cmp" in name else before, kv.pages.clone()
        for sequence, (start, end) in enumerate(zip(starts, ends[name], strict=True)):
            for row in range(start, end):
                given[kv.block_table[sequence, row // kv.page_size], row % kv.page_size] = torch.nan
        old = torch.full_like(kv.lengths, -7) if "cmp" in name else kv.lengths
        arguments[name] = PagedKV(given, kv.block_table, lengths_of.setdefault(id(kv.lengths), old))

    def newest(x: Tensor) -> Tensor:
        made = torch.full((batch, rows, *x.shape[1:]), torch.nan, dtype=dtype)
        for into, sequence, count in zip(made, x.split(lengths), counts, strict=True):
            into[:count] = sequence[len(sequence) - count :]
        return made

    cmp: PooledTokens | CompletedBlocks
    if new == "blocks":
        few = (rows - 1) // blocks.kernel_stride + 1
        made = {
            side: torch.full((batch, few, kv_heads, dim), torch.nan, dtype=dtype)
            for side, dim in zip("kv", dims, strict=True)
        }
        for side, into in made.items():
            for sequence, x in enumerate(found[f"{side}_cmp"].split(last)):
                into[sequence, : last[sequence] - first[sequence]] = x[first[sequence] :]
        cmp = CompletedBlocks(made["k"], made["v"])
    else:
        size = blocks.kernel_size - 1 + rows + 3
        tails = []
        for name in ("k_cmp", "v_cmp"):
            tail = torch.full((batch, size, *raw[name].shape[1:]), torch.nan, dtype=dtype)
            for into, sequence, end in zip(tail, raw[name].split(lengths), before, strict=True):
                for position in range(max(0, end - size), end):
                    into[position % size] = sequence[position]
            tails.append(tail)
        k_new, v_new = newest(raw["k_cmp"]), newest(raw["v_cmp"])
        rest = weights["k"], weights["v"], rotation, rotated == "interleaved"
        cmp = PooledTokens(k_new, v_new, tails[0], tails[1], *rest)
    k_slc, v_slc, k_win, v_win = (newest(raw[name]) for name in STREAMS[2:])
    arguments["new"] = NewTokens(k_slc, v_slc, k_win, v_win, cmp)
    return DecodeCase(arguments | {"stored": stored})


def assert_equal(name: str, got: Tensor, expected: Tensor) -> None:
    """Fail unless both are the same to the last bit; NaN equals NaN."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


def assert_untouched(mine: DecodeCase, other: DecodeCase) -> None:
    """Fail unless the pages, tables and lengths of both are the same."""
    for name in STREAMS:
        for field in ("pages", "block_table", "lengths"):
            assert_equal(f"{name}.{field}", getattr(mine[name], field), getattr(other[name], field))


def assert_stored_alike(mine: DecodeCase, other: DecodeCase) -> None:
    """Fail unless pages, lengths and rings of both are the same: to the last bit, but for sums that are rounded.

    A compressed row is a sum in fp32 that is rounded once, a rotated one twice: each rounding may fall on either side
    of the next number, and the sum's own error is that of l = kernel_size terms of unit scale.
    """
    for name in STREAMS:
        assert_equal(f"{name}.lengths", mine[name].lengths, other[name].lengths)
        got, expected = mine[name].pages, other[name].pages
        if "cmp" in name and isinstance(mine["new"].cmp, PooledTokens):
            eps, terms = torch.finfo(got.dtype).eps, mine["blocks"].kernel_size
            torch.testing.assert_close(
                *(got.double(), expected.double()),
                rtol=2 * eps,
                atol=2 * eps + 4 * terms * 2.0**-24,
                equal_nan=True,
                msg=f"{name}: {{}}".format,
            )
        else:
            assert_equal(f"{name}.pages", got, expected)
    if isinstance(mine["new"].cmp, PooledTokens):
        for name in ("k_tail", "v_tail"):
            assert_equal(name, getattr(mine["new"].cmp, name), getattr(other["new"].cmp, name))


def _cloned(x: Tensor) -> Tensor:
    """A copy with the strides of `x`: `clone` gives views others."""
    memory = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, x.storage_offset(), x.shape, x.stride())


def _turned(k: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """k [T, H, D] by rotation [2, T, D/2]."""
    half = k.shape[-1] // 2
    i = torch.arange(half) * 2 if interleaved else torch.arange(half)
    j = i + 1 if interleaved else i + half
    cos, sin = rotation[:, :, None]
    out = torch.empty_like(k)
    out[..., i], out[..., j] = cos * k[..., i] - sin * k[..., j], sin * k[..., i] + cos * k[..., j]
    return out


def strided(case: DecodeCase) -> DecodeCase:
    """The same step, whose queries, gates and new rows are views of wider tensors, as a projection leaves them."""

    def view(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 8), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, :, ::2, 3 : 3 + x.shape[3]] = x
        return wide[:, :, ::2, 3 : 3 + x.shape[3]]

    changes: dict[str, Any] = {name: view(case[name]) for name in ("q", "q_cmp", "gates")}
    new = case.arguments.get("new")
    if new is not None:
        cmp = replace(new.cmp, k=view(new.cmp.k), v=view(new.cmp.v))
        changes["new"] = NewTokens(view(new.k_slc), view(new.v_slc), view(new.k_win), view(new.v_win), cmp)
    return case.changed(**changes)
