"""A batch of equally long sequences prefilled whole: pooling, all three branches, combine; with gradients: training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.benchmarks import dense
from nsa_varlen.benchmarks.checking import ROWS, attended, check_chosen, check_pooled, check_rows, within
from nsa_varlen.benchmarks.inputs import smooth_queries
from nsa_varlen.benchmarks.operations import GEOMETRY, INPUTS
from nsa_varlen.benchmarks.sizes import seen_compressed, seen_selected, seen_window
from nsa_varlen.benchmarks.workload import Value, Workload
from torch import Tensor

from nsa import ops
from nsa.attention import nsa_attention
from nsa.benchmarks import routes
from nsa.reads import count_reads

OPS = ("compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine")
SIZES: dict[str, Value] = {**dense.PARAMETERS, "backend": routes.AUTO}
UNCHOSEN = 256  # tokens of the sequence whose gradients are checked in full, beside those that topk blocks hold


def geometry(parameters: Mapping[str, Value]) -> BlockGeometry:
    """The block sizes among a workload's parameters."""
    return BlockGeometry(**{name: int(parameters[name]) for name in GEOMETRY})


class Batch:
    """Inputs of a prefill: unit normal q, k and v, gates in (0, 1); k and v serve all branches.

    Neighbouring queries are independent, so they choose unrelated blocks, the hardest case for kernels that share them;
    with `inputs="smooth"` they choose much the same, as those of a model do: see `smooth_queries`.
    """

    def __init__(self, device: str, seed: int, **parameters: Any) -> None:
        self.parameters, self.device, self.blocks = parameters, device, geometry(parameters)
        self.backend = routes.name_of(parameters["backend"])
        self.tokens, batch, heads, kv_heads, dim = (
            int(parameters[name]) for name in ("S", "batch", "num_heads", "num_kv_heads", "head_dim")
        )
        self.layout = VarlenLayout.from_lengths([self.tokens] * batch, device=device)
        self.layout.compressed(self.blocks)
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, str(parameters["dtype"]))
        normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        total = self.layout.total_q
        self.q = normal(total, heads, dim)
        if parameters["inputs"] == "smooth":
            self.q = smooth_queries(batch, self.tokens, heads, dim, dtype=dtype, device=device, seed=seed)
        self.k, self.v = (normal(total, kv_heads, dim) for _ in "kv")
        self.gates = normal(total, heads, 3).sigmoid()
        self.grad_out = normal(total, heads, dim) if parameters["direction"] == "training" else None

    def run(self) -> tuple[Tensor, ...]:
        """(out, block_indices), and the gradients of q, k, v and the gates where there are some."""
        leaves = [self.q, self.k, self.v, self.gates]
        if self.grad_out is None:
            return self.forward(*leaves)
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():
            out, indices = self.forward(*leaves)
            return (out.detach(), indices, *torch.autograd.grad(out, leaves, self.grad_out))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """(out, block_indices)."""
        layout, blocks, backend = self.layout, self.blocks, self.backend
        k_cmp, v_cmp = (ops.compress_mean(x, layout, blocks, backend=backend) for x in (k, v))
        out, aux = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, layout, blocks, return_aux=True, backend=backend)
        return out, aux.block_indices

    def parts(self) -> dict[str, Callable[[int], Any]]:
        """Each operation by itself, on what the ones before it made; in training with its gradients."""
        layout, blocks, backend = self.layout, self.blocks, self.backend
        q, k, v, gates = self.q, self.k, self.v, self.gates

        def pooled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(ops.compress_mean(z, layout, blocks, backend=backend) for z in (x, y))  # type: ignore[return-value]

        k_cmp, v_cmp = pooled(k, v)
        cmp = partial(ops.compressed_attention, layout=layout, blocks=blocks, backend=backend)
        o_cmp, lse = cmp(q, k_cmp, v_cmp)
        choice = partial(ops.select_blocks, q, k_cmp, lse, layout, blocks, backend=backend)
        indices = choice()

        def sel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return ops.selected_attention(q, k, v, indices, layout, blocks, backend=backend)

        win = partial(ops.window_attention, layout=layout, blocks=blocks, backend=backend)
        outputs = o_cmp, sel(q, k, v)[0], win(q, k, v)[0]
        combine = partial(ops.combine, backend=backend)
        return {
            "compress": self._timed(pooled, k, v),
            "cmp": self._timed(cmp, q, k_cmp, v_cmp),
            "choice": lambda _: choice(),
            "sel": self._timed(sel, q, k, v),
            "win": self._timed(win, q, k, v),
            "combine": self._timed(combine, gates, *outputs),
        }

    def _timed(self, run: Callable[..., Any], *inputs: Tensor) -> Callable[[int], Any]:
        """A part, with the gradients of its inputs in training."""
        if self.grad_out is None:
            return lambda _: run(*inputs)

        def both(_: int) -> Any:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                found = run(*leaves)
            outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
            return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

        return both

    def check(self, results: Sequence[tuple[Tensor, ...]]) -> str:
        """Rows of the last sequence's end and of the first one's middle against the oracle, and their gradients.

        Everything has to be finite. The gradients are held against the oracle's in full on a shorter sequence.
        """
        out, indices, *grads = results[0]
        for name, x in zip(("out", "dq", "dk", "dv", "dgates"), (out, *grads), strict=False):
            if not bool(torch.isfinite(x).all()):
                raise AssertionError(f"{name}: expected finite values, got others")
        pooled = [ops.compress_mean(x, self.layout, self.blocks, backend=self.backend) for x in (self.k, self.v)]
        last, middle = self.layout.batch_size - 1, max(1, self.tokens // 2)
        said = []
        for sequence, end, about in ((last, self.tokens, "last"), (0, middle, "middle")):
            kv, rows = self._until(sequence, end, pooled)
            about = f"{about} {rows.stop - rows.start} rows"
            q, gates = self.q[rows], self.gates[rows]
            said.append(check_rows(out[rows], indices[rows], q, kv, gates, self.blocks, about))
            if grads:
                self._check_row_gradients(rows, kv, indices[rows], (grads[0][rows], grads[3][rows]), about)
        words = "; ".join(said)
        return f"{words}; {self._check_gradients()}" if grads else words

    def _until(self, sequence: int, end: int, pooled: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], slice]:
        """(rows of cmp, slc and win of a sequence up to token `end`, where a batch has the last ROWS queries)."""
        begin, count = sequence * self.tokens, self.blocks.num_compressed(self.tokens)
        k, v = (x[begin : begin + end] for x in (self.k, self.v))
        k_cmp, v_cmp = (x[sequence * count :][: self.blocks.num_compressed(end)] for x in pooled)
        for name, rows, raw in (("k_cmp", k_cmp, k), ("v_cmp", v_cmp, v)):
            check_pooled(rows, raw, self.blocks, name)
        return (k_cmp, v_cmp, k, v, k, v), slice(begin + max(0, end - ROWS), begin + end)

    def _check_row_gradients(
        self, rows: slice, kv: Sequence[Tensor], indices: Tensor, found: Sequence[Tensor], about: str
    ) -> None:
        """dq and dgates of some rows, which no other rows add to."""
        assert self.grad_out is not None
        above, dtype = self.grad_out[rows], self.q.dtype
        layout = VarlenLayout.from_lengths([len(above)], [len(kv[2])], self.q.device)

        def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = [x[rows].detach().to(dtype).requires_grad_() for x in (self.q, self.gates)]
            with torch.enable_grad():
                out = attended(leaves[0], kv, leaves[1], indices, layout, self.blocks, dtype)
                return torch.autograd.grad(out, leaves, above.to(dtype))

        for name, x, y, z in zip(("dq", "dgates"), found, expected(dtype), expected(torch.float64), strict=True):
            within(x, lambda y=y: y, z, f"{name} of {about}")  # type: ignore[misc]

    def _check_gradients(self) -> str:
        """All gradients of a short sequence, by the same backends, against those of the oracle in fp64."""
        tokens = min(self.tokens, self.blocks.topk * self.blocks.block_size + UNCHOSEN)
        short = Batch(self.device, 1, **{**self.parameters, "S": tokens, "batch": 1})
        _, indices, *found = short.run()
        k_cmp = ops.compress_mean(short.k, short.layout, short.blocks, backend=short.backend)
        check_chosen(indices, short.q, k_cmp, short.layout, short.blocks, "the sequence with gradients")
        exact, plain = (short.exact_gradients(indices, dtype) for dtype in (torch.float64, short.q.dtype))
        names = ("dq", "dk", "dv", "dgates")
        words = [within(x, lambda y=y: y, z, name) for name, x, y, z in zip(names, found, plain, exact, strict=True)]  # type: ignore[misc]
        return f"{short.tokens} tokens: {', '.join(words)}"

    def exact_gradients(self, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Gradients of the oracle in fp64, else of plain torch in `dtype`, for given blocks."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v, self.gates)]
        assert self.grad_out is not None
        with torch.enable_grad():
            q, k, v, gates = leaves
            pooled = [reference.compress_mean(x.double(), self.layout, self.blocks).to(dtype) for x in (k, v)]
            out = attended(q, (*pooled, k, v, k, v), gates, indices, self.layout, self.blocks, dtype)
            return torch.autograd.grad(out, leaves, self.grad_out.to(dtype))

    def facts(self) -> dict[str, Value]:
        """Route and reads."""
        _, indices = self.forward(self.q, self.k, self.v, self.gates)
        actual = int(count_reads(indices, self.layout, self.blocks).total.sum())
        per_sequence = sum(self.blocks.reads(t) for t in range(1, self.tokens + 1))
        expected = per_sequence * self.layout.batch_size * self.k.shape[1]
        found = routes.facts(OPS, layer(self.device, **self.parameters), self.parameters["backend"])
        return found | {"reads_actual": actual, "reads_expected": expected}


def layer(device: str, S: int, **sizes: Any) -> Any:
    """The problem of a prefill of S tokens."""
    return routes.layer_of(device, S, S, **sizes)


def cost(S: int, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, **others: Any) -> Any:
    """(flops, bytes): products of pairs that are seen, compressed keys twice; q, k, v, gates and out once.

    The backward has five products for each two of the forward, and for those of attention alone; it reads and writes
    the gradients of everything.
    """
    blocks = geometry(others)
    seen = seen_compressed(S, blocks), seen_selected(S, blocks), seen_window(S, blocks.window_size)
    attention = 4.0 * head_dim * batch * num_heads * sum(seen)
    scores = 2.0 * head_dim * batch * num_heads * seen[0]
    itemsize = getattr(torch, dtype).itemsize
    rows = batch * S * (2 * num_heads + 2 * num_kv_heads)
    size = itemsize * (head_dim * rows + 3 * batch * S * num_heads)
    if others.get("direction") == "training":
        return 3.5 * attention + scores, 3.0 * size
    return attention + scores, float(size)


def workloads() -> list[Workload]:
    """Forward, and forward with backward."""
    return [_workload("nsa.prefill", "forward"), _workload("nsa.train", "training")]


def _workload(name: str, direction: str) -> Workload:
    about = "one forward of a batch of equally long sequences"
    if direction == "training":
        about = "forward and backward of the same"
    given: dict[str, Any] = {"direction": direction}

    def refuse(device: str, **parameters: Any) -> str | None:
        if parameters["inputs"] not in INPUTS:
            return f"inputs: expected one of {list(INPUTS)}, got {parameters['inputs']!r}"
        return routes.refusal(OPS, layer(device, **parameters, **given), parameters["backend"])

    return Workload(
        name,
        about,
        SIZES | {"inputs": "random"} | GEOMETRY,
        setup=lambda device, seed, **parameters: Batch(device, seed, **parameters, **given),
        call=lambda state, _: state.run(),
        cost=lambda **parameters: cost(**parameters, **given),
        check=lambda state, results: state.check(results),
        facts=lambda state: state.facts(),
        refuse=refuse,
        parts=lambda state: state.parts(),
    )
