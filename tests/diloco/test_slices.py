"""Slices are covered by whole blocks, and of the ranks that hold a box one speaks for it."""

from itertools import pairwise, product
from math import prod

import pytest
import torch

from forgather.diloco.messages import Slice
from forgather.diloco.slices import covering_ranges, runs

CASES = [
    ((), (), ()),
    ((7,), (2,), (3,)),
    ((300,), (0,), (300,)),
    ((10, 40), (3, 0), (4, 40)),
    ((10, 40), (0, 8), (10, 16)),
    ((10, 40), (2, 30), (3, 10)),
    ((4, 5, 6), (1, 0, 2), (2, 5, 3)),
    ((4, 5, 6), (1, 2, 0), (2, 2, 6)),
    ((4, 1, 6), (0, 0, 0), (4, 1, 6)),
    ((3, 500), (1, 100), (2, 100)),
]


def elements(shape, part):
    """The numbers of the slice's elements in the row-major whole, one by one."""
    whole = torch.arange(prod(shape)).reshape(shape)
    return whole[tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))].reshape(-1)


@pytest.mark.parametrize(("case", "block"), list(product(CASES, [1, 8, 128])))
def test_ranges_cover_the_slice_with_whole_blocks_and_no_block_without_an_element(case, block):
    shape, part = case[0], Slice("w", *case[1:])
    ranges = covering_ranges(shape, part, block)
    wanted = set(elements(shape, part).tolist())
    covered = {number for start, stop in ranges for number in range(start, stop)}
    assert wanted <= covered
    assert all(start % block == 0 and (stop % block == 0 or stop == prod(shape)) for start, stop in ranges)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    blocks = {number // block for number in wanted}
    assert {number // block for number in covered} == blocks


@pytest.mark.parametrize("case", CASES)
def test_runs_are_the_elements_of_the_slice_in_their_order(case):
    shape, part = case[0], Slice("w", *case[1:])
    starts, length = runs(shape, part)
    assert [start + step for start in starts for step in range(length)] == elements(shape, part).tolist()


def test_an_empty_slice_has_no_ranges():
    assert covering_ranges((4, 8), Slice("w", (4, 0), (0, 8)), 8) == []
