"""Does every operation refuse what does not fit, naming the argument, what it expected and what came?"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, unfold_blocks
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import BACKENDS, random_inputs, to_pages
from torch import Tensor

LAYOUT = VarlenLayout.from_lengths([10, 6])
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=5)
K_OF = {"compressed_attention": "k_cmp", "select_blocks": "k_cmp", "selected_attention": "k", "window_attention": "k"}
ATTENTION = [op for op in K_OF if op != "select_blocks"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


def arguments(op: str) -> dict[str, Any]:
    """Arguments of `op` that fit."""
    q, k, v, gates = random_inputs(LAYOUT, dtype=torch.float32)
    k_cmp, v_cmp = (BACKEND.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    layout = {"layout": LAYOUT, "blocks": BLOCKS}
    return {
        "compress_mean": {"x": k, **layout},
        "compressed_attention": {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, **layout},
        "select_blocks": {"q": q, "k_cmp": k_cmp, "lse": torch.zeros(4, 16), **layout},
        "selected_attention": {
            "q": q,
            "k": k,
            "v": v,
            "block_indices": torch.zeros(16, 2, 3, dtype=torch.int32),
            **layout,
        },
        "window_attention": {"q": q, "k": k, "v": v, **layout},
        "combine": {"gates": gates, "o_cmp": q, "o_slc": q, "o_win": q},
    }[op]


def refused(backend: Any, op: str, error: type[Exception], message: str, **changes: Any) -> None:
    good = arguments(op)
    assert changes.keys() <= good.keys() | {"scale"}
    with pytest.raises(error, match=message):
        getattr(backend, op)(**(good | changes))


@pytest.mark.parametrize("op", [*K_OF, "compress_mean", "combine"])
def test_the_arguments_that_the_others_change_do_fit(backend: Any, op: str) -> None:
    getattr(backend, op)(**arguments(op))


@pytest.mark.parametrize("op", K_OF)
@pytest.mark.parametrize("empty", [(16, 0, 8), (16, 4, 0)])
def test_queries_without_heads_or_dimensions(backend: Any, op: str, empty: tuple[int, ...]) -> None:
    message = rf"q: expected at least one head and head_dim of at least 1, got shape \[{', '.join(map(str, empty))}\]"
    refused(backend, op, ValueError, message, q=torch.zeros(empty))


@pytest.mark.parametrize("op", [*K_OF, "compress_mean"])
def test_layout_and_blocks_of_other_types(backend: Any, op: str) -> None:
    refused(backend, op, TypeError, r"layout: expected a VarlenLayout, got Tensor", layout=LAYOUT.cu_seqlens_q)
    refused(backend, op, TypeError, r"blocks: expected a BlockGeometry, got dict", blocks={"topk": 4})


@pytest.mark.parametrize("op", [*K_OF, "compress_mean"])
def test_packed_rows(backend: Any, op: str) -> None:
    name = "x" if op == "compress_mean" else "q"
    good = arguments(op)[name]
    rows, heads, dim = good.shape
    refused(backend, op, TypeError, rf"^{name}: expected a tensor, got list", **{name: [1.0]})
    refused(backend, op, TypeError, rf"^{name}: expected a floating dtype, got torch\.int64", **{name: good.long()})
    expected = rf"^{name}: expected shape \[16, heads, head_dim\], got "
    refused(backend, op, ValueError, rf"{expected}\[15, {heads}, {dim}\]", **{name: good[:15]})
    refused(backend, op, ValueError, rf"{expected}\[1, {rows}, {heads}, {dim}\]", **{name: good[None]})
    refused(
        backend, op, ValueError, rf"^{name}: expected device cpu of the layout, got meta", **{name: good.to("meta")}
    )


@pytest.mark.parametrize("op", K_OF)
def test_keys(backend: Any, op: str) -> None:
    name = K_OF[op]
    k = arguments(op)[name]
    rows = len(k)
    refused(
        backend, op, TypeError, rf"^{name}: expected dtype torch\.float32 of q, got torch\.float16", **{name: k.half()}
    )
    refused(backend, op, TypeError, rf"^{name}: expected a floating dtype, got torch\.bool", **{name: k > 0})
    refused(backend, op, ValueError, rf"^{name}: expected shape \[{rows}, .*got \[{rows - 1}, 2, 8\]", **{name: k[1:]})
    refused(backend, op, ValueError, rf"^{name}: expected head_dim 8 of q, got 7", **{name: k[..., 1:]})
    refused(backend, op, ValueError, rf"^{name}: expected device cpu of the layout, got meta", **{name: k.to("meta")})
    expected = rf"^{name}: expected kv heads that divide q's 4 heads, got "
    refused(backend, op, ValueError, expected + "3", **{name: k[:, [0, 1, 1]]})
    refused(backend, op, ValueError, expected + "0", **{name: k[:, :0]})


@pytest.mark.parametrize("op", ATTENTION)
def test_values(backend: Any, op: str) -> None:
    name = K_OF[op].replace("k", "v", 1)
    v = arguments(op)[name]
    refused(
        backend,
        op,
        TypeError,
        rf"^{name}: expected dtype torch\.float32 of q, got torch\.float64",
        **{name: v.double()},
    )
    refused(
        backend, op, ValueError, rf"^{name}: expected shape \[{len(v)}, .*got \[{len(v) - 1}, 2, 8\]", **{name: v[1:]}
    )
    refused(backend, op, ValueError, rf"^{name}: expected 2 heads of {K_OF[op]}, got 1", **{name: v[:, :1]})
    refused(backend, op, ValueError, rf"^{name}: expected device cpu of the layout, got meta", **{name: v.to("meta")})


@pytest.mark.parametrize("op", K_OF)
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, r"scale: expected a finite number above 0, got 0\.0"),
        (-1.0, ValueError, r"scale: .*above 0, got -1\.0"),
        (float("nan"), ValueError, r"scale: .*got nan"),
        (float("inf"), ValueError, r"scale: .*got inf"),
        (True, TypeError, r"scale: expected a float or None, got bool"),
        ("1", TypeError, r"scale: expected a float or None, got str"),
    ],
)
def test_scale(backend: Any, op: str, scale: object, error: type[Exception], message: str) -> None:
    refused(backend, op, error, message, scale=scale)


def test_block_indices(backend: Any) -> None:
    op, good = "selected_attention", arguments("selected_attention")["block_indices"]
    refused(backend, op, TypeError, r"block_indices: expected a tensor, got NoneType", block_indices=None)
    refused(backend, op, TypeError, r"block_indices: .*int32, got torch\.int64", block_indices=good.long())
    refused(backend, op, ValueError, r"block_indices: .*\[16, 2, N\], got \[15, 2, 3\]", block_indices=good[1:])
    refused(backend, op, ValueError, r"block_indices: .*\[16, 2, N\], got \[16, 1, 3\]", block_indices=good[:, :1])
    refused(backend, op, ValueError, r"block_indices: .*\[16, 2, N\], got \[16, 2\]", block_indices=good[..., 0])
    refused(backend, op, ValueError, r"block_indices: .*device cpu.*, got meta", block_indices=good.to("meta"))


def test_lse(backend: Any) -> None:
    op, good = "select_blocks", arguments("select_blocks")["lse"]
    refused(backend, op, TypeError, r"lse: expected a tensor, got NoneType", lse=None)
    refused(backend, op, TypeError, r"lse: .*torch\.float32, got torch\.bfloat16", lse=good.bfloat16())
    refused(backend, op, ValueError, r"lse: expected shape \[4, 16\], got \[16, 4\]", lse=good.T)
    refused(backend, op, ValueError, r"lse: expected device cpu of the layout, got meta", lse=good.to("meta"))


def test_gates_and_outputs(backend: Any) -> None:
    good = arguments("combine")
    gates, o = good["gates"], good["o_cmp"]
    refused(
        backend, "combine", ValueError, r"gates: expected shape \[16, 4, 3\], got \[16, 4, 2\]", gates=gates[..., :2]
    )
    refused(backend, "combine", ValueError, r"gates: expected shape \[16, 4, 3\], got \[16, 2, 3\]", gates=gates[:, :2])
    refused(backend, "combine", ValueError, r"gates: expected 3 dimensions, got shape \[16, 3\]", gates=gates[:, 0])
    refused(backend, "combine", TypeError, r"gates: expected a floating dtype, got torch\.int64", gates=gates.long())
    refused(backend, "combine", TypeError, r"gates: expected a tensor, got NoneType", gates=None)
    refused(backend, "combine", ValueError, r"gates: expected device cpu, got meta", gates=gates.to("meta"))
    refused(backend, "combine", TypeError, r"o_win: expected a tensor, got float", o_win=0.0)
    for name in ("o_slc", "o_win"):
        refused(backend, "combine", ValueError, rf"^{name}: .* as o_cmp, got \[16, 4, 7\]", **{name: o[..., 1:]})
        refused(backend, "combine", ValueError, rf"^{name}: .* as o_cmp, got .*float64", **{name: o.double()})
        refused(backend, "combine", ValueError, rf"^{name}: .* as o_cmp, got .* on meta", **{name: o.to("meta")})


def test_unfold_blocks_checks_its_rows() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[16, heads, head_dim\], got \[15, 2, 8\]"):
        unfold_blocks(torch.zeros(15, 2, 8), LAYOUT, BLOCKS)


def pages_of(op: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `op` with keys and values in pages, and their names."""
    good = arguments(op)
    names = [name for name in (K_OF[op], K_OF[op].replace("k", "v", 1)) if name in good]
    lengths = LAYOUT.compressed(BLOCKS).cu_seqlens.diff().tolist() if names[0] == "k_cmp" else [10, 6]
    return good | {name: to_pages(good[name], lengths, 4) for name in names}, names


@pytest.mark.parametrize("op", K_OF)
@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
def test_pages_with_scales(op: str, scale: str) -> None:
    good, names = pages_of(op)
    for name in names:
        kv = good[name]
        scaled = PagedKV(kv.pages, kv.block_table, kv.lengths, **{scale: torch.ones(1)})
        with pytest.raises(ValueError, match=rf"^{name}: expected pages without k_scale and v_scale.*got scales"):
            getattr(BACKEND, op)(**(good | {name: scaled}))


@pytest.mark.parametrize("op", K_OF)
def test_pages_that_do_not_fit(op: str) -> None:
    good, names = pages_of(op)
    kv = good[names[0]]

    def refused_pages(error: type[Exception], message: str, pages: Tensor, table: Tensor, lengths: Tensor) -> None:
        with pytest.raises(error, match=message):
            getattr(BACKEND, op)(**(good | {names[0]: PagedKV(pages, table, lengths)}))

    expected = rf"^{names[0]}: expected "
    refused_pages(
        ValueError, expected + r"2 sequences, got 1 in block_table", kv.pages, kv.block_table[:1], kv.lengths[:1]
    )
    refused_pages(ValueError, expected + r"head_dim 8 of q, got 7", kv.pages[..., 1:], kv.block_table, kv.lengths)
    refused_pages(
        TypeError, expected + r"dtype torch\.float32 of q.*float16", kv.pages.half(), kv.block_table, kv.lengths
    )
    refused_pages(ValueError, expected + r"lengths that add up to", kv.pages, kv.block_table, kv.lengths - 1)
    refused_pages(ValueError, expected + r"lengths of at most the 0 rows", kv.pages, kv.block_table[:, :0], kv.lengths)
    meta = [x.to("meta") for x in (kv.pages, kv.block_table, kv.lengths)]
    refused_pages(ValueError, expected + r"device cpu of the layout, got meta", *meta)


@pytest.mark.parametrize("op", ATTENTION)
def test_gradients_through_pages(op: str) -> None:
    good, names = pages_of(op)
    first = good[names[0]]
    pages = replace(first, pages=first.pages.clone().requires_grad_())
    wanted = {"q": good["q"].clone().requires_grad_(), names[0]: pages}
    for name, value in wanted.items():
        with pytest.raises(ValueError, match=r"q, k, v: expected no gradient .*paged k or v, got requires_grad=True"):
            getattr(BACKEND, op)(**(good | {name: value}))
    with torch.no_grad():
        getattr(BACKEND, op)(**(good | wanted))


@pytest.mark.parametrize("op", ATTENTION)
def test_second_derivatives_are_refused(op: str) -> None:
    good = arguments(op)
    q = good["q"].clone().requires_grad_()
    out, _ = getattr(BACKEND, op)(**(good | {"q": q}))
    with pytest.raises(RuntimeError, match=r"^backward: expected create_graph=False, got True"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
