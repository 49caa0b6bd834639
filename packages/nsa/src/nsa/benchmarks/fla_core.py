"""fla-core's `parallel_nsa` beside ours, where it is installed: nothing of it is here but calls.

What it computes was read in fla-core 0.6.0. It is this operation at one geometry: keys and values are averaged over
blocks that do not overlap and are as large as those that are selected, kernel_size = kernel_stride = block_size. A
query sees a compressed block that ends at or before it. Scores are the probabilities of Eq. 8 summed over the group,
which is what Eq. 9 and 10 come to there. The first block and the last two are forced (init_blocks=1, local_blocks=2).
Window and gates are ours; k and v serve all branches. It differs in

- its queries: q * scale, rounded to their dtype, is what is multiplied with keys. The choice is held against the
  oracle's for those, and the result against the oracle's for q, within the dtype's budget, given that choice;
- ties, which go to no block in particular, and blocks whose probability underflows, which may lose a place to none;
- what it takes: group sizes that are powers of two from 16 on, topk a power of two, at most half of block_size.
  flash-attn computes its window.

Interpreted (Triton 3.7, fp16, blocks of 16 tokens) its kernels pass the checks here, those of gradients too.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.benchmarks.checking import ROWS, attended, check_chosen, check_pooled, within
from nsa_varlen.benchmarks.machine import environment, installed, problem
from nsa_varlen.benchmarks.operations import GEOMETRY, op_workloads
from nsa_varlen.benchmarks.workload import Value, Workload
from torch import Tensor

from nsa.benchmarks import prefill
from nsa.benchmarks.routes import AUTO

DISTRIBUTION, OLDEST = "fla-core", (0, 6)
FORCED = {"init_blocks": 1, "local_blocks": 2}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class FlaBackend:
    """`parallel_nsa` of fla-core on given blocks: selected attention alone, no gates, no window.

    It pools k and v all the same: one more pass over them, which is timed with it.
    """

    name = "fla"

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why it cannot run, or None."""
        if problem.device != "cuda":
            return "needs CUDA"
        if problem.dtype not in HALF.values():
            return f"compared in float16 and bfloat16, got {problem.dtype}"
        if not is_power_of_two(problem.group_size, 16):
            return f"needs a power of two of at least 16 query heads a kv head, got {problem.group_size}"
        if not is_power_of_two(problem.block_size, 16):
            return f"needs a block_size that is a power of two of at least 16, got {problem.block_size}"
        if problem.needs_grad and not is_power_of_two(problem.topk, 1):
            return f"needs a topk that is a power of two for its gradients, got {problem.topk}"
        return _too_old()

    def selected_attention(
        self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry
    ) -> tuple[Tensor, None]:
        """(out, None) of sequences of one length. -1 is skipped, wherever it stands."""
        from fla.ops.nsa import parallel_nsa

        q, k, v, listed = (batched(x, layout) for x in (q, k, v, block_indices))
        sizes = {"block_size": blocks.block_size, "block_counts": block_indices.shape[2]}
        return parallel_nsa(q, k, v, block_indices=listed, **sizes).flatten(0, 1), None


class FlaPrefill(NamedTuple):
    """The inputs of `nsa.prefill`, as `parallel_nsa` takes them.

    Fields:
        q [B, S, Hq, D], k, v [B, S, Hk, D]; gates: of cmp, slc and win, [B, S, Hq] each, contiguous.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    blocks: BlockGeometry

    @classmethod
    def make(cls, device: str, seed: int, **parameters: Value) -> "FlaPrefill":
        """Those of `nsa.prefill` of the same seed and parameters."""
        made = prefill.Batch(device, seed, **parameters, backend=AUTO, direction="forward")
        q, k, v, gates = (batched(x, made.layout) for x in (made.q, made.k, made.v, made.gates))
        return cls(q, k, v, tuple(x.contiguous() for x in gates.unbind(-1)), made.blocks)

    def __call__(self, _: int = 0) -> Tensor:
        """out [B, S, Hq, D]."""
        from fla.ops.nsa import parallel_nsa

        sizes = {"block_counts": self.blocks.topk, "block_size": self.blocks.block_size}
        with torch.no_grad():
            found: Tensor = parallel_nsa(
                self.q, self.k, self.v, *self.gates, **sizes, window_size=self.blocks.window_size
            )
        return found

    def choice(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last sequence (k_cmp, v_cmp [num_cmp, Hk, D], block_indices [S, Hk, topk]), by its own functions.

        Indices are sorted here, -1 last: theirs come by score. A last block that is not full is left out: nobody sees
        it.
        """
        from fla.ops.nsa.parallel import mean_pooling, parallel_nsa_compression, parallel_nsa_topk

        q, k, v = (x[-1:] for x in self[:3])
        tokens, size = q.shape[1], self.blocks.block_size
        options = {"TK": tokens, "block_size": size, "scale": q.shape[-1] ** -0.5}
        with torch.no_grad():
            k_cmp, v_cmp = mean_pooling(k, size), mean_pooling(v, size)
            _, lse = parallel_nsa_compression(q=q, k=k_cmp, v=v_cmp, **options)
            listed = parallel_nsa_topk(q=q, k=k_cmp, lse=lse, block_counts=self.blocks.topk, **options)
        count = self.blocks.num_compressed(tokens)
        return k_cmp[0, :count], v_cmp[0, :count], ascending(listed[0])


def check(state: FlaPrefill, results: Sequence[Tensor]) -> str:
    """The last rows of the last sequence: pooled rows, choice, result.

    Raises:
        AssertionError: one of them is not the oracle's.
    """
    blocks, tokens = state.blocks, state.q.shape[1]
    if not bool(results[0].isfinite().all()):
        raise AssertionError("out: expected finite values, got others")
    rows = min(tokens, ROWS)
    about = f"the last {rows} rows"
    k_cmp, v_cmp, listed = state.choice()
    for name, x, raw in (("k_cmp", k_cmp, state.k), ("v_cmp", v_cmp, state.v)):
        check_pooled(x, raw[-1], blocks, name)
    q, k, v, indices = state.q[-1, tokens - rows :], state.k[-1], state.v[-1], listed[tokens - rows :]
    layout = VarlenLayout.from_lengths([rows], [tokens], q.device)
    scale = q.shape[-1] ** -0.5
    check_chosen(indices, (q * scale).double() / scale, k_cmp, layout, blocks, about)  # of the queries that it takes
    gates = torch.stack([x[-1, tokens - rows :] for x in state.gates], -1)

    def expected(dtype: torch.dtype) -> Tensor:
        return attended(q, (k_cmp, v_cmp, k, v, k, v), gates, indices, layout, blocks, dtype)

    out = results[0][-1, tokens - rows :]
    return within(out, lambda: expected(out.dtype), expected(torch.float64), f"out of {about}")


def ascending(listed: Tensor) -> Tensor:
    """Block indices in ascending order, int32, -1 at the end.

    Example:
        >>> ascending(torch.tensor([4, -1, 0, 2])).tolist()
        [0, 2, 4, -1]
    """
    most = torch.iinfo(torch.int32).max
    found = listed.int().masked_fill(listed < 0, most).sort(-1).values
    return found.masked_fill(found == most, -1)


def refuse(device: str, **parameters: Value) -> str | None:
    """Why `parallel_nsa` does not run there, or is no match for ours."""
    if parameters["inputs"] not in ("random", "smooth"):
        return f"inputs: expected random or smooth, got {parameters['inputs']!r}"
    sizes = {name: int(parameters[name]) for name in ("kernel_size", "kernel_stride", "block_size")}
    if len({*sizes.values()}) > 1:
        return f"needs kernel_size = kernel_stride = block_size, got {', '.join(map(str, sizes.values()))}"
    for name, forced in FORCED.items():
        if parameters[name] != forced:
            return f"forces {name}={forced}, got {parameters[name]}"
    topk = int(parameters["topk"])
    if not is_power_of_two(topk, 1) or 2 * topk > sizes["block_size"]:
        return f"needs a topk that is a power of two, at most half of block_size, got {topk} of {sizes['block_size']}"
    if parameters["dtype"] not in HALF:
        return f"dtype: expected one of {list(HALF)}, got {parameters['dtype']!r}"
    machine = environment(device)
    reason = FlaBackend().refuse("selected_attention", problem(device, parameters, needs_grad=False), machine)
    return reason or (None if machine.flash_attn else "needs flash-attn for its window")


def workloads() -> list[Workload]:
    """`fla.prefill` beside `nsa.prefill`, `fla.selected_attention` beside those of our backends."""
    parameters = {name: x for name, x in prefill.SIZES.items() if name != "backend"} | {"inputs": "random"}
    parameters |= {"num_heads": 64, "num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    whole = Workload(
        "fla.prefill",
        "fla-core's parallel_nsa: one forward at kernel_size = kernel_stride = block_size",
        parameters | GEOMETRY | {"kernel_size": 64, "kernel_stride": 64},
        setup=FlaPrefill.make,
        call=FlaPrefill.__call__,
        cost=prefill.cost,
        check=check,
        facts=lambda state: {"backend": "fla", "why": "requested"},
        refuse=refuse,
    )
    group_of_16: dict[str, Value] = {"dtype": "bfloat16", "num_heads": 64, "num_kv_heads": 4}
    return [whole, *op_workloads(FlaBackend(), ["selected_attention"], **group_of_16)]


def _too_old() -> str | None:
    found = installed(DISTRIBUTION)
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST:
        return None
    return f"needs {DISTRIBUTION} {OLDEST[0]}.{OLDEST[1]} or newer, got {found or 'none'}"


def is_power_of_two(x: int, least: int) -> bool:
    """Whether x is one, of at least `least`."""
    return x >= least and x & (x - 1) == 0


def batched(x: Tensor, layout: VarlenLayout) -> Tensor:
    """Packed sequences of one length [B * S, ...] as a batch [B, S, ...]."""
    return x.unflatten(0, (-1, layout.max_seqlen_q))
