"""Would the tests notice? Known mistakes are planted, one at a time, and a small selection of tests must go red.

This module is also the plugin that plants them: `python -m pytest -p test_mutants --mutant NAME ...`. A run that
fails otherwise than by an assertion (an import error, say) ends with status NOT_AN_ASSERTION and counts as a miss.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nsa_varlen
import pytest
import torch
from nsa import autocasting, checkpointing, ops
from nsa.cache import CacheStep
from nsa.rope import RotaryEmbedding
from nsa_fa2 import attention, branches, gathering
from nsa_fa2 import backend as fa2_backend
from nsa_fa2.branches import Spans
from nsa_fa2.gathering import ByBlock, Chunk
from nsa_fa2.rows import Dense, Masked, Packed
from nsa_routing import Policy, Problem, dispatching, finiteness, planning, profile, route
from nsa_routing.breaker import Breaker
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.sdpa import SdpaBackend, _backend, _selected, _selection
from torch import Tensor

ROOT = Path(__file__).parents[1]
VARLEN, ROUTING, NSA, FA2 = (f"packages/{name}/tests" for name in ("nsa-varlen", "nsa-routing", "nsa", "nsa-fa2"))
NOT_AN_ASSERTION = 70
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[str]]] = {}


def mutant(*selection: str) -> Callable:
    """Register a mistake with the tests that must notice it: file names, and `-k` expressions joined by or."""

    def register(plant: Callable[[pytest.MonkeyPatch], None]) -> Callable:
        files = [s for s in selection if s.endswith(".py")]
        words = " or ".join(f"({s})" for s in selection if not s.endswith(".py"))
        MUTANTS[plant.__name__] = (plant, [*files, "-k", words])
        return plant

    return register


SEMANTICS, REFERENCE, MASKS = (f"{VARLEN}/test_{name}.py" for name in ("ops_semantics", "reference", "masks"))


def wrong_mask(op: str, mask_of: Callable[..., Tensor]) -> Callable:
    """sdpa's `op` over a wrong mask: the oracle's softmax, so that nothing else is wrong."""

    def run(self: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None, **_: Any) -> tuple:
        mask = mask_of(*rest)
        mask = mask if mask.ndim == 3 else mask[:, None]
        out, lse = reference._attend(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
        return out, lse.float()

    run.__name__ = op
    return run


def top_left(layout: VarlenLayout) -> Tensor:
    """Key s is seen by the query that is the s-th or later of its sequence."""
    rows = torch.arange(layout.total_q) - layout.cu_seqlens_q.long()[layout.sequence_of_queries()]
    same = layout.sequence_of_queries()[:, None] == layout.sequence_of_keys()
    return same & (layout.key_positions() <= rows[:, None])


@mutant(MASKS, "decode_query or test_causal")
def top_left_mask_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "causal_mask", top_left)


@mutant(SEMANTICS, "last_rows_of_the_prefill and sdpa and even")
def top_left_mask_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    run = wrong_mask("window_attention", lambda layout, blocks: top_left(layout) & masks.window_mask(layout, blocks))
    patch.setattr(SdpaBackend, "window_attention", run)


@mutant(MASKS, f"{VARLEN}/test_layout.py", "double_loop or test_causal")
def top_left_positions(patch: pytest.MonkeyPatch) -> None:
    def positions(self: VarlenLayout) -> Tensor:
        return torch.arange(self.total_q) - self.cu_seqlens_q.long()[self.sequence_of_queries()]

    patch.setattr(VarlenLayout, "positions", positions)


def whole_sequence(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    return layout.sequence_of_queries()[:, None] == layout.sequence_of_compressed(blocks)


@mutant(REFERENCE, "test_compressed_attention")
def unmasked_compressed_softmax_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "compressed_mask", whole_sequence)


@mutant(SEMANTICS, "no_bit_before_it and sdpa and fp64 and 31")
def unmasked_compressed_softmax_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SdpaBackend, "compressed_attention", wrong_mask("compressed_attention", whole_sequence))


def eq_9_read_0_based(num_compressed: int, num_blocks: int, blocks: BlockGeometry) -> Tensor:
    """score[j] = sum over m, n of p[j*l'/d - m - n], the paper's formula with its indices taken as they stand."""
    step, width = blocks.block_size // blocks.kernel_stride, blocks.kernel_size // blocks.kernel_stride
    weight = torch.zeros(num_compressed, num_blocks, dtype=torch.float64)
    for j in range(num_blocks):
        for i in (j * step - m - n for m in range(step) for n in range(width)):
            if 0 <= i < num_compressed:
                weight[i, j] += 1
    return weight


@mutant(REFERENCE, "test_block_scores or eq_9")
def eq_9_off_by_one_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "overlap", eq_9_read_0_based)


@mutant(REFERENCE, "eq_9_is")
def eq_9_off_by_one_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    def stencil(p_cmp: Tensor, num_blocks: int, blocks: BlockGeometry) -> Tensor:
        return p_cmp @ eq_9_read_0_based(p_cmp.shape[-1], num_blocks, blocks).to(p_cmp.dtype)

    patch.setattr(_selection, "stencil", stencil)


def complete_only(indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    position = layout.positions()[:, None, None]
    partial = (indices == position // blocks.block_size) & ((position + 1) % blocks.block_size != 0)
    return indices.masked_fill(partial, -1)


@mutant(MASKS, "test_selected")
def partial_block_dropped_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    right = masks.selected_mask
    patch.setattr(
        masks, "selected_mask", lambda i, layout, blocks: right(complete_only(i, layout, blocks), layout, blocks)
    )


@mutant(SEMANTICS, "partial_block and sdpa and even")
def partial_block_dropped_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    right = _selected._canonical
    patch.setattr(
        _selected, "_canonical", lambda i, layout, blocks: complete_only(right(i, layout, blocks), layout, blocks)
    )


@mutant(MASKS, "forced_blocks")
def forced_local_block_dropped_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    right = masks.candidate_blocks

    def candidates(layout: VarlenLayout, blocks: BlockGeometry) -> tuple[Tensor, Tensor]:
        candidate, forced = right(layout, blocks)
        return candidate, forced & (torch.arange(forced.shape[1]) < max(1, blocks.init_blocks))

    patch.setattr(masks, "candidate_blocks", candidates)


@mutant(SEMANTICS, "forced_blocks and sdpa")
def forced_local_block_dropped_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    right = _selection.top_blocks

    def top_blocks(scores: Tensor, current: Tensor, blocks: BlockGeometry) -> Tensor:
        return right(scores, current, replace(blocks, local_blocks=1) if blocks.local_blocks > 1 else blocks)

    patch.setattr(_selection, "top_blocks", top_blocks)


def first_value(right: Callable) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _, lse = right(q, k, v, *rest)
        return v[:1].repeat_interleave(q.shape[1] // v.shape[1], 1).expand(q.shape[0], -1, -1), lse

    return attend


@mutant(REFERENCE, "prefix_not_to_the_first or test_window")
def first_value_returned_by_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "_attend", first_value(reference._attend))


@mutant(SEMANTICS, "exactly_w and sdpa and even")
def first_value_returned_by_sdpa(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_backend, "interval_attention", first_value(_backend.interval_attention))


def one_more(right: Callable) -> Callable:
    def widened(*args: Any, **kwargs: Any) -> Any:
        *head, blocks = args
        return right(*head, replace(blocks, window_size=blocks.window_size + 1), **kwargs)

    return widened


@mutant(MASKS, "exactly_w")
def window_one_too_wide_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "window_mask", one_more(masks.window_mask))


@mutant(SEMANTICS, "exactly_w and sdpa and even")
def window_one_too_wide_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SdpaBackend, "window_attention", one_more(SdpaBackend.window_attention))


@mutant(SEMANTICS, "finite_lse and sdpa")
def softmax_maxima_shared_between_rows(patch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.amax

    def amax(self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        top = right(self, dim, keepdim=keepdim)
        return top.clone().fill_(right(top)) if keepdim and top.numel() else top

    patch.setattr(torch.Tensor, "amax", amax)


@mutant(SEMANTICS, "exactly_w and sdpa and even")
def lse_in_bits(patch: pytest.MonkeyPatch) -> None:
    right = _backend.interval_attention

    def attend(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*args)
        return out, lse / 0.6931471805599453

    patch.setattr(_backend, "interval_attention", attend)


def later_first(scores: Tensor) -> Tensor:
    """Scores that grow by far less than any real difference with the block."""
    return scores * (1 + 1e-6 * torch.arange(scores.shape[-1], dtype=scores.dtype))


@mutant(SEMANTICS, "lower_block and oracle and fp64 and even and zero")
def ties_to_the_higher_block_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    right = reference.block_scores
    patch.setattr(reference, "block_scores", lambda *args, **kwargs: later_first(right(*args, **kwargs)))


@mutant(SEMANTICS, "lower_block and sdpa and fp64 and even and zero")
def ties_to_the_higher_block_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    right = _selection.stencil
    patch.setattr(_selection, "stencil", lambda *args: later_first(right(*args)))


def one_head(right: Callable) -> Callable:
    """The first head of each group speaks for all."""

    def scored(q: Tensor, k_cmp: Tensor, lse: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads = torch.arange(q.shape[1])
        group = q.shape[1] // k_cmp.shape[1]
        first = heads // group * group
        return right(q[:, first], k_cmp, lse[first], *args, **kwargs)

    return scored


@mutant(REFERENCE, "test_block_scores")
def one_head_for_its_group_in_the_oracle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "block_scores", one_head(reference.block_scores))


@mutant(SEMANTICS, "has_a_say and sdpa")
def one_head_for_its_group_in_sdpa(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_backend, "select", one_head(_backend.select))


@mutant(SEMANTICS, "blocks_are_sets and sdpa")  # the oracle's mask is boolean: it cannot count twice
def duplicates_counted_twice(patch: pytest.MonkeyPatch) -> None:
    def canonical(block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        indices = block_indices.long().sort(-1).values
        current = (layout.positions() // blocks.block_size)[:, None, None]
        return indices.masked_fill((indices < 0) | (indices > current), -1)

    patch.setattr(_selected, "_canonical", canonical)


@mutant(f"{NSA}/test_layer_decode.py", "token_by_token")
def compression_clock_restarted_by_the_cache(patch: pytest.MonkeyPatch) -> None:
    right = CacheStep.write_cmp

    def write_cmp(self: CacheStep, k: Tensor, v: Tensor, compress: Callable) -> None:
        """Blocks begin at the step's first token: those that waited are overwritten."""

        def restarted(k_raw: Tensor, v_raw: Tensor, *rest: Any) -> Any:
            count = min(len(k_raw), len(k))
            return compress(torch.cat((k[:count], k_raw[count:])), torch.cat((v[:count], v_raw[count:])), *rest)

        right(self, k, v, restarted)

    patch.setattr(CacheStep, "write_cmp", write_cmp)


@mutant(f"{NSA}/test_checkpointing.py", "bitwise")
def notes_of_a_checkpoint_never_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops, "selected_once", lambda select, shape: select())


@mutant(f"{NSA}/test_checkpointing.py", "bitwise")
def the_last_note_of_a_checkpoint_for_every_selection(patch: pytest.MonkeyPatch) -> None:
    def take(self: Any, select: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        return self.notes[-1][..., : shape[-1]].contiguous()

    patch.setattr(checkpointing._Reusing, "take", take)


@mutant(f"{NSA}/test_autocasting.py", "dtypes_are_those")
def autocast_of_fp64(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(autocasting, "_cast", lambda x, dtype: x.to(dtype))


@mutant(f"{NSA}/test_rope.py", "test")
def rope_flat_across_heads(patch: pytest.MonkeyPatch) -> None:
    right = RotaryEmbedding.forward

    def forward(self: RotaryEmbedding, x: Tensor, positions: Tensor) -> Tensor:
        wide = RotaryEmbedding(x.shape[1] * x.shape[2], 10_000.0, self.interleaved)
        return right(wide, x.flatten(1)[:, None], positions).reshape(x.shape)

    patch.setattr(RotaryEmbedding, "forward", forward)


EXHAUSTIVE = f"{VARLEN}/test_ops_exhaustive.py"


def offsets_one_short(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """From the second sequence on, every compressed block is taken for the one after it."""
    mask = masks.compressed_mask(layout, blocks)
    return torch.where(layout.sequence_of_queries()[:, None] > 0, mask.roll(-1, 1), mask)


@mutant(EXHAUSTIVE, "pair_of_lengths_many and sdpa and 3-3-g2")
def key_offsets_one_short_from_the_second_sequence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SdpaBackend, "compressed_attention", wrong_mask("compressed_attention", offsets_one_short))


def one_key_before(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Queries that see their sequence from its first key on also see the key packed before it."""
    mask = masks.window_mask(layout, blocks)
    first = torch.nn.functional.pad(mask & (layout.key_positions() == 0), (0, 1))
    return mask | first[:, 1:]


@mutant(EXHAUSTIVE, "pair_of_lengths_many and sdpa and 7-g3")
def last_key_of_the_previous_sequence_let_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SdpaBackend, "window_attention", wrong_mask("window_attention", one_key_before))


@mutant(EXHAUSTIVE, "sum_of_its_heads and sdpa and 7-g3")
def last_head_left_out_of_the_group_sum(patch: pytest.MonkeyPatch) -> None:
    right = _backend.select

    def select(q: Tensor, k_cmp: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        last = torch.arange(1, q.shape[1] + 1) % (q.shape[1] // k_cmp.shape[1]) == 0
        return right(q, k_cmp, torch.where(last[:, None], torch.inf, lse), *rest)  # its probabilities become 0

    patch.setattr(_backend, "select", select)


@mutant(EXHAUSTIVE, "padding_anywhere_has_no_influence and not 61st and sdpa and interior and 3-3-g2")
def interior_padding_taken_for_right_padding(patch: pytest.MonkeyPatch) -> None:
    right = nsa_varlen.pack

    def pack(x: Tensor, mask: Tensor, **counts: int) -> Any:
        return right(x, mask.sort(1, descending=True).values, **counts)

    patch.setattr(nsa_varlen, "pack", pack)


@mutant(f"{VARLEN}/test_collate.py", "next_token_loss and default")
def first_labels_kept_by_the_collation(patch: pytest.MonkeyPatch) -> None:
    right = nsa_varlen.collate_tokens

    def collate_tokens(*args: Any, **kwargs: Any) -> Any:
        batch = right(*args, **kwargs)
        return batch | {"labels": batch["input_ids"].clone()}

    patch.setattr(nsa_varlen, "collate_tokens", collate_tokens)


@mutant(f"{ROUTING}/test_planning.py", "a_denial_holds")
def denials_ignored_for_requests(patch: pytest.MonkeyPatch) -> None:
    right = planning._judge

    def judge(name: str, environment: Any, asked: Any, problem: Problem, policy: Policy, *rest: Any) -> Any:
        kept = asked if rest[-1] else asked.model_copy(update={"denials": {}})
        return right(name, environment, kept, problem, policy, *rest)

    patch.setattr(planning, "_judge", judge)


@mutant(f"{ROUTING}/test_thresholds.py", "inclusive")
def thresholds_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = planning._outside

    def outside(threshold: Any, problem: Problem) -> str | None:
        return right(threshold, replace(problem, total_q=max(0, problem.total_q - 1)))

    patch.setattr(planning, "_outside", outside)


@mutant(f"{ROUTING}/test_thresholds.py", "agrees_with_the_plan")
def routes_remembered_across_a_threshold(patch: pytest.MonkeyPatch) -> None:
    right = dispatching._cuts

    def cuts(asked: Any) -> dict:
        return {op: tuple(tuple(cut + 1 for cut in by_length) for by_length in x) for op, x in right(asked).items()}

    patch.setattr(dispatching, "_cuts", cuts)


@mutant(f"{ROUTING}/test_finiteness.py", "beside_an_infinity or may_be_minus_infinity")
def a_nan_lse_passes(patch: pytest.MonkeyPatch) -> None:
    def result_finite(result: Any) -> Tensor | None:
        out, lse = (result, torch.zeros(1)) if isinstance(result, Tensor) else result
        verdict = finiteness.all_finite((out,))
        return None if verdict is None else verdict & ~(lse.detach().amax() == torch.inf)

    patch.setattr(finiteness, "result_finite", result_finite)
    patch.setattr(route, "result_finite", result_finite)


@mutant(f"{ROUTING}/test_faults.py", "recomputed_in_the_same_call and inf")
def a_breaker_never_closes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Breaker, "closed", property(lambda self: False, lambda self, value: None))


@mutant(f"{ROUTING}/test_profiles.py", "takes_an_entry_away")
def extending_replaces_whole_sections(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(profile, "_merge", lambda base, over, depth=0: base | over)


@mutant(f"{ROUTING}/test_planning.py", "stops_a_route")
def a_wrong_triton_is_not_fatal(patch: pytest.MonkeyPatch) -> None:
    right = planning.Rejected
    patch.setattr(planning, "Rejected", lambda backend, reason, fatal=False: right(backend, reason))


@mutant(f"{ROUTING}/test_faults.py", "bad_inputs_is_the_callers")
def bad_inputs_blamed_on_the_backend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(route, "inputs_finite", lambda args: None)


@mutant("tests-integration/test_decisions.py", "design_promises or of_the_table")
def safe_takes_what_is_not_measured(patch: pytest.MonkeyPatch) -> None:
    right = planning._held_back

    def held_back(name: str, asked: Any, problem: Problem, policy: Policy) -> str | None:
        return right(name, asked, problem, replace(policy, fa2="1"))

    patch.setattr(planning, "_held_back", held_back)


FOLD, SELECTED = f"{FA2}/test_branches.py", f"{FA2}/test_selected.py"


@mutant(FOLD, "test_uniform_batches and 4-2-w1 and compressed and not every_size")
def fold_one_position_late(patch: pytest.MonkeyPatch) -> None:
    right = Spans.of
    patch.setattr(Spans, "of", lambda q_len, k_len, blocks: right(q_len, k_len - 1, blocks))


@mutant(f"{FA2}/test_plans.py", "every_two and l6-d3")
def head_of_the_fold_sees_one_block_more(patch: pytest.MonkeyPatch) -> None:
    right = Spans.of

    def of(q_len: Tensor, k_len: Tensor, blocks: BlockGeometry) -> Spans:
        spans = right(q_len, k_len, blocks)
        return spans._replace(head_keys=torch.minimum(spans.head_keys + 1, blocks.num_compressed(k_len)))

    patch.setattr(Spans, "of", of)


@mutant(FOLD, "tail_of_two")
def ends_of_the_fold_run_causally(patch: pytest.MonkeyPatch) -> None:
    right = branches.Part

    patch.setattr(branches, "Part", lambda *args, **kwargs: replace(right(*args, **kwargs), causal=True))


@mutant(FOLD, "test_uniform_batches and 4-2-w1 and compressed and not every_size")
def keys_of_phases_ordered_as_keys_of_heads(patch: pytest.MonkeyPatch) -> None:
    right = Dense.keys

    def keys(self: Dense, x: Tensor, copies: int = 1) -> Tensor:
        if copies == 1 or self.apart:
            return right(self, x, copies)
        return self._view(x).repeat_interleave(copies, 2)

    patch.setattr(Dense, "keys", keys)


@mutant(FOLD, "test_uniform_batches and 4-2-w1 and compressed and not every_size")
def one_phases_gradient_for_all(patch: pytest.MonkeyPatch) -> None:
    right = Dense.add

    def add(self: Dense, x: Tensor, grads: Tensor, copies: int = 1) -> None:
        right(self, x, grads[:1].expand_as(grads) if self.apart else grads, copies)

    patch.setattr(Dense, "add", add)


@mutant(FOLD, "test_ragged_batches and 4-2-w1 and compressed and not every_few")
def gradients_of_packed_keys_in_the_next_row(patch: pytest.MonkeyPatch) -> None:
    right = Packed.add

    def add(self: Packed, x: Tensor, grads: Tensor, copies: int = 1) -> None:
        right(self, x, grads.roll(1, 0), copies)

    patch.setattr(Packed, "add", add)


@mutant(f"{FA2}/test_isolation.py", "without_anything and not selected")
def rows_that_see_nothing_left_unwritten(patch: pytest.MonkeyPatch) -> None:
    for rows in (Dense, Packed, Masked):
        patch.setattr(rows, "fill", lambda self, x, value: None)


@mutant(f"{FA2}/test_calls.py", "few_sequences and ragged and window")
def rows_that_see_nothing_written_over(patch: pytest.MonkeyPatch) -> None:
    """In a window of several calls, by what a kernel has for an lse of such rows."""
    right = attention._in_parts

    def in_parts(q: Tensor, k: Tensor, v: Tensor, kernel: Any, branch: Any, *rest: Any) -> Any:
        out, lse, raw = right(q, k, v, kernel, branch, *rest)
        return out, torch.where(lse == -torch.inf, torch.inf, lse) if branch.parts[0].causal else lse, raw

    patch.setattr(attention, "_in_parts", in_parts)


@mutant(f"{FA2}/test_calls.py", "workspace_changes and compressed")
def last_phases_left_out_of_a_small_workspace(patch: pytest.MonkeyPatch) -> None:
    right = attention.chunks
    patch.setattr(attention, "chunks", lambda phases, count: right(phases, count)[: max(1, count - 1)])


@mutant(f"{FA2}/test_calls.py", "added_up_in_fp32")
def gradients_of_calls_added_up_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "promote_types", lambda dtype, _: dtype)


@mutant(FOLD, "test_ragged_batches and 6-3-w7 and window and not every_few")
def window_one_too_wide_in_fa2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fa2_backend, "window_branch", one_more(fa2_backend.window_branch))


@mutant(f"{FA2}/test_pages.py", "pages_of_a_window and ragged")
def first_key_of_a_window_left_in_its_page(patch: pytest.MonkeyPatch) -> None:
    right = fa2_backend.window_rows

    def window_rows(k: Any, v: Any, layout: VarlenLayout, blocks: BlockGeometry) -> Any:
        return right(k, v, layout, replace(blocks, window_size=blocks.window_size - 1))

    patch.setattr(fa2_backend, "window_rows", window_rows)


@mutant(FOLD, "the_default_geometry")
def lse_with_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    for name in ("_whole", "_in_parts"):
        right = getattr(attention, name)

        def attend(*args: Any, right: Callable = right) -> Any:
            out, lse, raw = right(*args)
            return out, -lse, raw

        patch.setattr(attention, name, attend)


@mutant(SELECTED, "test_any_lists and prefill and not at_all")
def later_keys_of_the_own_block_not_hidden(patch: pytest.MonkeyPatch) -> None:
    right = Chunk._segments

    def segments(self: Chunk, group: int, places: int) -> Any:
        size = places // self.block.shape[-1]
        self.num_keys = (self.num_keys + size - 1) // size * size
        return right(self, group, places)

    patch.setattr(Chunk, "_segments", segments)


@mutant(SELECTED, "list_is_a_set")
def duplicates_counted_twice_in_fa2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gathering, "distinct_blocks", lambda block_indices: block_indices.long().sort(-1).values)


@mutant(SELECTED, "test_any_lists and ragged and by-block and not at_all")
def gradients_of_gathered_keys_to_the_other_head(patch: pytest.MonkeyPatch) -> None:
    right = ByBlock.scatter

    def scatter(self: ByBlock, chunk: Chunk, grads: Tensor, out: Tensor) -> None:
        own = torch.zeros_like(out)
        right(self, chunk, grads, own)
        out += own.unflatten(0, (chunk.block.shape[1], -1)).flip(0).flatten(0, 1)

    patch.setattr(ByBlock, "scatter", scatter)


# The first tier plants one mistake of each kind; the second, its like in the same or another implementation.
FIRST_TIER = {
    "eq_9_off_by_one_in_the_oracle",
    "gradients_of_gathered_keys_to_the_other_head",
    "last_key_of_the_previous_sequence_let_in",
    "thresholds_off_by_one",
    "top_left_mask_in_sdpa",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """In the inner run: which mistake to plant; none by default."""
    parser.addoption("--mutant", choices=sorted(MUTANTS))


def pytest_configure(config: pytest.Config) -> None:
    """In the inner run: plant it."""
    if name := config.getoption("--mutant"):
        MUTANTS[name][0](pytest.MonkeyPatch())


def pytest_runtest_makereport(call: pytest.CallInfo) -> None:
    """In the inner run: end at once, with a status of its own, if something else than an assertion fails."""
    fine = (AssertionError, pytest.fail.Exception, pytest.skip.Exception)
    if call.excinfo is not None and (call.when != "call" or not call.excinfo.errisinstance(fine)):
        pytest.exit(f"not an assertion: {call.excinfo!r}", returncode=NOT_AN_ASSERTION)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """In the inner run: the same for a file that cannot be read; with -x pytest would call it a failed test."""
    if report.failed:
        pytest.exit(f"not an assertion: {report.longreprtext}", returncode=NOT_AN_ASSERTION)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *arguments, "-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command += ["-p", Path(__file__).stem]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST_TIER else pytest.mark.slow) for n in MUTANTS])
def test_a_planted_mistake_is_noticed(name: str) -> None:
    done = run("--mutant", name, *MUTANTS[name][1])
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_without_a_mistake_the_same_tests_pass() -> None:
    files = sorted({part for _, selection in MUTANTS.values() for part in selection if part.endswith(".py")})
    words = " or ".join(sorted({selection[-1] for _, selection in MUTANTS.values()} - {"(test)"}))
    done = run(*files, "-k", words)
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_file_that_does_not_import_is_no_failed_assertion(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    assert run(str(tmp_path)).returncode == NOT_AN_ASSERTION


def test_the_first_tier_names_mutants() -> None:
    assert set(MUTANTS) >= FIRST_TIER
