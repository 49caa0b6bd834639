"""Decode steps of backend `triton` beside dense attention, in one run: `python bench/triton_decode.py --out FILE`.

A *step* is one call of `decode_attention` with `new` rows: it stores the new token's rows of slc and win and its raw
row of cmp, emits a compressed block where one completes, attends in all three branches and combines. bf16, head_dim
128, default block sizes, pages of 64 rows in shuffled order, one pool for all streams as an `NSACache` has it.

- `nsa graph`: the backend's step in a CUDA graph; `nsa eager`: called from Python, wall time per step with one
  synchronisation at the end; `nsa eager events`: the same steps by CUDA events.
- `routed ...`: the same through `nsa.ops` in preset perf as it ships (NSA_CHECK_FINITE=off leaves out the look at every
  result).
- `FA-2 dense`: `flash_attn_with_kvcache`, `cuDNN dense`: torch's SDPA, one query a sequence over contiguous K and V of
  as many tokens, in CUDA graphs. One that does not run is noted, and left out.

Every step is cold: a graph is a chain of steps, each on the next of several independent sets of caches, one sequence
too, and those that a lap goes through are at least 3 times as large as the 50 MB of L2, counting what a step reads.
A chain has at least STEPS steps, so that a replay's own cost vanishes; all times are per step. Variants take turns,
see `timing`. In a graph lengths stand still: every sequence has as many tokens as the row says, so the new one
completes a block (`emission` 1), or one less (0). `avg` is what counts: with a stride of 16, (15 * plain + emission) /
16, turn by turn.

What is timed is checked first, against the oracle in fp64: what is stored, what is chosen, and the result, for short
sequences with their edge cases, and at each point for one sequence of those that are timed. Replays and routed steps
equal eager ones bit by bit. A wrong step raises, and gets no number.

`floor_us` is what has to be read at least, over 3.0 TB/s: each row of K and V that a step sees once, of the compressed,
selected and window branch, q and out; `floor_twice_us` reads k_cmp twice, as a step must that chooses before it weighs.
`share_of_bandwidth` is the former over the time, `ratio_to_dense` the median over that of the fastest dense variant.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cases import BANDWIDTH, BLOCKS, DIM, DTYPE, SHAPES, command, on_cuda
from decoding import Sequences, check
from nsa import ops
from nsa_kernels_triton import BACKEND, configurations
from nsa_varlen.testing import assert_within_budget, plain_attention
from timing import Run, header, measure, quartiles, told, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

POINTS = [(8_192, 64), (65_536, 8), (65_536, 1), (131_072, 8)]  # tokens, sequences
CHECKED = [4096, 4000, 3007, 4097, 500, 33]  # and one less each: ends of blocks and pages, a first row, a first block
COLD = 3 * 50_000_000  # bytes that a lap reads at least
STEPS = 16
EMISSIONS = {0: 1, 1: 0}  # how many tokens are missing from the length at which a block completes
Case = tuple[str, int | str]  # variant; emission, "" for a dense one
FIELDS = (
    "shape",
    "tokens",
    "batch",
    "variant",
    "emission",
    "median_us",
    "p25_us",
    "p75_us",
    "repeats",
    "floor_us",
    "floor_twice_us",
    "share_of_bandwidth",
    "ratio_to_dense",
)


def step_bytes(shape: str, tokens: int, batch: int, k_cmp_reads: int = 1) -> int:
    """What a step has to read, q and out included."""
    heads, kv_heads = SHAPES[shape]
    listed = min(BLOCKS.topk, BLOCKS.num_blocks(tokens))
    selected = (listed - 1) * BLOCKS.block_size + (tokens - 1) % BLOCKS.block_size + 1
    rows = (k_cmp_reads + 1) * BLOCKS.num_compressed(tokens) + 2 * selected + 2 * min(BLOCKS.window_size, tokens)
    return batch * DIM * DTYPE.itemsize * (kv_heads * rows + 2 * heads)


def dense_bytes(shape: str, tokens: int, batch: int) -> int:
    heads, kv_heads = SHAPES[shape]
    return batch * DIM * DTYPE.itemsize * (2 * kv_heads * tokens + 2 * heads)


def copies(size: int) -> int:
    """How many sets of caches a lap goes through if a step reads `size` bytes of one."""
    return max(2, -(-COLD // size))


class Chain:
    """Steps one after another, lap after lap: `replay` in a CUDA graph, `eager` from Python.

    Args:
        steps: of one lap.
        exact: whether a replay must be eager steps bit by bit; dense kernels may split their keys otherwise.

    Fields:
        steps: of a call.
        results: of the steps of the first lap.
        walls: milliseconds of each call of `eager`.
    """

    def __init__(self, steps: Sequence[Callable[[], Any]], *, exact: bool = True) -> None:
        self.steps = list(steps) * -(-STEPS // len(steps))
        self.walls: list[float] = []
        for _ in range(2):
            self.results = [step() for step in steps]
            torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            captured = [step() for step in self.steps]
        self.graph.replay()
        if exact:
            assert_same(captured[: len(steps)], self.results, "a replay")
            assert_same(captured[-len(steps) :], self.results, "the last lap of a replay")

    def replay(self) -> None:
        self.graph.replay()

    def eager(self) -> None:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for step in self.steps:
            step()
        torch.cuda.synchronize()
        self.walls.append(1e3 * (time.perf_counter() - begin))


def assert_same(found: Sequence[Any], expected: Sequence[Any], about: str) -> None:
    """Results of steps, tensors or pairs of them, bit by bit."""
    for i, (results, wanted) in enumerate(zip(found, expected, strict=True)):
        pairs = zip(results, wanted, strict=True) if isinstance(results, tuple) else [(results, wanted)]
        if not all(torch.equal(*pair) for pair in pairs):
            raise AssertionError(f"{about}, step {i}: expected what the eager step of the backend gave, bit by bit")


def fa2(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


def cudnn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


DENSE = {"FA-2 dense": fa2, "cuDNN dense": cudnn}  # of q [B, 1, Hq, DIM] over k, v [B, tokens, Hk, DIM]


def dense_chains(shape: str, tokens: int, batch: int) -> dict[str, Chain]:
    """Those of `DENSE` that run, checked on the last sequence."""
    heads, kv_heads = SHAPES[shape]
    normal = partial(torch.randn, device="cuda", dtype=DTYPE)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    made = [
        (normal(batch, 1, heads, DIM), *(normal(batch, tokens, kv_heads, DIM) for _ in "kv"), lengths)
        for _ in range(copies(dense_bytes(shape, tokens, batch)))
    ]
    q, k, v = (x[-1] for x in made[0][:3])
    seen = torch.ones(1, 1, tokens, dtype=torch.bool, device="cuda")
    plain, exact = plain_attention(q, k, v, seen), plain_attention(q.double(), k.double(), v.double(), seen)
    found = {}
    for name, run in DENSE.items():
        try:
            assert_within_budget(run(*made[0])[-1], plain, exact, name)
            found[name] = Chain([partial(run, *args) for args in made], exact=False)
        except (ImportError, RuntimeError) as error:
            print(f"# {name} does not run: {str(error).splitlines()[0]}", flush=True)
    return found


def measured(shape: str, tokens: int, batch: int, repeats: int, profiled: bool) -> list[dict[str, object]]:
    """The rows of one point."""
    made = [Sequences(shape, [tokens] * batch, seed=seed) for seed in range(copies(step_bytes(shape, tokens, batch)))]
    check(BACKEND.decode_attention, made[0], 0, [batch - 1], "cuda")
    torch.cuda.empty_cache()
    chains: dict[Case, Chain] = {(name, ""): chain for name, chain in dense_chains(shape, tokens, batch).items()}
    runs: dict[Case, Run] = {case: chain.replay for case, chain in chains.items()}
    of: dict[Case, Chain] = dict(chains)  # whose steps a variant runs
    for name, run in (("nsa", BACKEND.decode_attention), ("routed", partial(ops.decode_attention, backend="triton"))):
        for emission, back in EMISSIONS.items():
            calls = [partial(run, *args, **kwargs) for args, kwargs in (x.arguments(back) for x in made)]
            chain = chains[name, emission] = Chain(calls)
            assert_same(chain.results, chains["nsa", emission].results, name)
            runs |= {(f"{name} graph", emission): chain.replay, (f"{name} eager events", emission): chain.eager}
            of |= {(f"{name} {how}", emission): chain for how in ("graph", "eager events", "eager")}
    taken = {case: times.gpu for case, times in measure(runs, repeats).items()}
    taken |= {case: chain.walls[-repeats:] for case, chain in of.items() if case not in taken}
    taken = {case: [1e3 * t / len(of[case].steps) for t in times] for case, times in taken.items()}
    rows = [told(FIELDS, row) for row in table(shape, tokens, batch, taken)]
    if profiled:
        for emission in EMISSIONS:
            tell_kernels(chains["nsa", emission].steps, f"{shape} {tokens}x{batch}, emission {emission}")
    return rows


def table(shape: str, tokens: int, batch: int, taken: dict[Case, list[float]]) -> list[tuple[object, ...]]:
    """Values of FIELDS from microseconds a step by case, and averages over the steps from one block to the next."""
    stride, averages = BLOCKS.kernel_stride, {}
    for name in [name for name, emission in taken if emission == 1]:
        both = zip(taken[name, 0], taken[name, 1], strict=True)
        averages[name, "avg"] = [((stride - 1) * plain + emitting) / stride for plain, emitting in both]
    best = min((statistics.median(times) for (_, kind), times in taken.items() if kind == ""), default=float("nan"))
    sizes = [step_bytes(shape, tokens, batch), step_bytes(shape, tokens, batch, 2), dense_bytes(shape, tokens, batch)]
    nsa, nsa_twice, dense = (1e6 * size / BANDWIDTH for size in sizes)
    rows = []
    for (name, kind), times in sorted((taken | averages).items(), key=lambda item: (item[0][0], str(item[0][1]))):
        once, twice = (dense, dense) if kind == "" else (nsa, nsa_twice)
        median = statistics.median(times)
        numbers = f"{once:.2f}", f"{twice:.2f}", f"{once / median:.3f}", f"{median / best:.4f}"
        rows.append((shape, tokens, batch, name, kind, *quartiles(times), len(times), *numbers))
    return rows


def tell_kernels(steps: Sequence[Run], about: str) -> None:
    """Print the kernels of eager steps, longest first: median microseconds, and how often a step launches it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for step in steps:
            step()
        torch.cuda.synchronize()
    taken = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken[event.name].append(event.time_range.elapsed_us())
    print(f"# kernels of {about}")
    for name, times in sorted(taken.items(), key=lambda item: -sum(item[1])):
        print(f"#   {statistics.median(times):8.2f} us, {len(times) / len(steps):.2f} a step: {name}", flush=True)


def point(text: str) -> tuple[int, int]:
    """65536x8: tokens, sequences."""
    tokens, batch = text.split("x")
    return int(tokens), int(batch)


def override(text: str) -> tuple[str, dict[str, int]]:
    """KERNEL:name=value,...: numbers that replace those of every rule of a kernel."""
    kernel, _, rest = text.partition(":")
    numbers = {name: int(value) for name, value in (pair.split("=") for pair in rest.split(","))}
    rules = configurations.table("sm90").get(kernel, [])
    unknown = numbers.keys() - {name for rule in rules for name in rule} - set(configurations.OPTIONS)
    if not rules or unknown:
        known = sorted(configurations.table("sm90"))
        raise argparse.ArgumentTypeError(f"expected a kernel of {known} and its numbers, got {text!r}")
    return kernel, numbers


def main() -> None:
    os.environ.setdefault("NSA_PRESET", "perf")
    parser = command("decode steps beside dense attention")
    parser.add_argument("--points", nargs="+", type=point, default=POINTS, metavar="TOKENSxSEQUENCES")
    parser.add_argument("--override", action="append", type=override, default=[], metavar="KERNEL:name=value,...")
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel of eager steps")
    given = on_cuda(parser)
    import triton

    versions = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    with contextlib.suppress(ImportError):
        import flash_attn

        versions.append(f"flash-attn {flash_attn.__version__}")
    versions += [f"cuDNN {torch.backends.cudnn.version()}"]
    versions += [f"NSA_CHECK_FINITE={os.environ.get('NSA_CHECK_FINITE', 'flag')}"]
    versions += [f"{kernel}: {numbers}" for kernel, numbers in given.override]
    comment = header("triton_decode.py", *versions)
    rows = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for kernel, numbers in given.override:
            stack.enter_context(configurations.overridden(kernel, **numbers))
        for shape in given.shapes:
            for back in EMISSIONS.values():
                check(BACKEND.decode_attention, Sequences(shape, CHECKED), back, range(len(CHECKED)))
        print(comment, ",".join(FIELDS), sep="\n", flush=True)
        for shape in given.shapes:
            for tokens, batch in given.points:
                rows += measured(shape, tokens, batch, given.repeats, given.kernels)
                torch.cuda.empty_cache()
                if given.out:
                    write(given.out, FIELDS, rows, comment)  # so far


if __name__ == "__main__":
    main()
