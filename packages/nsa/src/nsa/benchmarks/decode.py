"""Decode steps of an `NSACache`: each stores the new tokens, completes blocks, attends in all branches and combines."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from nsa_routing.backends import load_backend
from nsa_varlen.benchmarks.checking import check_pooled, check_rows
from nsa_varlen.benchmarks.dense import STEPS
from nsa_varlen.benchmarks.operations import GEOMETRY
from nsa_varlen.benchmarks.workload import Value, Workload
from torch import Tensor

from nsa import ops
from nsa.attention import nsa_attention
from nsa.benchmarks import routes
from nsa.benchmarks.prefill import SIZES, geometry
from nsa.cache import NSACache
from nsa.compression import Pool
from nsa.config import NSAConfig
from nsa.reads import ReadCounters, reads_when_selected

OPS = ("decode_attention",)
CHUNK = 16_384  # tokens that are prefilled at a time: queries of all heads are as large
ROLLBACK = 2 * STEPS  # raw tokens and pages of the window that all steps of a sample need stay


class Sequences:
    """Sequences prefilled to S tokens in a cache, and the STEPS steps that followed.

    Lengths that a step goes by are tensors of its own: it can be repeated at its own length, where it stores the rows
    that it stored before. Random unit normal q, k and v; k and v serve all branches, each in pages of its own.

    Fields:
        q [B, STEPS, Hq, D], k, v [B, S + STEPS, Hk, D], gates [B, STEPS, Hq, 3].
        steps: (args, kwargs) of `ops.decode_attention`.
        prefilled, decoded: `ReadCounters.read` of the prefill, and of the steps alone.
    """

    def __init__(self, device: str, seed: int, **parameters: Any) -> None:
        self.blocks = geometry(parameters)
        self.tokens, batch, heads, kv_heads, dim = (
            int(parameters[name]) for name in ("S", "batch", "num_heads", "num_kv_heads", "head_dim")
        )
        dtype = getattr(torch, str(parameters["dtype"]))
        sizes: dict[str, Any] = {name: int(value) for name, value in parameters.items() if name in GEOMETRY}
        config = NSAConfig(heads * dim, heads, kv_heads, dim, rope_theta=None, **sizes)
        generator = torch.Generator(device).manual_seed(seed)
        self.normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        total = self.tokens + STEPS
        self.cache = NSACache(config, batch, total, rollback=ROLLBACK, device=device, dtype=dtype)
        self.cache.counters = ReadCounters(batch, device)
        self.k, self.v = (self.normal(batch, total, kv_heads, dim) for _ in "kv")
        self.q, self.gates = self.normal(batch, STEPS, heads, dim), self.normal(batch, STEPS, heads, 3).sigmoid()
        for sequence in range(batch):
            for start in range(0, self.tokens, CHUNK):
                self._prefill(sequence, slice(start, min(start + CHUNK, self.tokens)))
        self.prefilled = self.cache.counters.read()
        self.cache.reserve(STEPS)
        self.steps = [self._step(index) for index in range(STEPS)]
        both = self.cache.counters.read()
        self.decoded = {name: both[name] - self.prefilled[name] for name in both}

    def _prefill(self, sequence: int, rows: slice) -> None:
        lengths = [0] * self.cache.batch_size
        lengths[sequence] = rows.stop - rows.start
        k, v = self.k[sequence, rows], self.v[sequence, rows]
        q, gates = (self.normal(len(k), *x.shape[2:]) for x in (self.q, self.gates))
        with self.cache.extend(lengths) as step:
            step.write_slc(k, v)
            step.write_win(k, v)
            step.write_cmp(k, v, self._compress)
            pages = (*step.cmp, *step.slc, *step.win)
            _, aux = nsa_attention(q, *pages, gates, step.layout, self.blocks, return_aux=True)
            step.count(aux.block_indices)

    def _compress(self, k: Tensor, v: Tensor, positions: Tensor, layout: Any, starts: Tensor) -> tuple[Tensor, Tensor]:
        return ops.compress_mean(k, layout, self.blocks), ops.compress_mean(v, layout, self.blocks)

    def _step(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        now = slice(self.tokens + index, self.tokens + index + 1)
        kv = self.k[:, now], self.v[:, now]
        step = self.cache.decode(1)
        new = step.new_tokens(kv, kv, kv, Pool(None, None))
        pages = (*step.cmp, *step.slc, *step.win)
        q, gates = (x[:, index : index + 1].contiguous() for x in (self.q, self.gates))
        args: tuple[Any, ...] = q, *pages, gates, step.counts, self.blocks
        kwargs: dict[str, Any] = {"new": new}
        _, indices = ops.decode_attention(*args, **kwargs)
        step.count(indices)
        step.commit()
        self.cache.advance(1)
        return args, kwargs

    def spoil(self) -> None:
        """What the steps are to store is NaN, until they do."""
        (_, *pages, _, _, blocks), _ = self.steps[-1]
        end = self.tokens + STEPS
        device = self.k.device
        for number, x in enumerate(pages):
            rows = range(self.tokens, end)
            if number < 2:
                rows = range(blocks.num_compressed(self.tokens), blocks.num_compressed(end))
            sequence = torch.arange(self.cache.batch_size, device=device)[:, None]
            slots = x.slots(sequence, torch.arange(rows.start, rows.stop, device=device)[None])
            x.pages[slots // x.page_size, slots % x.page_size] = torch.nan


# One set of sequences for all backends: they are large, and a prefill takes longer than what is timed.
_made: WeakValueDictionary[tuple[Any, ...], Sequences] = WeakValueDictionary()


class Decode:
    """Steps on one backend. Those of other backends may be on the same sequences."""

    def __init__(self, device: str, seed: int, **parameters: Any) -> None:
        self.device, self.parameters = device, parameters
        self.backend = routes.name_of(parameters["backend"])
        sizes = {name: value for name, value in parameters.items() if name != "backend"}
        key = (device, seed, *sorted(sizes.items()))
        found = _made.get(key)
        self.sequences = _made[key] = Sequences(device, seed, **sizes) if found is None else found

    def call(self, index: int) -> tuple[Tensor, Tensor]:
        """(out, block_indices) of a step."""
        args, kwargs = self.sequences.steps[index]
        return ops.decode_attention(*args, **kwargs, backend=self.backend)

    def parts(self) -> dict[str, Callable[[int], Any]]:
        """The kernels of each branch, of the backend that runs."""
        (plan,) = routes.plans(OPS, layer(self.device, **self.parameters), self.parameters["backend"])
        stages = getattr(load_backend(str(plan.backend)), "decode_stages", None)
        if stages is None:
            return {}
        made = [stages(*args, **kwargs) for args, kwargs in self.sequences.steps]
        for index in range(STEPS):
            self.call(index)
        return {name: partial(_stage, [steps[name] for steps in made]) for name in made[0]}

    def check(self, results: Sequence[tuple[Tensor, Tensor]]) -> str:
        """First and last step of the last sequence, one of the first: what was stored and chosen, the result.

        All results have to be finite. What the setup stored, and other backends, is spoiled and stored again, since
        steps that store nothing would find it.
        """
        for index, (out, _) in enumerate(results):
            if not bool(torch.isfinite(out).all()):
                raise AssertionError(f"out of step {index}: expected finite values, got others")
        last, words = self.sequences.cache.batch_size - 1, ""
        for sequence, index in ((0, STEPS // 2), (last, 0), (last, STEPS - 1)):
            words = self._check_step(sequence, index, results[index])
        self.sequences.spoil()
        for index in range(STEPS):
            self.call(index)
        for sequence in (0, last):
            self._check_stored(sequence, STEPS - 1)
        return words

    def _check_step(self, sequence: int, index: int, result: tuple[Tensor, Tensor]) -> str:
        (q, *_, gates, _, blocks), _ = self.sequences.steps[index]
        kv = self._check_stored(sequence, index)
        out, indices = (x[sequence] for x in result)
        about = f"step {index} of sequence {sequence}"
        return check_rows(out, indices, q[sequence], kv, gates[sequence], blocks, about)

    def _check_stored(self, sequence: int, index: int) -> tuple[Tensor, ...]:
        """Rows of cmp, slc and win by the time of a step, which have to be those of the tokens."""
        made = self.sequences
        (_, *pages, _, _, blocks), _ = made.steps[index]
        length = made.tokens + index + 1
        compressed = blocks.num_compressed(length)
        k, v = made.k[sequence, :length], made.v[sequence, :length]
        k_cmp, v_cmp = (x.span(sequence, 0, compressed) for x in pages[:2])
        for name, rows, raw in (("k_cmp", k_cmp, k), ("v_cmp", v_cmp, v)):
            check_pooled(rows, raw, blocks, name)
        for name, x, raw in zip(("k_slc", "v_slc", "k_win", "v_win"), pages[2:], (k, v, k, v), strict=True):
            start = max(0, length - blocks.window_size) if name.endswith("win") else 0
            if not torch.equal(x.span(sequence, start, length), raw[start:]):
                raise AssertionError(f"{name}: expected the rows of the tokens, got others")
        return k_cmp, v_cmp, k, v, k, v

    def facts(self) -> dict[str, Value]:
        """Route and reads."""
        prefilled, decoded = self.sequences.prefilled, self.sequences.decoded
        actual, actual_decode = (read["cmp"] + read["slc"] + read["win"] for read in (prefilled, decoded))
        return routes.facts(OPS, layer(self.device, **self.parameters), self.parameters["backend"]) | {
            "reads_actual": actual + actual_decode,
            "reads_expected": prefilled["budget"] + decoded["budget"],
            "reads_actual_decode": actual_decode,
            "reads_expected_decode": decoded["budget"],
        }


def _stage(steps: list[Callable[[], Any]], index: int) -> Any:
    return steps[index]()


def layer(device: str, S: int, **sizes: Any) -> Any:
    """The problem of a step: its keys are those that the pages have room for."""
    return routes.layer_of(device, 1, -(-(S + STEPS) // 64) * 64, **sizes)


def cost(S: int, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, **others: Any) -> Any:
    """(flops, bytes) of a step: each key and value that it sees once, q and out; on average over a sample's steps."""
    blocks = geometry(others)
    itemsize = getattr(torch, dtype).itemsize
    keys = sum(reads_when_selected(S + 1 + index, blocks) for index in range(STEPS)) / STEPS
    flops = 4.0 * head_dim * batch * num_heads * keys
    return flops, 2.0 * itemsize * head_dim * batch * (num_kv_heads * keys + num_heads)


def workload() -> Workload:
    """A decode step."""

    def refuse(device: str, **parameters: Any) -> str | None:
        return routes.refusal(OPS, layer(device, **parameters), parameters["backend"])

    return Workload(
        "nsa.decode",
        "one token for every sequence: stored, blocks completed, attended to, combined",
        SIZES | GEOMETRY,
        setup=Decode,
        call=lambda state, index: state.call(index),
        cost=cost,
        check=lambda state, results: state.check(results),
        facts=lambda state: state.facts(),
        refuse=refuse,
        parts=lambda state: state.parts(),
        calls=STEPS,
    )
