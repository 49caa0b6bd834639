"""Do the block sizes count what they say, and are impossible ones refused with their values?"""

import dataclasses

import pytest
import torch
from nsa_varlen import BlockGeometry

GEOMETRIES = [
    BlockGeometry(),
    BlockGeometry(kernel_size=1, kernel_stride=1, block_size=1, topk=3),
    BlockGeometry(kernel_size=4, kernel_stride=2, block_size=6, topk=3, window_size=5),
    BlockGeometry(kernel_size=9, kernel_stride=3, block_size=9, topk=5, init_blocks=0, local_blocks=1, window_size=1),
]


@pytest.mark.parametrize("blocks", GEOMETRIES)
def test_counts_are_those_of_enumeration(blocks: BlockGeometry) -> None:
    span = torch.arange(-3, 200)
    compressed, touched = blocks.num_compressed(span).tolist(), blocks.num_blocks(span).tolist()
    for length, num_compressed, num_blocks in zip(span.tolist(), compressed, touched, strict=True):
        complete = [i for i in range(length) if i * blocks.kernel_stride + blocks.kernel_size <= length]
        assert blocks.num_compressed(length) == num_compressed == len(complete)
        assert blocks.num_blocks(length) == num_blocks == len({token // blocks.block_size for token in range(length)})


@pytest.mark.parametrize("blocks", GEOMETRIES)
def test_the_budget_is_the_sum_of_its_parts_and_monotone(blocks: BlockGeometry) -> None:
    budget = [blocks.reads(length) for length in range(400)]
    assert budget == sorted(budget)
    for length in (0, 1, 63, 399):
        window = min(blocks.window_size, length)
        assert budget[length] == blocks.num_compressed(length) + blocks.topk * blocks.block_size + window


def test_the_defaults_are_the_papers() -> None:
    blocks = BlockGeometry()
    sizes = (blocks.kernel_size, blocks.kernel_stride, blocks.block_size, blocks.topk, blocks.window_size)
    assert sizes == (32, 16, 64, 16, 512)
    assert (blocks.init_blocks, blocks.local_blocks) == (1, 2)
    assert blocks.reads(65_536) == 4095 + 1024 + 512


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (
            {"kernel_size": 24},
            ValueError,
            r"kernel_stride: .*divisor of kernel_size, got kernel_size=24, kernel_stride=16",
        ),
        (
            {"block_size": 40},
            ValueError,
            r"kernel_stride: .*divisor of block_size, got block_size=40, kernel_stride=16",
        ),
        ({"kernel_size": 128}, ValueError, r"kernel_size: .*at most block_size, got kernel_size=128, block_size=64"),
        ({"topk": 2}, ValueError, r"topk: .*init_blocks \+ local_blocks, got topk=2, init_blocks=1, local_blocks=2"),
        ({"local_blocks": 0}, ValueError, r"local_blocks: expected at least 1, got 0"),
        ({"init_blocks": -1}, ValueError, r"init_blocks: expected at least 0, got -1"),
        ({"kernel_stride": 0}, ValueError, r"kernel_stride: expected at least 1, got 0"),
        ({"window_size": 0}, ValueError, r"window_size: expected at least 1, got 0"),
        ({"window_size": -5}, ValueError, r"window_size: expected at least 1, got -5"),
        ({"topk": 16.0}, TypeError, r"topk: expected an int, got 16\.0 of type float"),
        ({"block_size": True}, TypeError, r"block_size: expected an int, got True of type bool"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockGeometry(**sizes)


def test_no_initial_block_and_a_topk_of_forced_blocks_alone_are_possible() -> None:
    assert BlockGeometry(init_blocks=0, local_blocks=1, topk=1).topk == 1
    assert BlockGeometry(init_blocks=1, local_blocks=2, topk=3).topk == 3


def test_geometries_are_frozen_values() -> None:
    blocks = BlockGeometry()
    with pytest.raises(dataclasses.FrozenInstanceError):
        blocks.topk = 3  # type: ignore[misc]
    assert blocks == BlockGeometry()
    assert len({blocks, BlockGeometry(), BlockGeometry(topk=3)}) == 2
