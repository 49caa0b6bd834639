"""Operations of a backend one by one, forward and backward, over sequences of one length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa_varlen.benchmarks.inputs import smooth_queries
from nsa_varlen.benchmarks.machine import DTYPES, environment, problem
from nsa_varlen.benchmarks.operation_checks import CHECKED, check_backward, check_forward
from nsa_varlen.benchmarks.operation_costs import backward_cost, forward_cost
from nsa_varlen.benchmarks.workload import Value, Workload
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.op_inputs import op_inputs
from nsa_varlen.sdpa import BACKEND

GEOMETRY: dict[str, Value] = asdict(BlockGeometry())
SIZES: dict[str, Value] = {
    "S": 4096,
    "batch": 1,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "dtype": "float32",
    "pass": "forward",
    "inputs": "random",
}
PASSES = ("forward", "backward")
INPUTS = ("random", "smooth")
WITHOUT_GRADIENTS = ("select_blocks", "decode_attention")
ABOUT = {
    "compress_mean": "pooling of keys, or of values",
    "compressed_attention": "attention to the compressed blocks",
    "select_blocks": "choice of blocks, given the log-sum-exp",
    "selected_attention": "attention to the chosen blocks",
    "window_attention": "attention to the last keys",
    "combine": "sum of the branches by gates",
    "decode_attention": "all branches of one token a sequence, nothing stored",
}
OF_NEIGHBOURS = ("compressed_attention", "select_blocks", "selected_attention", "window_attention")  # with many queries


@dataclass(frozen=True)
class Call:
    """An operation with its arguments, and for a backward what a forward left.

    Fields:
        parameters: what the workload was asked for; seed: with what it was made.
        out, grad_out: of the forward its output, the first of several, and a unit normal gradient of it; None if the
            forward is what is timed.
    """

    backend: Any
    op: str
    args: tuple[Any, ...]
    parameters: Mapping[str, Value]
    device: str
    seed: int
    out: Tensor | None = None
    grad_out: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [x for x in self.args if isinstance(x, Tensor) and x.requires_grad]

    def __call__(self, _: int = 0) -> Any:
        """The operation's result, or the gradients of `leaves`."""
        if self.out is None:
            with torch.no_grad():
                return getattr(self.backend, self.op)(*self.args)
        return torch.autograd.grad(self.out, self.leaves(), self.grad_out, retain_graph=True)


def make_call(backend: Any, op: str, device: str, seed: int, **parameters: Value) -> Call:
    """The operation over `batch` sequences of S tokens; in the backward its forward has run, once.

    What earlier operations make is made by backend sdpa. Random queries are independent, so that neighbours choose
    unrelated blocks; "smooth" ones choose much the same: see `smooth_queries`.
    """
    tokens, batch, heads, head_dim = (int(parameters[name]) for name in ("S", "batch", "num_heads", "head_dim"))
    dtype = getattr(torch, str(parameters["dtype"]))
    args, _ = op_inputs(
        op,
        [1 if op == "decode_attention" else tokens] * batch,
        [tokens] * batch,
        num_heads=heads,
        num_kv_heads=int(parameters["num_kv_heads"]),
        head_dim=head_dim,
        blocks={name: int(parameters[name]) for name in GEOMETRY},
        dtype=dtype,
        device=device,
        seed=seed,
    )
    if parameters["inputs"] == "smooth":
        q = smooth_queries(batch, tokens, heads, head_dim, dtype=dtype, device=device, seed=seed)
        args = _with_queries(op, q, args)
    call = partial(Call, backend, op, parameters=parameters, device=device, seed=seed)
    if parameters["pass"] == "forward":
        return call(args)
    args = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    with torch.enable_grad():
        result = getattr(backend, op)(*args)
    out = result[0] if isinstance(result, tuple) else result
    generator = torch.Generator(device).manual_seed(seed + 1)
    return call(args, out=out, grad_out=torch.randn(out.shape, generator=generator, dtype=out.dtype, device=device))


def _with_queries(op: str, q: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with other queries, and with what follows from them."""
    with torch.no_grad():
        _, k, *rest, layout, blocks = args
        if op in ("select_blocks", "selected_attention"):
            k_cmp = k if op == "select_blocks" else BACKEND.compress_mean(k, layout, blocks)
            _, lse = BACKEND.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
            rest = [lse] if op == "select_blocks" else [rest[0], BACKEND.select_blocks(q, k_cmp, lse, layout, blocks)]
    return q, k, *rest, layout, blocks


def refuse(backend: Any, op: str, device: str, **parameters: Value) -> str | None:
    """Why the operation does not run there: what nobody implements, or what the backend says."""
    for name, known in (("dtype", DTYPES), ("pass", PASSES), ("inputs", INPUTS)):
        if parameters[name] not in known:
            return f"{name}: expected one of {list(known)}, got {parameters[name]!r}"
    backward = parameters["pass"] == "backward"
    if backward and op in WITHOUT_GRADIENTS:
        return f"{op} has no gradients"
    if parameters["inputs"] == "smooth" and op not in OF_NEIGHBOURS:
        return f"{op} has no neighbouring queries"
    asked = problem(device, parameters, needs_grad=backward, deterministic=False, paged=op == "decode_attention")
    reason: str | None = backend.refuse(op, asked, environment(device))
    return reason


def cost(op: str, **parameters: Value) -> tuple[float, float]:
    """(flops, bytes) of a call: each tensor once."""
    return (backward_cost if parameters["pass"] == "backward" else forward_cost)(op, parameters)


def check(state: Call, results: Sequence[Any]) -> str:
    """The last rows of the last sequence against the oracle, or all of a short one.

    Gradients of a sequence of more than CHECKED tokens are the oracle's in its last rows; those of all rows are held
    against it in a second problem, of CHECKED tokens, that differs in nothing else.

    Raises:
        AssertionError: a result is off.
    """
    if state.out is None:
        return check_forward(state.op, state.args, results[0])
    assert state.grad_out is not None
    words = check_backward(state.op, state.args, state.grad_out, results[0])
    if int(state.parameters["S"]) <= CHECKED:
        return words
    parameters = {**state.parameters, "S": CHECKED, "batch": 1}
    other = make_call(state.backend, state.op, state.device, state.seed, **parameters)
    assert other.grad_out is not None
    whole = check_backward(state.op, other.args, other.grad_out, other())
    return f"{words}; of {CHECKED} tokens: {whole}"


def stages(state: Call) -> dict[str, Callable[[int], Any]]:
    """Of a decode step the stages that its backend can run apart."""
    if state.op != "decode_attention" or not hasattr(state.backend, "decode_stages"):
        return {}
    return {name: partial(_run, stage) for name, stage in state.backend.decode_stages(*state.args).items()}


def _run(stage: Callable[[], Any], _: int) -> Any:
    return stage()


def op_workloads(backend: Any, ops: Sequence[str] | None = None, **defaults: Value) -> list[Workload]:
    """One workload for each operation that a backend implements, named `backend.op`.

    Args:
        backend: an object of the entry point group `nsa.backends`.
        ops: of those, the ones that it ever runs; None is all that it has.
        defaults: of parameters, where they differ from SIZES and GEOMETRY.

    Example:
        >>> [workload.name for workload in op_workloads(BACKEND)][:2]
        ['sdpa.compress_mean', 'sdpa.compressed_attention']
    """
    return [
        Workload(
            f"{backend.name}.{op}",
            ABOUT[op],
            SIZES | GEOMETRY | defaults,
            setup=partial(make_call, backend, op),
            call=Call.__call__,
            cost=partial(cost, op),
            check=check,
            facts=lambda state: {"backend": state.backend.name, "why": "requested"},
            refuse=partial(refuse, backend, op),
            parts=stages,
        )
        for op in ABOUT
        if (hasattr(backend, op) if ops is None else op in ops)
    ]


def workloads() -> list[Workload]:
    """Those of backend sdpa."""
    return op_workloads(BACKEND)
