"""Do arguments that do not fit raise what the oracle raises, in its words, before anything is computed?"""

from typing import Any

import pytest
import torch
from nsa_fa2 import FA2, FlashBackend
from nsa_fa2.testing import PlainKernel
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, reference
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import random_inputs, to_pages
from torch import Tensor

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
LAYOUT = VarlenLayout.from_lengths([10, 6])
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=5)


class Untouched(PlainKernel):
    """No call may reach it."""

    def forward(self, *tensors: Any, **options: Any) -> Any:
        raise AssertionError("called with arguments that do not fit")


STRICT = FlashBackend("strict", Untouched(), lambda environment: None)


def arguments(op: str) -> dict[str, Any]:
    """Arguments of `op` that fit, by the name q, k, v ... whatever the operation calls them."""
    q, k, v, _ = random_inputs(LAYOUT, dtype=torch.float32)
    if op == CMP:
        k, v = (reference.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    indices = {"block_indices": torch.zeros(16, 2, 3, dtype=torch.int32)} if op == SLC else {}
    return {"q": q, "k": k, "v": v, **indices, "layout": LAYOUT, "blocks": BLOCKS}


def raised(backend: Any, op: str, arguments: dict[str, Any]) -> tuple[type[Exception], str]:
    options = {name: x for name, x in arguments.items() if name == "scale"}
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(backend, op)(*(x for name, x in arguments.items() if name != "scale"), **options)
    return caught.type, str(caught.value)


BAD: dict[str, tuple[str, Any]] = {  # the argument, and what becomes of it
    "no-layout": ("layout", lambda x: x.cu_seqlens_q),
    "no-blocks": ("blocks", lambda x: {"topk": 4}),
    "q-a-list": ("q", lambda x: [1.0]),
    "q-of-ints": ("q", lambda x: x.long()),
    "q-a-row-short": ("q", lambda x: x[1:]),
    "q-four-dims": ("q", lambda x: x[None]),
    "q-elsewhere": ("q", lambda x: x.to("meta")),
    "q-without-heads": ("q", lambda x: x[:, :0]),
    "q-without-dims": ("q", lambda x: x[..., :0]),
    "q-of-other-dim": ("q", lambda x: x[..., 1:]),
    "q-of-other-dtype": ("q", lambda x: x.double()),
    "q-heads-not-divided": ("q", lambda x: x[:, :3]),
    "k-none": ("k", lambda x: None),
    "k-of-bools": ("k", lambda x: x > 0),
    "k-a-row-short": ("k", lambda x: x[1:]),
    "k-elsewhere": ("k", lambda x: x.to("meta")),
    "k-of-other-dim": ("k", lambda x: x[..., 1:]),
    "k-of-other-dtype": ("k", lambda x: x.half()),
    "k-heads-that-do-not-divide": ("k", lambda x: x[:, [0, 1, 1]]),
    "k-without-heads": ("k", lambda x: x[:, :0]),
    "v-a-row-more": ("v", lambda x: torch.cat((x, x[:1]))),
    "v-of-other-dtype": ("v", lambda x: x.double()),
    "v-of-one-head": ("v", lambda x: x[:, :1]),
    "v-two-dims": ("v", lambda x: x[0]),
    "v-elsewhere": ("v", lambda x: x.to("meta")),
    "indices-none": ("block_indices", lambda x: None),
    "indices-of-int64": ("block_indices", lambda x: x.long()),
    "indices-a-row-short": ("block_indices", lambda x: x[1:]),
    "indices-of-one-head": ("block_indices", lambda x: x[:, :1]),
    "indices-two-dims": ("block_indices", lambda x: x[..., 0]),
    "indices-elsewhere": ("block_indices", lambda x: x.to("meta")),
    "scale-0": ("scale", lambda x: 0.0),
    "scale-negative": ("scale", lambda x: -1.0),
    "scale-nan": ("scale", lambda x: float("nan")),
    "scale-infinite": ("scale", lambda x: float("inf")),
    "scale-true": ("scale", lambda x: True),
    "scale-a-string": ("scale", lambda x: "1"),
    "scale-a-tensor": ("scale", lambda x: torch.ones(())),
}


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_that_the_others_change_do_fit(op: str) -> None:
    for backend in (reference, FlashBackend("plain", PlainKernel(), lambda environment: None)):
        getattr(backend, op)(*arguments(op).values())


@pytest.mark.parametrize(
    ("op", "bad"), [(op, bad) for op in OPS for bad, (name, _) in BAD.items() if op == SLC or name != "block_indices"]
)
def test_bad_arguments_raise_what_the_oracle_raises(op: str, bad: str) -> None:
    good, (name, spoil) = arguments(op), BAD[bad]
    changed = good | {name: spoil(good.get(name))}
    expected = raised(reference, op, changed)
    assert raised(STRICT, op, changed) == expected
    if name != "scale":  # which is read last
        assert raised(FA2, op, changed) == expected, "before what the backend cannot do"


def pages_of(op: str, **changes: Tensor) -> dict[str, Any]:
    """Arguments of `op` with k in pages, in which something is changed."""
    good = arguments(op)
    offsets = LAYOUT.compressed(BLOCKS).cu_seqlens if op == CMP else LAYOUT.cu_seqlens_k
    kv = to_pages(good["k"], offsets.diff().tolist(), 4)
    parts = {name: getattr(kv, name) for name in ("pages", "block_table", "lengths", "k_scale", "v_scale")}
    return good | {"k": PagedKV(**(parts | changes))}


@pytest.mark.parametrize("op", OPS)
def test_bad_pages_raise_what_sdpa_raises(op: str) -> None:
    """The oracle takes none."""
    kv = pages_of(op)["k"]
    changes: list[dict[str, Tensor]] = [
        {"k_scale": torch.ones(1)},
        {"v_scale": torch.ones(1)},
        {"block_table": kv.block_table[:1], "lengths": kv.lengths[:1]},
        {"pages": kv.pages[..., 1:]},
        {"pages": kv.pages[:, :, :0]},
        {"pages": kv.pages.half()},
        {"lengths": kv.lengths - 1},
        {"block_table": kv.block_table[:, :0]},
        {"pages": kv.pages.to("meta"), "block_table": kv.block_table.to("meta"), "lengths": kv.lengths.to("meta")},
    ]
    messages = set()
    for change in changes:
        bad = pages_of(op, **change)
        expected = raised(BACKEND, op, bad)
        assert raised(STRICT, op, bad) == expected
        messages.add(expected)
    assert len(messages) == len(changes) - 1  # scales, of whichever kind, are refused in the same words
