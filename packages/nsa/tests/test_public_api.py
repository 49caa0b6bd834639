"""Are names and signatures those that the design froze? A failure here is a change that users will notice."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib.metadata import version

import nsa
import nsa.reads
import pytest
from nsa import DecodeGraph, NSAAttention, NSAAux, NSACache, NSAConfig, PagePool, nsa_attention, ops


def signature(function: object) -> str:
    """Parameters without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def test_names() -> None:
    assert sorted(nsa.__all__) == [
        "CacheFull",
        "DecodeGraph",
        "NSAAttention",
        "NSAAux",
        "NSACache",
        "NSAConfig",
        "Observer",
        "PagePool",
        "SequenceState",
        "SharedPrefix",
        "__version__",
        "nsa_attention",
        "observe",
        "ops",
        "reuse_block_indices",
    ]
    assert sorted(ops.__all__) == [
        "combine",
        "compress_mean",
        "compressed_attention",
        "decode_attention",
        "select_blocks",
        "selected_attention",
        "window_attention",
    ]


@pytest.mark.parametrize(
    "function, expected",
    [
        (ops.compress_mean, "(x, layout, blocks, *, backend=None)"),
        (
            ops.compressed_attention,
            "(q, k_cmp, v_cmp, layout, blocks, *, scale=None, deterministic=None, backend=None)",
        ),
        (ops.select_blocks, "(q, k_cmp, lse, layout, blocks, *, scale=None, backend=None)"),
        (
            ops.selected_attention,
            "(q, k, v, block_indices, layout, blocks, *, scale=None, deterministic=None, backend=None)",
        ),
        (ops.window_attention, "(q, k, v, layout, blocks, *, scale=None, deterministic=None, backend=None)"),
        (ops.combine, "(gates, o_cmp, o_slc, o_win, *, backend=None)"),
        (
            nsa_attention,
            "(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, layout, blocks, *, q_cmp=None, scale=None, "
            "block_indices=None, return_aux=False, deterministic=None, backend=None)",
        ),
        (nsa.reuse_block_indices, "()"),
        (NSAAttention, "(config)"),
        (NSAAttention.forward, "(self, x, *, layout=None, padding_mask=None, cache=None)"),
        (
            NSACache,
            "(config, batch_size, max_tokens, *, page_size=64, rollback=8, pool=None, device=None, dtype=None)",
        ),
        (NSAAttention.decode, "(self, x, cache, counts=None)"),
        (NSACache.extend, "(self, lengths)"),
        (NSACache.decode, "(self, rows, counts=None)"),
        (NSACache.advance, "(self, tokens)"),
        (DecodeGraph, "(step, caches, x)"),
        (DecodeGraph.replay, "(self, x, counts=None)"),
        (NSACache.reserve, "(self, tokens)"),
        (NSACache.truncate, "(self, sequence, length)"),
        (NSACache.free, "(self, sequence)"),
        (NSACache.share, "(self, sequence, length=None)"),
        (NSACache.adopt, "(self, sequence, prefix)"),
        (NSACache.fork, "(self, source, target, length=None)"),
        (NSACache.export, "(self, sequence)"),
        (NSACache.restore, "(self, sequence, state)"),
        (NSACache.reset, "(self)"),
        (NSACache.pages_for, "(self, tokens, chunk=1)"),
        (NSACache.shortest, "(self, sequence)"),
        (PagePool, "(num_pages, page_size, num_heads, dims, *, device=None, dtype=None)"),
        (PagePool.for_config, "(config, num_pages, *, page_size=64, device=None, dtype=None)"),
        (
            nsa.observe,
            "(model, *, every=1, parity_every=0, parity_rows=64, ranges=False, log_every=None, log_seconds=None, "
            "clock=<built-in function monotonic>)",
        ),
        (nsa.Observer.snapshot, "(self)"),
        (nsa.Observer.reset, "(self)"),
        (nsa.Observer.close, "(self)"),
        (nsa.reads.count_reads, "(block_indices, layout, blocks)"),
        (nsa.reads.reads_when_selected, "(length, blocks)"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: object, expected: str) -> None:
    assert signature(function) == expected


def test_fields_of_the_configuration() -> None:
    defaults = {field.name: field.default for field in fields(NSAConfig)}
    assert [name for name, default in defaults.items() if default is MISSING] == list(REQUIRED)
    assert {name: default for name, default in defaults.items() if name not in REQUIRED} == {
        "v_head_dim": None,
        "kernel_size": 32,
        "kernel_stride": 16,
        "block_size": 64,
        "topk": 16,
        "init_blocks": 1,
        "local_blocks": 2,
        "window_size": 512,
        "compression": "mean",
        "compression_hidden_size": None,
        "shared_kv": False,
        "gate_hidden_size": None,
        "rope_theta": 10_000.0,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_cmp": "after",
        "bias": False,
    }


REQUIRED = ("hidden_size", "num_heads", "num_kv_heads", "head_dim")


def test_order_of_the_positional_fields() -> None:
    assert tuple(field.name for field in fields(NSAConfig))[:5] == (*REQUIRED, "v_head_dim")


def test_fields_of_the_auxiliary_output() -> None:
    assert NSAAux._fields == ("block_indices", "lse_cmp", "lse_slc", "lse_win")
    assert nsa.reads.Reads._fields == ("cmp", "slc", "win")


def test_names_in_a_checkpoint() -> None:
    """Renaming a parameter would orphan every checkpoint."""
    sizes = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}

    def shapes(**options: object) -> dict[str, tuple[int, ...]]:
        layer = NSAAttention(NSAConfig(**sizes, kernel_size=16, **options))
        return {name: tuple(x.shape) for name, x in layer.state_dict().items()}

    always = {
        "q_proj.weight": (32, 24),
        "k_proj.weight": (48, 24),
        "v_proj.weight": (36, 24),
        "o_proj.weight": (24, 24),
        "gates.hidden.weight": (6, 24),
        "gates.hidden.bias": (6,),
        "gates.out.weight": (12, 6),
        "gates.out.bias": (12,),
    }
    assert shapes() == always
    assert shapes(shared_kv=True) == always | {"k_proj.weight": (16, 24), "v_proj.weight": (12, 24)}
    assert shapes(bias=True) == always | {"q_proj.bias": (32,), "k_proj.bias": (48,), "v_proj.bias": (36,)}
    assert shapes(compression="weighted_pool") == always | {"compress_k.weight": (2, 16), "compress_v.weight": (2, 16)}
    assert shapes(compression="linear") == always | {
        "compress_k.weight": (2, 128, 8),
        "compress_k.bias": (2, 8),
        "compress_v.weight": (2, 96, 6),
        "compress_v.bias": (2, 6),
    }
    assert shapes(compression="mlp", compression_hidden_size=10) == always | {
        "compress_k.position": (16, 2, 8),
        "compress_k.weight_in": (2, 128, 10),
        "compress_k.bias_in": (2, 10),
        "compress_k.weight_out": (2, 10, 8),
        "compress_k.bias_out": (2, 8),
        "compress_v.position": (16, 2, 6),
        "compress_v.weight_in": (2, 96, 10),
        "compress_v.bias_in": (2, 10),
        "compress_v.weight_out": (2, 10, 6),
        "compress_v.bias_out": (2, 6),
    }


def test_importing_is_light() -> None:
    code = "import sys, nsa; print(*{'triton', 'flash_attn', 'transformers', 'prometheus_client'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_version_is_that_of_the_metadata() -> None:
    assert nsa.__version__ == version("nsa")
