"""Launch every Triton kernel on small ragged batches, for compute-sanitizer to watch.

    python .github/scripts/sanitize.py --processes 8
    compute-sanitizer --tool memcheck --error-exitcode 9 python .github/scripts/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python .github/scripts/sanitize.py --part decode

What the first leaves in Triton's cache the others need not compile, which took most of their time.

Forward, backward and decode steps, each way in which selected attention and a step can be organised, groups of 16, 4
and 1 heads, bf16 and fp32. It fails by itself where a value is not finite, or, with no part left out, where a kernel of
the package was never launched. That results are right is for the tests to say.

With TRITON_INTERPRET=1 it runs without a GPU, on smaller sizes and with fp16 in place of bf16, which is not interpreted
rightly: so it is known to work before a GPU is asked for.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from unittest.mock import patch

import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.contracts import interpreted
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.decode_testing import decode_case
from nsa_varlen.testing import gradients, poisoned_empty, random_inputs, run_ops
from public_kernels import all_kernels
from torch import Tensor
from triton.runtime.jit import KernelInterface

INTERPRETED = interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"half": torch.float16 if INTERPRETED else torch.bfloat16, "fp32": torch.float32}
GROUPS = (16, 4, 1)
KV_HEADS = 2
SMALL = BlockGeometry(kernel_size=16, kernel_stride=8, block_size=32, topk=11, window_size=40)
BLOCKS = SMALL if INTERPRETED else BlockGeometry()
HEAD_DIM = 8 if INTERPRETED else 128
MANY = BLOCKS.topk * BLOCKS.block_size + 48  # tokens: the last ones have more blocks than they may choose, so it scores
# Whole, empty, one query behind a prefix, several, more queries than keys.
LENGTHS = ([35, 0, 1, 40], [35, 5, MANY, 9]) if INTERPRETED else ([300, 0, 1, 40, 9], [300, 5, MANY, MANY, 4])
STEP = ([8, 76], [1, 2]) if INTERPRETED else ([32, 1170, 0, 540], [1, 3, 0, 1])

# Tokens that a step's tables have room for; in chunks of 16 blocks, the choice "apart" then has more than one level.
ROOM = {"apart": BLOCKS.block_size * 16 * 72}

# Seconds for autograd's thread to let go of the last graph. It wants the interpreter for that, and aborts the process
# of one that ends meanwhile: "terminate called without an active exception" (pytorch#38228).
SETTLING = 1.0

# Numbers by which operations take each organisation, whatever a file says; several chunks wherever there can be.
Numbers = dict[str, dict[str, int]]
ROWS = 16 if INTERPRETED else 64
FORWARD: dict[str, Numbers] = {
    "by-query": {"selected_attention": {"by_block": 0, "tma": 0, "rows": ROWS, "keys": 32}},
    "by-query-described": {"selected_attention": {"by_block": 0, "tma": 1, "rows": ROWS, "keys": 64}},
    "by-block": {
        "selected_attention": {"by_block": 1, "tma": 1, "rows": ROWS, "chunk_rows": 96, "programs": 2, "turns": 2}
    },
}
BACKWARD: dict[str, Numbers] = {
    "dq-by-parts": {"selected_attention_backward": {"parts": 1, "chunk_rows": 96}},
    "dq-by-query": {"selected_attention_backward": {"parts": 0, "chunk_rows": 96}},
}
WHOLE: Numbers = {
    "decode_compressed": {"splits": 1, "values": 1, "early": 0},
    "decode_choice": {"chunk": 128, "alone": 1},
    "decode_selected": {"splits": 1},
}
SPLIT: Numbers = {
    "decode_compressed": {"splits": 4, "programs": 256, "values": 1, "early": 1},
    "decode_choice": {"chunk": 16, "value_splits": 2, "value_programs": 256},
    "decode_selected": {"splits": 4, "programs": 256},
}
ADDED_FIRST: Numbers = SPLIT | {"decode_compressed": {"splits": 4, "programs": 256, "values": 2}}
DECODE: dict[str, Numbers] = {"alone": WHOLE, "apart": SPLIT, "added-first": ADDED_FIRST}
# How new rows of a step are stored, if by the step; interpreted, each organisation takes one way.
NEW = (None, "mean", "weights", "blocks")
STEPS = tuple(zip(DECODE, NEW[1:], strict=True)) if INTERPRETED else tuple(product(DECODE, NEW))


@contextmanager
def organised(numbers: Numbers) -> Iterator[None]:
    """Within, these numbers hold."""
    with ExitStack() as stack:
        for kernel, own in numbers.items():
            stack.enter_context(overridden(kernel, **own))
        yield


@contextmanager
def counted(launches: Counter[str]) -> Iterator[None]:
    """Within, launches are counted by kernel."""
    launch = KernelInterface.__getitem__

    def get(kernel: KernelInterface, grid: object) -> Callable[..., object]:
        inner = kernel
        while not hasattr(inner, "__name__"):  # what decorates one
            inner = inner.fn
        launches[inner.__name__] += 1
        return launch(kernel, grid)

    with patch.object(KernelInterface, "__getitem__", get):
        yield


def finite(name: str, *results: Tensor) -> None:
    """Raises where a value is not."""
    for x in results:
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise SystemExit(f"{name}: a value is not finite")


def forward(dtype: torch.dtype, group: int) -> None:
    """Every operation of a prefill."""
    layout = VarlenLayout.from_lengths(*LENGTHS, device=DEVICE)
    inputs = random_inputs(layout, heads=group * KV_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    for name, numbers in FORWARD.items():
        with organised(numbers), poisoned_empty():
            made = run_ops(BACKEND, inputs, layout, BLOCKS)
        finite(f"forward {name}", *(x for field, x in made._asdict().items() if not field.startswith("lse")))


def backward(dtype: torch.dtype, group: int) -> None:
    """The gradients of every operation that has some."""
    layout = VarlenLayout.from_lengths(*LENGTHS, device=DEVICE)
    inputs = random_inputs(layout, heads=group * KV_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    q, k, v, gates = inputs
    made = run_ops(BACKEND, inputs, layout, BLOCKS)
    listed, outs = made.block_indices, [made.o_cmp, made.o_slc, made.o_win]
    work: dict[str, tuple[Callable[..., object], list[Tensor], Tensor]] = {
        "compress_mean": (lambda x: BACKEND.compress_mean(x, layout, BLOCKS), [k], made.k_cmp),
        "compressed_attention": (
            lambda *x: BACKEND.compressed_attention(*x, layout, BLOCKS),
            [q, made.k_cmp, made.v_cmp],
            made.o_cmp,
        ),
        "selected_attention": (
            lambda *x: BACKEND.selected_attention(*x, listed, layout, BLOCKS),
            [q, k, v],
            made.o_slc,
        ),
        "window_attention": (lambda *x: BACKEND.window_attention(*x, layout, BLOCKS), [q, k, v], made.o_win),
        "combine": (BACKEND.combine, [gates, *outs], made.out),
    }
    for name, numbers in BACKWARD.items():
        for op, (run, leaves, grad_out) in work.items():
            if op != "selected_attention" and name != "dq-by-parts":
                continue  # the others know one organisation
            with organised(numbers), poisoned_empty():
                finite(f"backward of {op} {name}", *gradients(run, leaves, grad_out))


def decode(dtype: torch.dtype, group: int) -> None:
    """A step of several tokens, stored before or by itself."""
    sizes = {"heads": group * KV_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": dtype}
    pages = (BLOCKS.block_size,) * 3
    for name, new in STEPS:
        # `ties`: whether a choice is certified is nothing to a sanitizer.
        room = ROOM.get(name, 2048)
        case = decode_case(*STEP, BLOCKS, **sizes, pages=pages, device=DEVICE, new=new, room=room, ties=True)
        with organised(DECODE[name]):
            out, _ = case.run(BACKEND)
        finite(f"decode {name} {new}", out)


PARTS: dict[str, Callable[[torch.dtype, int], None]] = {"forward": forward, "backward": backward, "decode": decode}


def apart(asked: Iterable[tuple[str, str, int]], processes: int) -> int:
    """Launch each part, dtype and group in a process of its own, so many at a time; the exit status."""

    def run(one: tuple[str, str, int]) -> int:
        part, dtype, group = one
        words = [sys.executable, __file__, "--part", part, "--dtype", dtype, "--group", str(group)]
        done = subprocess.run(words, capture_output=True, text=True)
        print(done.stdout.partition("\n")[0] if done.returncode == 0 else done.stdout + done.stderr, flush=True)
        return done.returncode

    with ThreadPoolExecutor(processes) as pool:
        return int(any(list(pool.map(run, asked))))


def main(words: list[str] | None = None) -> int:
    """Launch what was asked for, print how often each kernel ran, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--group", action="append", type=int, choices=GROUPS, help="only this; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this; repeatable")
    parser.add_argument("--processes", type=int, metavar="N", help="each by itself, N at a time, for Triton's cache")
    arguments = parser.parse_args(words)
    if not INTERPRETED and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device or TRITON_INTERPRET=1")
    asked = product(arguments.part or PARTS, arguments.dtype or DTYPES, arguments.group or GROUPS)
    if arguments.processes is not None:
        if arguments.processes < 1:
            raise SystemExit(f"--processes: expected at least 1, got {arguments.processes}")
        return apart(asked, arguments.processes)
    launches: Counter[str] = Counter()
    with counted(launches):
        for part, dtype, group in asked:
            start = time.monotonic()
            PARTS[part](DTYPES[dtype], group)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"{part}, {dtype}, groups of {group}: {time.monotonic() - start:.1f} s", flush=True)
    if DEVICE == "cuda":
        time.sleep(SETTLING)
    for kernel, number in sorted(launches.items()):
        print(f"{number:6} {kernel}")
    never = set() if arguments.part else all_kernels() - launches.keys()
    for kernel in sorted(never):
        print(f"FAILED: {kernel} was never launched")
    return int(bool(never))


if __name__ == "__main__":
    sys.exit(main())
