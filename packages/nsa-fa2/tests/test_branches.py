"""Do the window and the compressed branch give the oracle's results and gradients, whatever lengths the batch has?

`test_plans` goes through every batch without computing; here attention runs, over the plain kernel.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from nsa_fa2.kernel import Limits
from nsa_fa2.testing import ANYTHING, DENSE_ONLY, Case, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.testing import random_inputs
from torch import Tensor

Kind = tuple[int, int]  # q_len, k_len
CMP, WIN = "compressed_attention", "window_attention"
# l-d-w
GEOMETRIES = {
    "3-1-w4": BlockGeometry(3, 1, 3, 3, window_size=4),
    "4-2-w1": BlockGeometry(4, 2, 4, 3, window_size=1),
    "6-3-w7": BlockGeometry(6, 3, 6, 3, window_size=7),
    "3-3-w99": BlockGeometry(3, 3, 3, 3, window_size=99),
}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 4, "v_head_dim": 3}


def check(op: str, kinds: list[Kind], blocks: BlockGeometry, limits: Limits = ANYTHING, **sizes: int) -> None:
    layout = VarlenLayout.from_lengths(*(list(side) for side in zip(*kinds, strict=True)))
    seed = sum(q_len + 100 * k_len for q_len, k_len in kinds)
    case = Case.random(op, layout, blocks, seed=seed, **(HEADS | sizes))
    case.assert_oracles(plain_backend(limits=limits), f"of {kinds}")


def kinds_of(blocks: BlockGeometry, longest: int | None = None) -> list[Kind]:
    """Every one up to a length at which there are two whole rows behind any head, and a tail; or to another length."""
    longest = blocks.kernel_size + 3 * blocks.kernel_stride + 1 if longest is None else longest
    return list(product(range(longest + 1), repeat=2))


@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_uniform_batches(name: str, op: str) -> None:
    """Every (q_len, k_len), of batches of 1, 2 and 3 in turn."""
    for number, kind in enumerate(kinds_of(GEOMETRIES[name])):
        check(op, [kind] * (1 + number % 3), GEOMETRIES[name])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_sequence_whose_phases_are_no_batch(name: str) -> None:
    """For kernels that would copy interleaved sequences."""
    for kind in kinds_of(GEOMETRIES[name]):
        check(CMP, [kind], GEOMETRIES[name], replace(ANYTHING, interleaved=False))


@pytest.mark.slow
@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_uniform_batches_of_every_size(name: str, op: str) -> None:
    blocks = GEOMETRIES[name]
    for kind, size in product(kinds_of(blocks, 4 * (blocks.kernel_size + blocks.kernel_stride)), (1, 2, 3)):
        check(op, [kind] * size, blocks)


@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ragged_batches(name: str, op: str) -> None:
    """Every (q_len, k_len), eight to a batch."""
    kinds = kinds_of(GEOMETRIES[name])
    mixed = [kinds[number * 7919 % len(kinds)] for number in range(len(kinds))]  # a step that no length divides
    assert set(mixed) == set(kinds)
    for start in range(0, len(mixed), 8):
        check(op, mixed[start : start + 8], GEOMETRIES[name])


# No keys, no queries, queries before the first key; positions 0 to 3, 3 to 5 and so on: a head, a row, a tail or two.
DIFFERENT = [(0, 0), (0, 9), (4, 0), (7, 3), (1, 8), (2, 10), (3, 11), (5, 13), (9, 14), (12, 12), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [2, 3])
def test_ragged_batches_of_every_few(name: str, op: str, size: int) -> None:
    for kinds in product(DIFFERENT, repeat=size):
        check(op, list(kinds), GEOMETRIES[name])


@pytest.mark.parametrize("size", [1, 2])
def test_a_tail_of_two_with_nothing_before_it_sees_what_it_completes(size: int) -> None:
    """Positions 8 and 9 both see blocks 0, 1 and 2 of l=3, d=3: a causal call would hide the last from the first."""
    blocks = GEOMETRIES["3-3-w99"]
    layout = VarlenLayout.from_lengths([2] * size, [10] * size)
    q, _, _, _ = random_inputs(layout, heads=1, kv_heads=1, head_dim=2)
    k, v = torch.zeros(3 * size, 1, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(size, 1)[:, None]
    out, lse = plain_backend().compressed_attention(q, k, v, layout, blocks)
    assert torch.equal(out, torch.full_like(out, 1 / 3))
    assert torch.equal(lse, torch.full_like(lse, 3.0).log())


@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize(
    "lengths", [([300], [300]), ([70, 70], [190, 190]), ([150, 1, 33], [150, 222, 90])], ids=["one", "two", "ragged"]
)
def test_the_default_geometry(op: str, lengths: tuple[list[int], list[int]]) -> None:
    layout = VarlenLayout.from_lengths(*lengths)
    Case.random(op, layout, BlockGeometry(window_size=64)).assert_oracles(plain_backend())


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("op", [CMP, WIN])
def test_groups_of_heads(op: str, group: int) -> None:
    for kv_heads, kinds in product((1, 3), ([(14, 14)], [(5, 14)] * 2, [(13, 20), (1, 9)])):
        check(op, kinds, GEOMETRIES["6-3-w7"], heads=group * kv_heads, kv_heads=kv_heads, head_dim=3)


@pytest.mark.parametrize("op", [CMP, WIN])
def test_scale(op: str) -> None:
    layout, blocks = VarlenLayout.from_lengths([9, 3], [17, 3]), GEOMETRIES["4-2-w1" if op == CMP else "6-3-w7"]
    case = Case.random(op, layout, blocks)
    case.assert_oracles(plain_backend(), scale=0.1)
    plain, scaled = (getattr(plain_backend(), op)(*case[1:4], *case.rest, scale=scale)[1] for scale in (None, 0.1))
    assert not torch.equal(plain, scaled)


def test_a_kernel_without_windows_and_packed_batches_is_enough_for_the_compressed_branch_of_whole_prefills() -> None:
    for blocks, length, size in product(GEOMETRIES.values(), range(30), (1, 2, 3)):
        layout = VarlenLayout.from_lengths([length] * size)
        Case.random(CMP, layout, blocks, **HEADS).assert_oracles(plain_backend(limits=DENSE_ONLY), (length, size))


@pytest.mark.parametrize("op", [CMP, WIN])
def test_the_oracle_is_not_asked_of_itself(op: str) -> None:
    """What these tests compare with tells a wrong result: one value, one gradient, one lse."""
    layout, blocks = VarlenLayout.from_lengths([9, 3], [17, 3]), GEOMETRIES["6-3-w7"]
    case = Case.random(op, layout, blocks)

    def spoilt(got: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        x = got[name].clone()
        x[0, 0] += 1e-5
        return got | {name: x}

    exact = case.run(reference)
    case.assert_close(exact, exact)
    for name in exact:
        with pytest.raises(AssertionError, match=rf"^{name} of {op}"):
            case.assert_close(spoilt(exact, name), exact)
