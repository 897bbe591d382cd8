"""The order of data: a permutation of each epoch, computed for any number alone."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.data.order import Permutation
from forgather.errors import DataError

sizes = st.integers(1, 3000)
seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 10**12)


@given(sizes, seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = Permutation(size, seed).samples(epoch * size, size)
    assert np.array_equal(np.sort(order), np.arange(size))


@given(sizes, seeds, st.integers(0, 10**15), st.integers(0, 70))
@settings(max_examples=60, deadline=None)
def test_a_range_is_the_single_samples(size, seed, first, count):
    order = Permutation(size, seed)
    assert order.samples(first, count).tolist() == [order.sample(n) for n in range(first, first + count)]


def test_seeds_and_epochs_give_other_orders():
    size = 1000
    orders = [Permutation(size, seed).samples(epoch * size, size) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Unrelated permutations share one place on average.
            assert np.count_nonzero(one == other) < 10


def test_each_block_is_as_likely_at_each_place():
    size, trials = 8, 8000
    counts = np.zeros((size, size))
    for seed in range(trials // 8):
        places = Permutation(size, seed).samples(0, 8 * size).reshape(8, size)
        for order in places:
            counts[np.arange(size), order] += 1
    expected = trials / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert chi_square < 49 + 5 * 9.9


def test_neighbours_do_not_stay_neighbours():
    order = Permutation(10_000, 5).samples(0, 10_000)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.05
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20


def test_the_last_of_a_billion_samples_is_as_near_as_the_first():
    order = Permutation(10**9, 1)

    def median_s(first: int) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            order.samples(first, 32)
            times.append(time.perf_counter() - start)
        return sorted(times)[4]

    assert median_s(10**9 - 32) < 20 * median_s(0) + 0.01


def test_the_state_of_another_order_is_refused():
    state = Permutation(10, 1).state_dict()
    Permutation(10, 1).load_state_dict(state)
    for other in (Permutation(10, 2), Permutation(11, 1)):
        with pytest.raises(DataError, match="another order"):
            other.load_state_dict(state)


def test_no_blocks_no_order():
    with pytest.raises(DataError, match="at least one block"):
        Permutation(0, 1)


def test_another_thread_may_be_an_epoch_ahead():
    """The loader's thread asks for the next step while the run may look at this one."""
    order = Permutation(10, 1)
    expected = [order.samples(10 * epoch, 10).tolist() for epoch in (0, 1)]

    class Contested(Permutation):
        """Another thread always comes between: what is kept is its own."""

        @property
        def _keys(self):
            return {}

        @_keys.setter
        def _keys(self, _): ...

    contested = Contested(10, 1)
    assert [contested.samples(10 * epoch, 10).tolist() for epoch in (0, 1)] == expected
