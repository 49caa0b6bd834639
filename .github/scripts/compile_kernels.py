"""Compile every Triton kernel for every GPU it is for, on a machine without one: `hatch run kernels:compile`.

Each operation of the backend `triton` is called on small CPU tensors with a stand-in for the driver, once per GPU:
Triton binds and specialises the arguments and reads that GPU's launch configuration as it would there, and where it
would compile and launch, the launch is noted instead. What was noted is compiled by Triton and its ptxas, each distinct
launch once, in a process of its own.

It fails where an operation raises, or a kernel does not compile, wants more shared or tensor memory than the GPU has,
spills more on SM 9.0 at head_dim 128 than `SPILLS` allows it, reads a register that nothing set, was launched by no
case, or, of a decode step, sums products over threads. It tells which rules of the configurations no case takes.
"""

import argparse
import csv
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported; an interpreted kernel is never compiled

import torch
import triton
from nsa_kernels_triton import backend, configurations, contracts
from nsa_kernels_triton.ops import decode
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.testing import gradients
from public_kernels import all_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from unset_registers import disassembled, unset_reads

SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one program may have
TENSOR_MEMORY_COLUMNS = 512  # of one program, on SM 10.0
# Bytes that a thread may spill on SM 9.0 at head_dim 128; other kernels none. These hold two sums in registers, and
# spill before and behind their innermost loop; the third does it in fp32, by 8 bytes at most in half precision.
SPILLS = {"block_gradients_kernel": 384, "interval_dkdv_kernel": 384, "decode_selected_kernel": 192}
# By Triton 3.9, too: what is computed once and read again at each turn of a loop. Times: docs/triton-forward.md.
SPILLS_3_9 = {
    "shared_kernel": 16,
    "interval_attention_kernel": 40,
    "file_kernel": 4,
    "decode_compressed_kernel": 4,
    "topk_kernel": 32,  # of 1,024 blocks a warp
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    SPILLS |= SPILLS_3_9
PROCESSORS = 132  # multiprocessors that decode steps are cut for
WORKERS = 2
# What an operation measures on the device to choose a configuration: the extremes, each is tried. See `ops.spread`.
MEASURED = ({"spread": 100}, {"spread": 1 << 20})
CHOOSE = configurations.choose


@dataclass(frozen=True)
class Batch:
    """Lengths of the sequences: they choose tiles and paths, and an int of 1 is a constant to Triton."""

    q: tuple[int, ...]
    k: tuple[int, ...]


RAGGED = (
    Batch((300, 0, 77), (300, 0, 77)),
    Batch((40, 1001), (1003, 8191)),  # a prefix is cached, long
    Batch((1, 1, 1), (8191, 500, 1)),  # a decode step
)
# Blocks for one level of the choice among 1024 and for two; lists as long as prefixes are cached.
LONG = (*RAGGED, Batch((300,), (60_000,)), Batch((40,), (140_000,)))
SINGLE = (Batch((1,), (1001,)), Batch((1,), (1,)), Batch((4096,), (4096,)))  # sizes and strides of 1; multiples of 16


@dataclass(frozen=True)
class Case:
    """A kind of layer, and the GPUs it is compiled for unless asked otherwise."""

    name: str
    dtype: torch.dtype
    head_dim: int
    group_size: int
    v_head_dim: int = 0  # 0: as head_dim
    block_size: int = 64
    topk: int = 16
    num_kv_heads: int = 3
    batches: tuple[Batch, ...] = RAGGED
    sms: tuple[int, ...] = (90,)


# Decode steps: sequences, tokens of each, room, new rows. Few sequences are split, many are not; long ones need levels.
DECODES = ((1, 1, 65_536, "mean"), (64, 1, 8_192, "weights"), (2, 5, 1_048_576, "completed"), (2, 2, 4_096, ""))
OTHER_DECODES = ((2, 2, 16_384, "mean"),)  # of layers unlike those that are tuned for
EVERY = tuple(SHARED_LIMITS)
CASES = (
    # Groups of 16 take one organisation of selected attention, groups of 4 the other; --all has both everywhere.
    Case("bf16 128 g16", torch.bfloat16, 128, 16, batches=LONG, sms=(89, 90, 100)),
    Case("bf16 128 g4", torch.bfloat16, 128, 4, batches=LONG, sms=(80, 89, 90)),
    Case("bf16 128 g1", torch.bfloat16, 128, 1, batches=LONG),
    Case("bf16 128 g4 one sequence", torch.bfloat16, 128, 4, num_kv_heads=1, batches=SINGLE),
    Case("bf16 128 g4 block 32 top 64", torch.bfloat16, 128, 4, block_size=32, topk=64),
    Case("bf16 128 g4 block 128", torch.bfloat16, 128, 4, block_size=128),
    Case("fp16 64 g4", torch.float16, 64, 4),
    Case("bf16 192/128 g12", torch.bfloat16, 192, 12, v_head_dim=128),
    # Rows of k and v that lie differently in shared memory: what `unset_register` is for.
    Case("bf16 96/80 g4", torch.bfloat16, 96, 4, v_head_dim=80, batches=RAGGED[:1]),
    Case("fp32 128 g4", torch.float32, 128, 4, sms=(89, 90)),  # 89 has the least shared memory
    Case("bf16 256 g4", torch.bfloat16, 256, 4, sms=(89, 90)),
    Case("fp32 256 g4 block 128", torch.float32, 256, 4, block_size=128, sms=(89,)),
)


@dataclass(frozen=True)
class Launch:
    """One compilation: `source` and `options` are what Triton's compiler is called with."""

    case: Case
    sm: int
    source: Any
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.source.fn.__name__

    @property
    def constants(self) -> str:
        """Its compile-time constants, those too that are arguments of 1."""
        names = self.source.fn.arg_names
        return " ".join(f"{names[path[0]]}={value}" for path, value in self.source.constants.items())


@dataclass(frozen=True)
class Row:
    """A line of the table. Without `error`, the numbers of a compilation: registers a thread, bytes a program."""

    kernel: str
    case: str
    sm: int
    warps: int
    stages: int
    registers: int | None
    spilled: int | None  # bytes that one thread stores
    shared: int | None
    seconds: float
    constants: str
    error: str = ""


class Noted:
    """A compiled kernel, as far as launches ask it."""

    function = packed_metadata = None

    def run(self, *args: Any) -> None:
        """Nothing is launched."""

    launch_metadata = run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


class Recorder:
    """Triton's driver and its compiler, as far as launches ask them: a GPU of one SM that only notes what is launched.

    Triton compiles an equal launch once; so it is noted once, too.
    """

    def __init__(self) -> None:
        self.case, self.sm, self.measured = CASES[0], EVERY[0], MEASURED[0]
        self.launches: list[Launch] = []
        self.rules: set[int] = set()  # those of the configurations that were chosen

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device: here, by SM."""
        return self.sm

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def compile(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
        """Note a launch; a kernel that does nothing."""
        self.launches.append(Launch(self.case, self.sm, source, dict(options)))

        return Noted()

    def family(self, device: torch.device) -> str:
        """Which launch configurations hold."""
        return configurations.FAMILIES[self.sm]

    def choose(self, kernel: str, name: str, **case: int) -> configurations.Launch:
        """A launch configuration, by what this recorder says was measured."""
        case |= {key: value for key, value in self.measured.items() if key in case}
        fitting = (
            id(rule)
            for rule in configurations.table(name)[kernel]
            if all(case[key] <= most for key, most in rule.get("up_to", {}).items())
        )
        self.rules.add(next(fitting, 0))
        return CHOOSE(kernel, name, **case)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, operations take CPU tensors for those of a GPU."""

        def unmet(op: str, problem: Any) -> str | None:
            return contracts.unmet(op, replace(problem, device="cuda"))

        triton.runtime.driver.set_active(self)
        with (
            patch.object(triton.compiler, "compile", self.compile),
            patch.object(configurations, "family", self.family),
            patch.object(configurations, "choose", self.choose),
            patch.object(backend, "unmet", unmet),
            patch.object(decode, "num_processors", lambda device: PROCESSORS),
        ):
            yield


def calls(case: Case, batch: Batch) -> dict[str, Callable[[], object]]:
    """Every operation by name, on inputs of its own: what an operation returns here, nobody has computed."""
    run, dv = backend.BACKEND, case.v_head_dim or case.head_dim
    layout = VarlenLayout.from_lengths(batch.q, batch.k)
    blocks = BlockGeometry(block_size=case.block_size, topk=case.topk)
    heads, compressed = case.num_kv_heads * case.group_size, layout.compressed(blocks).total

    def rows(total: int, num_heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(total, num_heads, dim, dtype=case.dtype)

    q, out, gates = (rows(layout.total_q, heads, dim) for dim in (case.head_dim, dv, 3))
    k, v = (rows(layout.total_k, case.num_kv_heads, dim) for dim in (case.head_dim, dv))
    k_cmp, v_cmp = (rows(compressed, case.num_kv_heads, dim) for dim in (case.head_dim, dv))
    lse = torch.zeros(heads, layout.total_q)
    listed = torch.arange(blocks.topk, dtype=torch.int32).expand(layout.total_q, case.num_kv_heads, -1).contiguous()
    forward = {
        "compress_mean": lambda: (run.compress_mean(k, layout, blocks), run.compress_mean(v, layout, blocks)),
        "compressed_attention": lambda: run.compressed_attention(q, k_cmp, v_cmp, layout, blocks),
        "select_blocks": lambda: run.select_blocks(q, k_cmp, lse, layout, blocks),
        "selected_attention": lambda: run.selected_attention(q, k, v, listed, layout, blocks),
        "window_attention": lambda: run.window_attention(q, k, v, layout, blocks),
        "combine": lambda: run.combine(gates, out, out, out),
    }
    qkv = [q, k, v]
    tuned = (case.dtype, case.head_dim, case.block_size) == (torch.bfloat16, 128, 64) and case.batches is LONG
    decodes = DECODES if tuned else OTHER_DECODES
    forward |= {f"decode_attention {points}": decode_step(case, *points) for points in decodes}
    return forward | {
        "compress_mean backward": lambda: gradients(lambda x: run.compress_mean(x, layout, blocks), [k], k_cmp),
        "compressed_attention backward": lambda: gradients(
            lambda *x: run.compressed_attention(*x, layout, blocks), [q, k_cmp, v_cmp], out
        ),
        "selected_attention backward": lambda: gradients(
            lambda *x: run.selected_attention(*x, listed, layout, blocks), qkv, out
        ),
        "window_attention backward": lambda: gradients(lambda *x: run.window_attention(*x, layout, blocks), qkv, out),
        "combine backward": lambda: gradients(run.combine, [gates, out, out, out], out),
    }


def decode_step(case: Case, batch_size: int, tokens: int, room: int, kind: str) -> Callable[[], object]:
    """`decode_attention` of a batch, with as many tokens a sequence, room for so many, and this kind of new rows."""
    dv, size = case.v_head_dim or case.head_dim, 2 * case.block_size
    blocks = BlockGeometry(block_size=case.block_size, topk=case.topk)
    heads = case.num_kv_heads

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=case.dtype)

    pages = [zeros(4, size, heads, dim) for dim in (case.head_dim, dv)]

    def stream(rows: int, length: int) -> list[PagedKV]:
        table = torch.zeros(batch_size, -(-rows // size), dtype=torch.int32)
        return [PagedKV(x, table, torch.full((batch_size,), length, dtype=torch.int32)) for x in pages]

    raw = stream(room, 2 * size)
    streams = [*stream(blocks.num_compressed(room), blocks.num_compressed(2 * size)), *raw, *raw]
    q = zeros(batch_size, tokens, heads * case.group_size, case.head_dim)
    gates = zeros(*q.shape[:3], 3)
    counts = torch.ones(batch_size, dtype=torch.int32)
    k, v = (zeros(batch_size, tokens, heads, dim) for dim in (case.head_dim, dv))
    new = None
    if kind == "completed":
        few = (tokens - 1) // blocks.kernel_stride + 1
        new = NewTokens(k, v, k, v, CompletedBlocks(*(x[:, :1].expand(-1, few, -1, -1) for x in (k, v))))
    elif kind:
        tails = [zeros(batch_size, blocks.kernel_size - 1 + 8, heads, dim) for dim in (case.head_dim, dv)]
        weights = [zeros(heads, blocks.kernel_size)] * 2 if kind == "weights" else [None, None]
        rotation = torch.zeros(2, streams[0].block_table.shape[1] * size, case.head_dim // 2)
        new = NewTokens(k, v, k, v, PooledTokens(k, v, *tails, *weights, rotation))
    run = backend.BACKEND.decode_attention
    return lambda: run(q, *streams, gates, counts, blocks, new=new)


def record(cases: list[tuple[Case, int]]) -> tuple[Recorder, list[str]]:
    """(the launches of these cases on these SMs, what operations raised: each message where it came first)."""
    recorder = Recorder()
    raised: dict[tuple[str, str], str] = {}
    with recorder.active():
        for (case, sm), measured in product(cases, MEASURED):
            recorder.case, recorder.sm, recorder.measured = case, sm, measured
            for batch in case.batches:
                for op, call in calls(case, batch).items():
                    try:
                        call()
                    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported and fails the run
                        message = f"{type(error).__name__}: {error}"
                        raised.setdefault((op, message), f"{case.name}, sm_{sm}, {batch}")
    return recorder, [f"{op}, {where}: {message}" for (op, message), where in raised.items()]


def traits(launch: Launch) -> Iterator[tuple[object, ...]]:
    """What a launch shows of its kernel: a GPU with its numbers, the value of a constant, the kind of a pointer."""
    names, source = launch.source.fn.arg_names, launch.source
    yield launch.kernel, launch.sm, launch.options["num_warps"], launch.options["num_stages"]
    for path, value in source.constants.items():
        yield launch.kernel, names[path[0]], value
    for name, kind in source.signature.items():
        if kind.startswith("*"):
            yield launch.kernel, name, kind


def fewest(launches: list[Launch]) -> list[Launch]:
    """A few of the launches that between them show all that all do: always the one next that shows most."""
    shown = [set(traits(launch)) for launch in launches]
    missing, chosen = set().union(*shown), set()
    while missing:
        best = max(range(len(launches)), key=lambda i: len(shown[i] & missing))
        chosen.add(best)
        missing -= shown[best]
    return [launches[i] for i in sorted(chosen)]


def unchosen(recorder: Recorder, sms: Iterable[int]) -> list[str]:
    """The rules of these SMs' configurations that no launch was made by. A file has those that it inherits, too."""
    found = {}
    for sm in sms:
        for kernel, rules in configurations.table(configurations.FAMILIES[sm]).items():
            for rule in rules:
                if id(rule) not in recorder.rules:
                    found[id(rule)] = f"{kernel}, up_to {rule.get('up_to', 'anything')}, of sm_{sm}"
    return list(found.values())


def compiled(launch: Launch) -> Row:
    """Compile one launch. An error of the compiler becomes a row that says it."""
    start = time.monotonic()
    error, registers, spilled, shared = "", None, None, None
    log = io.StringIO()
    try:
        with redirect_stdout(log):  # ptxas says there what the code takes
            kernel = triton.compile(launch.source, target=GPUTarget("cuda", launch.sm, 32), options=launch.options)
    except Exception as raised:  # noqa: BLE001 - whatever it is, it is reported and fails the run
        error = f"{type(raised).__name__}: {raised}"
    else:
        registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())))
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", log.getvalue())))
        shared = kernel.metadata.shared
        error = refusal(launch, spilled, shared, getattr(kernel.metadata, "tmem_size", None) or 0)
        error = error or unequal_sum(launch, kernel.asm["ptx"]) or unset_register(kernel.asm)
    return outcome(launch, registers, spilled, shared, time.monotonic() - start, error)


def refusal(launch: Launch, spilled: int, shared: int, tensor_memory: int) -> str:
    """What is wrong with a kernel that compiles, or nothing."""
    if shared > SHARED_LIMITS[launch.sm]:
        return f"takes {shared} bytes of shared memory, sm_{launch.sm} has {SHARED_LIMITS[launch.sm]}"
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        return f"takes {tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
    if spilled > SPILLS.get(launch.kernel, 0) and launch.sm == 90 and launch.case.head_dim == 128:
        return f"spills {spilled} bytes"
    return ""


def unequal_sum(launch: Launch, ptx: str) -> str:
    """What is wrong with a decode kernel's sums over threads, or nothing.

    A product that is summed over threads may be multiplied and added at once, in each thread its own: then threads that
    hold the same sum hold it rounded otherwise, and which of them stores it is anybody's.
    """
    if not launch.kernel.startswith("decode_"):
        return ""
    received = set(re.findall(r"shfl\.sync\.\w+\.b32\s+(%r\d+)", ptx))
    unequal = [x for x in re.findall(r"fma\.\S+\s+[^;]*;", ptx) if received & set(re.findall(r"%r\d+", x))]
    return f"sums products over threads: {unequal[0]}" if unequal else ""


def unset_register(asm: Mapping[str, Any]) -> str:
    """What is wrong with how a kernel's tensor cores find tiles in shared memory, or nothing: see `unset_registers`."""
    if not re.search("wgmma|tcgen05", asm["ptx"]):
        return ""
    unset = unset_reads(disassembled(asm["cubin"]))
    return f"reads a register that nothing set: {unset[0]}" if unset else ""


def outcome(
    launch: Launch, registers: int | None, spilled: int | None, shared: int | None, seconds: float, error: str
) -> Row:
    """What the table says of a launch."""
    warps, stages = (launch.options[name] for name in ("num_warps", "num_stages"))
    names = launch.kernel, launch.case.name, launch.sm, warps, stages
    return Row(*names, registers, spilled, shared, round(seconds, 2), launch.constants, error)


def compile_all(launches: list[Launch]) -> Iterator[Row]:
    """Compile in processes of their own, some at a time: a compiler that aborts takes one of them with it.

    They are forked, since a kernel's source does not travel between processes. Rows come in the order of `launches`.
    """
    fork = multiprocessing.get_context("fork")
    # Triton asks for these once a process, to name what it keeps: a checksum of itself, the version of its ptxas.
    triton_key()
    for sm in {launch.sm for launch in launches}:
        triton.compiler.make_backend(GPUTarget("cuda", sm, 32)).hash()

    def work(launch: Launch, there: Connection) -> None:
        there.send(compiled(launch))

    done: dict[int, Row] = {}
    running: dict[Connection, tuple[int, Any, float]] = {}
    started = told = 0
    while told < len(launches):
        while started < len(launches) and len(running) < WORKERS:
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(launches[started], there))
            process.start()
            there.close()
            running[here] = started, process, time.monotonic()
            started += 1
        for here in wait(list(running)):
            number, process, start = running.pop(here)
            try:
                done[number] = here.recv()
                process.join()
            except EOFError:
                process.join()
                error = f"the compiler ended with status {process.exitcode}"
                done[number] = outcome(launches[number], None, None, None, time.monotonic() - start, error)
            here.close()
        while told in done:
            yield done.pop(told)
            told += 1


HEAD = f"{'kernel':<32} {'case':<28} {'sm':>3} {'warps':>5} {'stages':>6} {'registers':>9} {'spilled':>7} {'shared':>7}"


def line(row: Row) -> str:
    """A row as text; `-` is a number that is not known."""
    numbers = ("-" if x is None else x for x in (row.registers, row.spilled, row.shared))
    registers, spilled, shared = numbers
    text = f"{row.kernel:<32} {row.case:<28} {row.sm:>3} {row.warps:>5} {row.stages:>6} "
    return f"{text}{registers:>9} {spilled:>7} {shared:>7}{'  FAILED' if row.error else ''}"


def main() -> int:
    """Compile what was asked for, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", action="append", type=int, choices=EVERY, help="only this GPU; repeatable")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this; repeatable")
    parser.add_argument("--all", action="store_true", help="every case for every GPU, not only those it is set to")
    parser.add_argument(
        "--fewest",
        action="store_true",
        help="of all launches so few that each kernel, GPU, value of a constant and dtype is among them: half the time",
    )
    parser.add_argument("--out", type=Path, help="also write the table, with the constants, as CSV")
    arguments = parser.parse_args()

    start = time.monotonic()
    torch.set_num_threads(1)  # processes are forked below
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    everywhere = arguments.all or bool(arguments.case)
    asked = [(case, sm) for case in cases for sm in arguments.sm or EVERY if everywhere or sm in case.sms]
    recorder, failures = record(asked)
    unproven = []
    if not (arguments.case or arguments.sm):
        never = all_kernels() - {launch.kernel for launch in recorder.launches}
        failures += [f"{name}: no case launches it" for name in sorted(never)]
        unproven = unchosen(recorder, EVERY)

    launches = fewest(recorder.launches) if arguments.fewest else recorder.launches
    rows: list[Row] = []
    print(HEAD)
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        for row in compile_all(launches):
            rows.append(row)
            print(line(row), flush=True)
            if row.error:
                failures.append(f"{row.kernel}, {row.case}, sm_{row.sm}: {row.error}\n    {row.constants}")
    if arguments.out:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[field.name for field in fields(Row)], *map(astuple, rows)])
    of = f"{len(rows)} of {len(recorder.launches)}"
    print(f"\n{of} compilations in {time.monotonic() - start:.0f} s, {len(failures)} failures")
    for rule in unproven:
        print(f"no case takes this rule of the configurations: {rule}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
