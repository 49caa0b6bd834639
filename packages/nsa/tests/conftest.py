"""Small layers in fp64 and ragged batches, with proof that no block is selected by rounding.

Sizes are small so that every branch works for its result: kernel 8/4, blocks of 16, topk 4 of which 3 are forced, a
window of 12. From 65 tokens on a query leaves blocks out.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pytest
import torch
from nsa import NSAAttention, NSACache, NSAConfig, ops
from nsa.config import COMPRESSIONS, ROPE_CMP
from nsa_routing import reset
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from torch import Tensor

SIZES = {
    "hidden_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "v_head_dim": 6,
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "window_size": 12,
}
VARIANTS = [
    *({"compression": kind, "rope_cmp": rope} for kind in COMPRESSIONS for rope in ROPE_CMP),
    {"shared_kv": True},
    {"shared_kv": True, "compression": "mlp", "rope_cmp": "before"},
    {"shared_kv": True, "rope_cmp": "none", "bias": True},
    {"rope_theta": None},
    {"rope_interleaved": True},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    {"v_head_dim": None, "num_kv_heads": 4},
    {"num_kv_heads": 1, "bias": True},
]
WINDOW_KEPT = SIZES["window_size"] - 1 + 8  # rows that a cache keeps at least: a window, and the default rollback

# What backend sdpa may do to a score in fp64: it reads an LSE rounded to fp32 (|lse| < 16, so a relative error of
# 16 * 2^-24 in each probability) and ranks scores rounded to fp32. Scores are at most G * l / d = 4.
SCORE_ERROR = 4 * (16 + 1) * 2**-24


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed for every test, whatever ran before it, and no flags of the person who runs it."""
    torch.manual_seed(0)
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def fresh_routes() -> Iterator[None]:
    """Nothing remembered of earlier routes and flags, nor of these afterwards."""
    reset()
    yield
    reset()


def name_of(variant: dict) -> str:
    """As it appears in a test's id."""
    return "-".join(
        f"{key}={value['rope_type'] if isinstance(value, dict) else value}" for key, value in variant.items()
    )


@pytest.fixture(scope="session", params=VARIANTS, ids=name_of)
def variant(request: pytest.FixtureRequest) -> dict:
    """Changes to `SIZES` that between them take every option of the layer."""
    return request.param


@pytest.fixture(scope="session")
def make_config() -> Callable[..., NSAConfig]:
    return lambda **changes: NSAConfig(**(SIZES | changes))


@pytest.fixture(scope="session")
def make_layer(make_config: Callable[..., NSAConfig]) -> Callable[..., NSAAttention]:
    """A layer in fp64 whose every parameter is random (none at a special initial value) and whose logits spread."""

    def make(**changes: object) -> NSAAttention:
        torch.manual_seed(1)
        layer = NSAAttention(make_config(**changes)).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            layer.q_proj.weight.mul_(2)
            layer.k_proj.weight.mul_(2)
        return layer

    return make


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., NSACache]:
    """A cache whose pages hold NaN until someone writes to them: a row read too early cannot hide."""

    def make(config: NSAConfig, batch_size: int = 1, max_tokens: int = 128, **options: object) -> NSACache:
        options = {"page_size": 16, "dtype": torch.float64} | options
        cache = NSACache(config, batch_size, max_tokens, **options)
        cache.pool.k_pages.fill_(torch.nan)
        cache.pool.v_pages.fill_(torch.nan)
        return cache

    return make


def selection_margin(q: Tensor, k_cmp: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> float:
    """Least difference, over all queries and kv heads, between the worst selected score and the best left out."""
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
    scores = reference.block_scores(q, k_cmp, lse, layout, blocks)
    candidate, forced = masks.candidate_blocks(layout, blocks)
    ranked = torch.where(forced[:, None], torch.inf, torch.where(candidate[:, None], scores, -torch.inf))
    ranked = ranked.sort(-1, descending=True).values
    if ranked.shape[-1] <= blocks.topk:
        return float("inf")
    chosen, left_out = ranked[..., blocks.topk - 1], ranked[..., blocks.topk]
    return float((chosen - left_out)[left_out > -torch.inf].min())


@pytest.fixture(scope="session")
def margin() -> Callable[[Tensor, Tensor, VarlenLayout, BlockGeometry], float]:
    return selection_margin


@pytest.fixture(scope="session")
def score_error() -> float:
    return SCORE_ERROR


@pytest.fixture(scope="session")
def certify() -> Callable[[NSAAttention, Tensor, VarlenLayout], Tensor]:
    """The layer's output for packed x, with proof that its selections hold against `SCORE_ERROR` and that some query
    leaves a block out.
    """

    def run(layer: NSAAttention, x: Tensor, layout: VarlenLayout) -> Tensor:
        with mock.patch.object(ops, "select_blocks", wraps=ops.select_blocks) as select, torch.no_grad():
            out = layer(x, layout=layout)
        q, k_cmp = (value.detach() for value in select.call_args.args[:2])
        gap = selection_margin(q, k_cmp, layout, layer.config.blocks)
        assert 2 * SCORE_ERROR < gap < float("inf"), "choose another seed: rounding could decide a selection"
        return out

    return run


@pytest.fixture(scope="session")
def contents() -> Callable[[NSACache], list[dict[str, Tensor]]]:
    """What a cache holds, sequence by sequence: rows of every stream (of the window the last `WINDOW_KEPT`) and the raw
    tokens that wait.
    """

    def read(cache: NSACache) -> list[dict[str, Tensor]]:
        blocks, found = cache.config.blocks, []
        for sequence, length in enumerate(cache.lengths):
            rows = {}
            counts = {"cmp": blocks.num_compressed(length), "slc": length, "win": length}
            lengths = torch.tensor(cache.lengths, dtype=torch.int32)
            for name, count in counts.items():
                first = max(0, length - WINDOW_KEPT) if name == "win" else 0
                position = torch.arange(first, count)
                where = torch.full_like(position, sequence), position
                keys, values = getattr(cache, name).views(lengths)
                rows[f"k_{name}"], rows[f"v_{name}"] = keys.rows(*where), values.rows(*where)
            waiting = torch.arange(counts["cmp"] * blocks.kernel_stride, length)
            rows["k_raw"], rows["v_raw"] = cache.tail.read(torch.full_like(waiting, sequence), waiting)
            found.append(rows)
        return found

    return read


@pytest.fixture(scope="session")
def feed() -> Callable[[NSAAttention, NSACache, Sequence[Tensor], Sequence[Sequence[int]]], list[Tensor]]:
    """Send sequences [S_b, hidden] through a layer and its cache, `steps[i][b]` tokens at a time; their outputs."""

    def run(
        layer: NSAAttention, cache: NSACache, sequences: Sequence[Tensor], steps: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        done = [0] * len(sequences)
        outputs: list[list[Tensor]] = [[] for _ in sequences]
        for lengths in steps:
            rows = [x[at : at + new] for x, at, new in zip(sequences, done, lengths, strict=True)]
            with torch.no_grad():
                out = layer(torch.cat(rows), layout=VarlenLayout.from_lengths(list(lengths)), cache=cache)
            for kept, part in zip(outputs, out.split(list(lengths)), strict=True):
                kept.append(part)
            done = [at + new for at, new in zip(done, lengths, strict=True)]
        return [torch.cat(kept) for kept in outputs]

    return run


@pytest.fixture(scope="session")
def once_each(
    make_layer: Callable[..., NSAAttention], certify: Callable[..., Tensor]
) -> Callable[[Sequence[Tensor]], Callable[[dict], tuple[NSAAttention, list[Tensor]]]]:
    """For sequences [S_b, hidden], a function of a variant: (layer, outputs of one pass over each), computed once."""

    def over(sequences: Sequence[Tensor]) -> Callable[[dict], tuple[NSAAttention, list[Tensor]]]:
        made: dict[str, tuple[NSAAttention, list[Tensor]]] = {}
        lengths = [len(x) for x in sequences]

        def get(variant: dict) -> tuple[NSAAttention, list[Tensor]]:
            if repr(variant) not in made:
                layer = make_layer(**variant)
                out = certify(layer, torch.cat(list(sequences)), VarlenLayout.from_lengths(lengths))
                made[repr(variant)] = layer, list(out.split(lengths))
            return made[repr(variant)]

        return get

    return over
