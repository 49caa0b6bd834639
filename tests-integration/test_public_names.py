"""Do the operations look the same wherever they appear: in `nsa.ops`, in the oracle and in every installed backend?"""

import inspect
import re
from dataclasses import fields

import nsa_fa2
import nsa_kernels_triton
import nsa_varlen
import pytest
from nsa import NSAConfig, ops
from nsa_routing import OPS, backends
from nsa_varlen import BlockGeometry, CompletedBlocks, NewTokens, PagedKV, PooledTokens, VarlenLayout, reference
from nsa_varlen.sdpa import BACKEND


def parameters(function: object) -> list[tuple[str, object, object]]:
    """(name, kind, default) of each parameter but self and backend."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "backend")]


@pytest.mark.parametrize("op", OPS)
def test_the_oracle_takes_what_the_operations_take(op: str) -> None:
    assert parameters(getattr(reference, op)) == parameters(getattr(ops, op))


@pytest.mark.parametrize("op", OPS)
def test_the_backend_that_is_always_there_takes_what_the_operations_take(op: str) -> None:
    assert parameters(getattr(BACKEND, op)) == parameters(getattr(ops, op))


def test_every_installed_backend_takes_what_the_operations_take() -> None:
    """For the operations that it implements."""
    names = backends.installed_backends()
    assert {"sdpa", "fa2", "fa2-torch", "cudnn", "triton"} <= set(names)
    for name in names:
        backend = backends.load_backend(name)
        for op in OPS:
            if hasattr(backend, op):
                assert parameters(getattr(backend, op)) == parameters(getattr(ops, op)), f"{name}.{op}"


def test_the_operations_are_those_that_are_routed() -> None:
    assert sorted(ops.__all__) == sorted(OPS)
    assert set(OPS) <= set(reference.__all__)


def test_every_operation_can_be_asked_of_a_backend() -> None:
    for op in OPS:
        asked = inspect.signature(getattr(ops, op)).parameters["backend"]
        assert (asked.kind, asked.default) == (inspect.Parameter.KEYWORD_ONLY, None)


def test_block_sizes_have_one_spelling_and_one_default() -> None:
    geometry = {field.name: field.default for field in fields(BlockGeometry)}
    config = {field.name: field.default for field in fields(NSAConfig)}
    assert geometry == {name: config[name] for name in geometry}


def test_names_of_nsa_varlen() -> None:
    assert sorted(nsa_varlen.__all__) == [
        "BlockGeometry",
        "Bucket",
        "CompletedBlocks",
        "CompressedLayout",
        "NewTokens",
        "PagedKV",
        "PooledTokens",
        "VarlenLayout",
        "__version__",
        "collate_tokens",
        "dense",
        "masks",
        "pack",
        "reference",
        "unfold_blocks",
        "unpack",
    ]


def test_names_of_nsa_fa2() -> None:
    assert sorted(nsa_fa2.__all__) == ["CUDNN", "FA2", "FA2_TORCH", "FlashBackend", "__version__"]


def test_names_of_nsa_kernels_triton() -> None:
    assert sorted(nsa_kernels_triton.__all__) == ["BACKEND", "TritonBackend", "__version__"]


@pytest.mark.parametrize(
    "function, expected",
    [
        (
            VarlenLayout,
            "(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_q, total_k)",
        ),
        (VarlenLayout.from_lengths, "(q, k=None, device=None)"),
        (VarlenLayout.from_shape, "(batch_size, length, device=None)"),
        (
            VarlenLayout.from_cu_seqlens,
            "(cu_q, cu_k=None, *, max_seqlen_q=None, max_seqlen_k=None, total_q=None, total_k=None)",
        ),
        (VarlenLayout.from_padding_mask, "(mask, *, max_seqlen=None, total=None)"),
        (VarlenLayout.pin_memory, "(self)"),
        (VarlenLayout.is_whole, "(self)"),
        (VarlenLayout.positions, "(self)"),
        (VarlenLayout.compressed, "(self, blocks)"),
        (VarlenLayout.buckets, "(self, blocks=None)"),
        (nsa_varlen.Bucket.visible, "(self, window_size=None, queries=None)"),
        (nsa_varlen.dense.DenseForms, "(dense)"),
        (nsa_varlen.dense.masked_attention, "(q, k, v, mask, *, scale, is_causal)"),
        (nsa_varlen.CompressedLayout, "(cu_seqlens, max_seqlen, total)"),
        (
            BlockGeometry,
            "(kernel_size=32, kernel_stride=16, block_size=64, topk=16, init_blocks=1, local_blocks=2, "
            "window_size=512)",
        ),
        (BlockGeometry.num_compressed, "(self, length)"),
        (BlockGeometry.num_blocks, "(self, length)"),
        (BlockGeometry.reads, "(self, length)"),
        (PagedKV, "(pages, block_table, lengths, k_scale=None, v_scale=None)"),
        (NewTokens, "(k_slc, v_slc, k_win, v_win, cmp)"),
        (CompletedBlocks, "(k, v)"),
        (
            PooledTokens,
            "(k, v, k_tail, v_tail, k_weights=None, v_weights=None, rotation=None, interleaved=False)",
        ),
        (nsa_varlen.collate_tokens, "(examples, *, ignore_index=-100)"),
        (nsa_varlen.pack, "(x, mask, *, max_seqlen=None, total=None)"),
        (nsa_varlen.unpack, "(packed, pad_index)"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_of_nsa_varlen(function: object, expected: str) -> None:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert re.sub(r"\s+", " ", str(inspect.Signature(bare))) == expected
