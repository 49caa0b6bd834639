"""Whether an operation's result, or its gradients, are the oracle's.

The last rows of a sequence are a problem of their own: queries that stand at the end of all its keys. So a few rows of
a long one can be looked at without the others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_varlen import masks, reference
from nsa_varlen.benchmarks.checking import ROWS, check_chosen, check_pooled, check_rows, within
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.testing import gradient_bounds, gradients, plain_attention

WHOLE = 256  # tokens of a sequence whose results are looked at in all rows
CHECKED = 2048  # and of one whose gradients are: more than topk blocks hold


class Attention(NamedTuple):
    """The last rows of the last sequence of an attention operation.

    Fields:
        q [R, Hq, D], k and v [keys, Hk, D] of the whole sequence, indices [R, Hk, N] or None.
        own: how many of the last keys no earlier query sees: their gradients come from these rows alone.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor | None
    layout: VarlenLayout
    blocks: BlockGeometry
    own: int

    @classmethod
    def of(cls, op: str, args: tuple[Any, ...], rows: int) -> "Attention":
        """`rows` of an operation's arguments."""
        q, k, v, *indices, layout, blocks = args
        tokens, keys, own = layout.max_seqlen_k, layout.max_seqlen_k, rows
        if op == "compressed_attention":
            keys = blocks.num_compressed(tokens)
            own = keys - blocks.num_compressed(tokens - rows)
        some = [last(x.detach(), rows) for x in (q, *indices)]
        small = VarlenLayout.from_lengths([rows], [tokens], layout.device)
        chosen = some[1] if indices else None
        return cls(op, some[0], last(k.detach(), keys), last(v.detach(), keys), chosen, small, blocks, own)

    def of_head(self, head: int) -> "Attention":
        """One kv head with its queries."""
        group, one = self.q.shape[1] // self.k.shape[1], slice(head, head + 1)
        indices = None if self.indices is None else self.indices[:, one]
        q = self.q[:, head * group : (head + 1) * group]
        return self._replace(q=q, k=self.k[:, one], v=self.v[:, one], indices=indices)

    def mask(self) -> Tensor:
        """[R, Hk or 1, keys]: which key each query sees."""
        if self.indices is not None:
            return masks.selected_mask(self.indices, self.layout, self.blocks)
        seen = masks.compressed_mask if self.op == "compressed_attention" else masks.window_mask
        return seen(self.layout, self.blocks)[:, None]

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle's (out, lse)."""
        found: tuple[Tensor, Tensor] = getattr(reference, self.op)(
            *(q, k, v, *(() if self.indices is None else (self.indices,)), self.layout, self.blocks)
        )
        return found

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain torch's out, in the dtype of its arguments."""
        return plain_attention(q, k, v, self.mask())


def last(x: Tensor, count: int) -> Tensor:
    """The last `count` rows, which may be none."""
    return x[len(x) - count :]


def check_forward(op: str, args: tuple[Any, ...], result: Any) -> str:
    """An operation's result in the last sequence: in ROWS rows, in all of one of up to WHOLE tokens.

    Everywhere else values have to be finite, and block indices numbers of blocks.

    Raises:
        AssertionError: a value is off by more than its dtype allows, or a block is chosen that is not among the best.
    """
    _check_sound(op, args, result)
    if op == "decode_attention":
        return _check_decode(args, result)
    if op == "combine":
        rows = min(ROWS, len(args[0]))
        parts = [last(x.detach(), rows) for x in args]
        exact = reference.combine(*(x.double() for x in parts))
        return within(last(result, rows), lambda: _plain_sum(*parts), exact, f"out of the last {rows} rows")
    layout, blocks = args[-2:]
    tokens = layout.max_seqlen_k
    if op == "compress_mean":
        count = blocks.num_compressed(tokens)
        check_pooled(last(result, count), last(args[0].detach(), tokens), blocks, f"means of {tokens} tokens")
        return f"means of {tokens} tokens rounded once"
    rows = tokens if tokens <= WHOLE else ROWS
    about = f"the last {rows} rows"
    if op == "select_blocks":
        small = VarlenLayout.from_lengths([rows], [tokens], layout.device)
        k_cmp = last(args[1], blocks.num_compressed(tokens))
        check_chosen(last(result, rows), last(args[0], rows), k_cmp, small, blocks, about)
        return f"block_indices of {about} as the oracle's, or tied with them"
    asked = Attention.of(op, args, rows)
    heads = [asked.of_head(head) for head in range(asked.k.shape[1])]  # one at a time, for the memory
    found = [one.exact(one.q.double(), one.k.double(), one.v.double()) for one in heads]
    out, lse = result
    if lse is not None:  # a peer that has none
        _check_lse(asked, lse[:, lse.shape[1] - rows :], torch.cat([x for _, x in found]), about)

    def plain() -> Tensor:
        return torch.cat([one.plain(one.q, one.k, one.v) for one in heads], 1)

    return within(last(out, rows), plain, torch.cat([x for x, _ in found], 1), f"out of {about}")


def _check_sound(op: str, args: tuple[Any, ...], result: Any) -> None:
    """No NaN, no infinity but the log-sum-exp of nothing, no block that there is not, in any sequence."""
    for place, x in enumerate(result if isinstance(result, tuple) else (result,)):
        if x is None:  # a peer that has no lse
            continue
        if x.is_floating_point():
            sound = x.isfinite() | (x == -torch.inf) if place else x.isfinite()
            words = "finite values"
        else:
            decodes = op == "decode_attention"
            tokens = args[3].block_table.shape[1] * args[3].page_size if decodes else args[-2].max_seqlen_k
            number = args[-1].num_blocks(tokens)
            sound, words = (x >= -1) & (x < number), f"blocks of {number}, or -1"
        if not bool(sound.all()):
            raise AssertionError(f"{op}: expected {words}, got others")


def _check_lse(asked: Attention, lse: Tensor, exact: Tensor, about: str) -> None:
    """Within the rounding of fp32, u = 2^-24, that of dot products of Dk terms, of exp and of the sum over all keys.

    Products of halves are exact.
    """
    seen = exact > -torch.inf
    q, k = (float(torch.nn.functional.pad(x.double().norm(dim=-1).flatten(), (0, 1)).max()) for x in (asked.q, asked.k))
    dim = asked.q.shape[-1]
    bound = 2.0**-24 * ((2 * dim + 8) * q * k * dim**-0.5 + len(asked.k) + 16)
    if not torch.equal(lse > -torch.inf, seen) or not bool(((lse - exact)[seen].abs() <= bound).all()):
        raise AssertionError(f"lse of {about}: expected the oracle's within {bound:.1e}, got others")


def _plain_sum(gates: Tensor, *outputs: Tensor) -> Tensor:
    return torch.einsum("thc,cthd->thd", gates, torch.stack(outputs))


def _check_decode(args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> str:
    q, *pages, gates, _, blocks = args
    sequence, (out, indices) = len(q) - 1, result
    kv = []
    for x in pages:
        position = torch.arange(int(x.lengths[sequence]), device=q.device)
        kv.append(x.rows(torch.full_like(position, sequence), position))
    return check_rows(out[-1], indices[-1], q[-1], kv, gates[-1], blocks, f"sequence {sequence}")


@torch.enable_grad()
def check_backward(op: str, args: tuple[Any, ...], grad_out: Tensor, found: Sequence[Tensor]) -> str:
    """An operation's gradients in the last sequence: of ROWS rows, of all of one of up to CHECKED tokens.

    Args:
        grad_out: of the output.
        found: gradients of the floating-point arguments.

    Raises:
        AssertionError: a value is off by more than its dtype allows, or one anywhere is not finite.
    """
    for x in found:
        if not bool(x.isfinite().all()):
            raise AssertionError(f"gradients of {op}: expected finite values, got others")
    if op == "combine":
        rows = min(ROWS, len(args[0]))
        parts, above = [last(x.detach(), rows) for x in args], last(grad_out, rows)
        exact = gradients(reference.combine, [x.double() for x in parts], above.double())
        plain = gradients(_plain_sum, parts, above)
        names = "gates", "o_cmp", "o_slc", "o_win"
        return _compared(names, [last(x, rows) for x in found], plain, exact, f"the last {rows} rows")
    layout, blocks = args[-2:]
    tokens = layout.max_seqlen_k
    if op == "compress_mean":
        x, above = last(args[0].detach(), tokens), last(grad_out, blocks.num_compressed(tokens))
        alone = VarlenLayout.from_lengths([tokens], device=layout.device)
        exact = gradients(lambda x: reference.compress_mean(x, alone, blocks), [x.double()], above.double())
        plain = gradients(lambda x: x.unfold(0, blocks.kernel_size, blocks.kernel_stride).mean(-1), [x], above)
        return _compared(("x",), [last(found[0], tokens)], plain, exact, f"{tokens} tokens")
    rows = tokens if tokens <= CHECKED else ROWS
    asked = Attention.of(op, args, rows)
    return _check_attention_gradients(asked, last(grad_out, rows), found, f"the last {rows} rows")


def _check_attention_gradients(asked: Attention, grad_out: Tensor, found: Sequence[Tensor], about: str) -> str:
    """dq of the rows, dk and dv of the keys that none but they see; a kv head at a time, for the memory."""
    counts = len(asked.q), asked.own, asked.own
    group = asked.q.shape[1] // asked.k.shape[1]
    half = asked.q.dtype in (torch.float16, torch.bfloat16)
    exact: list[tuple[Tensor, ...]] = []
    other: list[tuple[Tensor, ...]] = []  # plain torch's in half precision, else what may be off
    for head in range(asked.k.shape[1]):
        one, above = asked.of_head(head), grad_out[:, head * group : (head + 1) * group]
        leaves = one.q, one.k, one.v
        exact.append(gradients(one.exact, [x.double() for x in leaves], above.double()))
        other.append(gradients(one.plain, leaves, above) if half else gradient_bounds(*leaves, above, one.mask()))
    exact_all, other_all = (
        [last(torch.cat(heads, 1), count) for heads, count in zip(zip(*made, strict=True), counts, strict=True)]
        for made in (exact, other)
    )
    mine = [last(x, count) for x, count in zip(found, counts, strict=True)]
    if half:
        return _compared("qkv", mine, other_all, exact_all, about)
    words = []
    for name, got, wanted, allowed in zip("qkv", mine, exact_all, other_all, strict=True):
        off = (got - wanted).abs()
        if not bool((off <= allowed).all()):  # NaN is not
            raise AssertionError(f"d{name} of {about}: max-abs error {float(off.max()):.1e}, more than fp32's own")
        words.append(f"d{name} of {about} off by {float(torch.nn.functional.pad(off.flatten(), (0, 1)).max()):.1e}")
    return ", ".join(words)


def _compared(
    names: Sequence[str], found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], about: str
) -> str:
    every = zip(names, found, plain, exact, strict=True)
    return ", ".join(within(got, partial(_itself, made), x, f"d{name} of {about}") for name, got, made, x in every)


def _itself(x: Tensor) -> Tensor:
    return x
