"""Dense attention over the same tokens, by torch: what sparse attention has to be faster than."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_varlen import reference
from nsa_varlen.benchmarks.checking import ROWS, within
from nsa_varlen.benchmarks.sizes import seen_window
from nsa_varlen.benchmarks.workload import Value, Workload
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.testing import plain_attention

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
CHECKED = 1024  # tokens whose gradients are checked in full
STEPS = 16  # decode steps of a sample, at S + 1 ... S + 16 tokens
PARAMETERS: dict[str, Value] = {
    "S": 4096,
    "batch": 1,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "dtype": "float32",
    "backend": "sdpa",
}
BACKENDS = {
    "sdpa": "torch's scaled_dot_product_attention, heads in groups; torch chooses the kernel",
    "grouped": "the same, the queries of a group as rows (decode)",
    "cudnn": "cuDNN through scaled_dot_product_attention",
    "flash": "FlashAttention-2 through scaled_dot_product_attention",
}


class Point(NamedTuple):
    """q [B, Sq, Hq, D] over k, v [B, S, Hk, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    backend: str


def make_point(device: str, seed: int, queries: int, keys: int, **sizes: Any) -> Point:
    """Unit normal q, k and v."""
    batch, heads, kv_heads, dim = (int(sizes[name]) for name in ("batch", "num_heads", "num_kv_heads", "head_dim"))
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, str(sizes["dtype"]))
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    q = normal(batch, queries, heads, dim)
    k, v = (normal(batch, keys, kv_heads, dim) for _ in "kv")
    return Point(q, k, v, str(sizes["backend"]))


def check_dense(out: Tensor, q: Tensor, k: Tensor, v: Tensor, about: str) -> str:
    """The last queries q [R, Hq, D] of one sequence over its k, v [S, Hk, D], against the oracle.

    Raises:
        AssertionError: `out` [R, Hq, D] is further off than its dtype allows.
    """
    layout = VarlenLayout.from_lengths([len(q)], [len(k)], q.device)
    everything = BlockGeometry(window_size=len(k))
    exact, _ = reference.window_attention(q.double(), k.double(), v.double(), layout, everything)
    seen = (layout.key_positions() <= layout.positions()[:, None])[:, None]
    return within(out, lambda: plain_attention(q, k, v, seen), exact, about)


def prefill_cost(S: int, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, **_: Any) -> Any:
    """(flops, bytes) of causal attention: each tensor once."""
    itemsize = getattr(torch, dtype).itemsize
    pairs = batch * num_heads * seen_window(S, S)
    return 4.0 * head_dim * pairs, 2.0 * itemsize * head_dim * batch * S * (num_heads + num_kv_heads)


def decode_cost(S: int, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, **_: Any) -> Any:
    """(flops, bytes) of a step over all keys, on average over the steps of a sample."""
    itemsize, keys = getattr(torch, dtype).itemsize, S + (STEPS + 1) / 2
    flops = 4.0 * head_dim * batch * num_heads * keys
    return flops, 2.0 * itemsize * head_dim * batch * (num_heads + num_kv_heads * keys)


def refuse(device: str, **parameters: Any) -> str | None:
    """Why a backend of dense attention does not run there."""
    backend = parameters["backend"]
    if backend not in BACKENDS:
        return f"backend: expected one of {list(BACKENDS)}, got {backend!r}"
    if backend in ("cudnn", "flash") and (device != "cuda" or parameters["dtype"] not in ("float16", "bfloat16")):
        return f"{backend} needs a CUDA device and half precision"
    return None


def _kernel(backend: str) -> AbstractContextManager[Any]:
    if backend not in ("cudnn", "flash"):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.FLASH_ATTENTION)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """[B, H, T, D]. Before torch 2.5 there is no `enable_gqa`: keys and values are then repeated, in the time, too."""
    if TORCH < (2, 5):
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def _prefill(point: Point, _: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in point[:3])
    with _kernel(point.backend):
        return _grouped_attention(q, k, v, is_causal=True).transpose(1, 2)


def check_prefill(point: Point, results: Sequence[Tensor]) -> str:
    """The last rows of the last sequence, and some in the middle of the first; everything has to be finite."""
    out, tokens = results[0], point.q.shape[1]
    _check_finite("out", out)
    said = []
    for sequence, end, about in ((len(out) - 1, tokens, "last"), (0, max(1, tokens // 2), "middle")):
        rows = slice(max(0, end - ROWS), end)
        q, k, v = point.q[sequence, rows], point.k[sequence, :end], point.v[sequence, :end]
        said.append(check_dense(out[sequence, rows], q, k, v, f"{about} {len(q)} rows"))
    return "; ".join(said)


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise AssertionError(f"{name}: expected finite values, got others")


def _train(point: Point, _: int) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) for a gradient of out that is q."""
    leaves = [x.detach().requires_grad_() for x in point[:3]]
    with torch.enable_grad():
        out = _prefill(point._replace(q=leaves[0], k=leaves[1], v=leaves[2]), 0)
        return (out.detach(), *torch.autograd.grad(out, leaves, point.q))


def _check_train(point: Point, results: Sequence[tuple[Tensor, ...]]) -> str:
    """Rows of the output, gradients that are finite; those of CHECKED tokens in full."""
    words = check_prefill(point, [results[0][0]])
    for name, x in zip(("dq", "dk", "dv"), results[0][1:], strict=True):
        _check_finite(name, x)
    short = point._replace(**{name: getattr(point, name)[-1:, :CHECKED] for name in "qkv"})
    _, *found = _train(short, 0)
    exact, plain = (_dense_gradients(short, dtype) for dtype in (torch.float64, point.q.dtype))
    named = zip(("dq", "dk", "dv"), found, plain, exact, strict=True)
    told = [within(x, lambda y=y: y, z, name) for name, x, y, z in named]  # type: ignore[misc]
    return f"{words}; {short.q.shape[1]} tokens: {', '.join(told)}"


def _dense_gradients(point: Point, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of one sequence, by plain torch in a dtype: a head of k and v for each of q, as torch does it, then summed."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in point[:3]]
    seen = torch.ones(point.q.shape[1], point.q.shape[1], dtype=torch.bool, device=point.q.device).tril()
    with torch.enable_grad():
        q, k, v = (x[0] for x in leaves)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for x in (k, v))
        out = plain_attention(q, k, v, seen[:, None])
        return torch.autograd.grad(out[None], leaves, point.q.to(dtype))


def train_cost(**parameters: Any) -> tuple[float, float]:
    """(flops, bytes): five products of the backward for two of the forward; everything and its gradient moved."""
    flops, size = prefill_cost(**parameters)
    return 3.5 * flops, 3.0 * size


def _decode(point: Point, index: int) -> Tensor:
    """One query a sequence over its first tokens, S + 1 + index of them."""
    length = point.k.shape[1] - STEPS + 1 + index
    q, k, v = (x.transpose(1, 2) for x in (point.q[:, index : index + 1], point.k[:, :length], point.v[:, :length]))
    if point.backend == "grouped":
        rows = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
        return scaled_dot_product_attention(rows, k, v).reshape(q.shape).transpose(1, 2)
    with _kernel(point.backend):
        return _grouped_attention(q, k, v).transpose(1, 2)


def check_decode(point: Point, results: Sequence[Tensor]) -> str:
    """First and last step of the last sequence, and one of the first; everything has to be finite."""
    for index, out in enumerate(results):
        _check_finite(f"step {index}", out)
    words, last = "", len(point.q) - 1
    for sequence, index in ((0, STEPS // 2), (last, 0), (last, STEPS - 1)):
        length = point.k.shape[1] - STEPS + 1 + index
        k, v = point.k[sequence, :length], point.v[sequence, :length]
        q = point.q[sequence, index : index + 1]
        words = check_dense(results[index][sequence], q, k, v, f"step {index} of sequence {sequence}")
    return words


def dense_facts(point: Point) -> dict[str, Value]:
    """What a row says of an anchor: every key is read."""
    return {"backend": point.backend, "why": "requested"}


def decode_facts(point: Point) -> dict[str, Value]:
    """Keys that the steps read, over sequences and kv heads."""
    batch, keys, kv_heads, _ = point.k.shape
    read = batch * kv_heads * sum(range(keys - STEPS + 1, keys + 1))
    return dense_facts(point) | {"reads_actual_decode": read, "reads_expected_decode": read}


def workloads() -> list[Workload]:
    """Prefill, training and decode."""
    return [
        Workload(
            "dense.prefill",
            "causal attention over all tokens",
            PARAMETERS,
            setup=lambda device, seed, S, **sizes: make_point(device, seed, S, S, **sizes),
            call=_prefill,
            cost=prefill_cost,
            check=check_prefill,
            facts=dense_facts,
            refuse=refuse,
        ),
        Workload(
            "dense.train",
            "forward and backward of the same",
            PARAMETERS,
            setup=lambda device, seed, S, **sizes: make_point(device, seed, S, S, **sizes),
            call=_train,
            cost=train_cost,
            check=_check_train,
            facts=dense_facts,
            refuse=refuse,
        ),
        Workload(
            "dense.decode",
            "one query a sequence over all its tokens, nothing stored",
            PARAMETERS,
            setup=lambda device, seed, S, **sizes: make_point(device, seed, STEPS, S + STEPS, **sizes),
            call=_decode,
            cost=decode_cost,
            check=check_decode,
            facts=decode_facts,
            refuse=refuse,
            calls=STEPS,
        ),
    ]
