"""Sequences to decode from, and the check of a step against the oracle: what `triton_decode.py` times."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from cases import BLOCKS, DIM, DTYPE, SHAPES
from nsa_varlen import PagedKV, reference
from nsa_varlen.benchmarks.checking import check_rows
from nsa_varlen.new_tokens import NewTokens, PooledTokens
from torch import Tensor

PAGE = 64
RING = BLOCKS.kernel_size - 1 + 8

Step = Callable[..., tuple[Tensor, Tensor]]


class Sequences:
    """Caches of sequences, and their newest tokens: everything random, unit normal, gates in (0, 1).

    Fields:
        lengths: tokens of each sequence, the new one included; tables are as wide as the longest needs.
        k_pages, v_pages: the pool [P, PAGE, Hk, DIM].
        tables: int32 [B, pages] by stream. Pages of the window that no query reaches any more are -1.
        k_tail, v_tail: rings of raw cmp tokens [B, RING, Hk, DIM].
        q [B, 1, Hq, DIM], gates [B, 1, Hq, 3], and the new `rows` [6, B, 1, Hk, DIM]: k and v of slc, win, cmp.
    """

    def __init__(self, shape: str, lengths: Sequence[int], *, device: str = "cuda", seed: int = 0) -> None:
        heads, kv_heads = SHAPES[shape]
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device, dtype=DTYPE)
        self.lengths, batch = list(lengths), len(lengths)
        spans: dict[str, list[tuple[int, int]]] = {
            "cmp": [(0, BLOCKS.num_compressed(n)) for n in lengths],
            "slc": [(0, n) for n in lengths],
            "win": [(max(0, n - 1 - BLOCKS.window_size), n) for n in lengths],
        }
        taken = {name: [(first // PAGE, -(-end // PAGE)) for first, end in rows] for name, rows in spans.items()}
        total = sum(end - first for pages in taken.values() for first, end in pages)
        free = torch.randperm(total, generator=generator, device=device).int()
        self.tables = {}
        for name, pages in taken.items():
            self.tables[name] = free.new_full((batch, max(1, *(end for _, end in pages))), -1)
            for sequence, (first, end) in enumerate(pages):
                self.tables[name][sequence, first:end], free = free[: end - first], free[end - first :]
        self.k_pages, self.v_pages = (normal(total, PAGE, kv_heads, DIM) for _ in "kv")
        self.k_tail, self.v_tail = (normal(batch, RING, kv_heads, DIM) for _ in "kv")
        self.q, self.gates = normal(batch, 1, heads, DIM), normal(batch, 1, heads, 3).sigmoid()
        self.rows = normal(6, batch, 1, kv_heads, DIM)

    def arguments(self, back: int) -> tuple[tuple[Any, ...], dict[str, NewTokens]]:
        """(args, kwargs) of a step with that many tokens less. The lengths of cmp are the step's to write."""
        device = self.q.device
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device) - back
        compressed = BLOCKS.num_compressed(lengths - 1).int()
        pages = [
            PagedKV(pool, self.tables[name], compressed if name == "cmp" else lengths)
            for name in ("cmp", "slc", "win")
            for pool in (self.k_pages, self.v_pages)
        ]
        *stored, k, v = self.rows
        new = NewTokens(*stored, PooledTokens(k, v, self.k_tail, self.v_tail))
        return (self.q, *pages, self.gates, torch.ones_like(lengths), BLOCKS), {"new": new}

    def widened(self, sequences: Sequence[int], device: str = "cpu") -> "Sequences":
        """A copy of some of the sequences in fp64, with their pages alone, in the order of their numbers."""
        chosen = torch.tensor(sequences, device=self.q.device)
        found = copy(self)
        found.lengths = [self.lengths[b] for b in sequences]
        used = torch.cat([table[chosen].flatten() for table in self.tables.values()]).unique().long()
        used = used[used >= 0]
        number = used.new_full((len(self.k_pages) + 1,), -1).int()  # the last one is what -1 finds
        number[used] = torch.arange(len(used), device=used.device).int()
        found.tables = {name: number[table[chosen].long()].to(device) for name, table in self.tables.items()}
        for name in ("k_pages", "v_pages"):
            setattr(found, name, getattr(self, name)[used].to(device).double())
        for name in ("k_tail", "v_tail", "q", "gates"):
            setattr(found, name, getattr(self, name)[chosen].to(device).double())
        found.rows = self.rows[:, chosen].to(device).double()
        return found


def check(run: Step, made: Sequences, back: int, sequences: Sequence[int], device: str = "cpu") -> None:
    """A step of `made` by `run`: raise unless it does to these sequences what the oracle does in fp64 on `device`.

    Block indices are the oracle's wherever the score margin is certified; else the scores of the chosen ones sum up to
    no less than those of the oracle's, within their error. The result is within the dtype's budget, given these blocks.
    """
    exact = made.widened(sequences, device)
    args, kwargs = made.arguments(back)
    out, indices = (x[list(sequences)].to(device) for x in run(*args, **kwargs))
    wide, wide_kwargs = exact.arguments(back)
    reference.decode_attention(*wide, **wide_kwargs)
    if args[1].lengths[list(sequences)].tolist() != wide[1].lengths.tolist():
        raise AssertionError(f"k_cmp.lengths: expected {wide[1].lengths.tolist()}, got {args[1].lengths.tolist()}")
    assert_stored(made.widened(sequences, device), exact, back)
    for i, length in enumerate(exact.lengths):
        about = f"sequence {sequences[i]} of {length - back} tokens"
        compressed = BLOCKS.num_compressed(length - back)
        kv = [x.span(i, 0, rows) for x, rows in zip(wide[1:7], [compressed] * 2 + [length - back] * 4, strict=True)]
        check_rows(out[i], indices[i], exact.q[i], kv, exact.gates[i], BLOCKS, about)


def assert_stored(found: Sequences, exact: Sequences, back: int) -> None:
    """Pages and rings are those of the oracle, bit by bit; a new compressed block is a sum in fp32, rounded once."""
    (_, k_cmp, *_), _ = exact.arguments(back)
    counts = [(BLOCKS.num_compressed(n - back - 1), BLOCKS.num_compressed(n - back)) for n in exact.lengths]
    new = [(b, after - 1) for b, (before, after) in enumerate(counts) if after > before]
    slots = k_cmp.slots(*torch.tensor(new, dtype=torch.long, device=k_cmp.device).reshape(-1, 2).T)
    for side in "kv":
        tails = [getattr(x, f"{side}_tail") for x in (found, exact)]
        if not torch.equal(*tails):
            raise AssertionError(f"{side}_tail: expected the new raw rows, and nothing else changed")
        pages, wanted = (getattr(x, f"{side}_pages").flatten(0, 1) for x in (found, exact))
        summed = BLOCKS.kernel_size * 2.0**-24 * tails[1].abs().max()  # l terms, whose sum is no larger than one
        allowed = torch.zeros_like(wanted)
        allowed[slots] = summed + torch.finfo(DTYPE).eps / 2 * (wanted[slots].abs() + summed)
        wrong = ~((pages - wanted).abs() <= allowed)
        if bool(wrong.any()):
            where = wrong.any(-1).nonzero()[:4].tolist()
            raise AssertionError(f"{side}_pages: other rows than the oracle's, [row of the pool, head]: {where}")
