"""Splits that share no document, and mixtures with exact shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.data.selection import mixture_shares, split_documents, take_tokens
from forgather.errors import DataError


def test_shares_are_exact():
    available = {"a": 10_000, "b": 10_000, "c": 10_000}
    taken, warnings = mixture_shares(available, {"a": 3, "b": 2, "c": 1}, 6000)
    assert taken == {"a": 3000, "b": 2000, "c": 1000}
    assert warnings == []


def test_a_shortfall_is_made_up_by_the_others():
    taken, warnings = mixture_shares({"a": 100, "b": 1000}, {"a": 0.5, "b": 0.5}, 1000)
    assert taken == {"a": 100, "b": 900}
    assert len(warnings) == 1
    assert "source a has 100 tokens, 400 short" in warnings[0]


def test_more_than_there_is_takes_all_and_says_so():
    taken, warnings = mixture_shares({"a": 100, "b": 200}, {"a": 1, "b": 1}, 1000)
    assert taken == {"a": 100, "b": 200}
    assert "700 fewer than asked for" in warnings[-1]


def test_without_a_total_it_is_the_largest_with_exact_shares():
    assert mixture_shares({"a": 100, "b": 1000}, {"a": 1, "b": 3}, None) == ({"a": 100, "b": 300}, [])


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 100)), min_size=1, max_size=6),
    st.none() | st.integers(1, 10**7),
)
@settings(max_examples=100, deadline=None)
def test_shares_never_exceed_what_there_is_and_add_up(sources, total):
    available = {str(i): tokens for i, (tokens, _) in enumerate(sources)}
    weights = {str(i): weight for i, (_, weight) in enumerate(sources)}
    taken, _ = mixture_shares(available, weights, total)
    assert all(0 <= taken[name] <= available[name] for name in available)
    if total is not None:
        assert sum(taken.values()) == min(total, sum(available.values()))
    else:
        whole = sum(weights.values())
        for name in available:
            assert abs(taken[name] - sum(taken.values()) * weights[name] / whole) <= 1


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 50)), min_size=2, max_size=60), st.floats(0.01, 0.5))
@settings(max_examples=100, deadline=None)
def test_a_split_shares_nothing_and_is_never_empty(documents, fraction):
    lengths = np.array([length for length, _ in documents])
    hashes = np.array([number for _, number in documents], np.uint64)
    try:
        validates = split_documents(lengths, hashes, fraction, "source")
    except DataError:
        return
    assert validates.any()
    assert not validates.all()
    assert not set(hashes[validates]) & set(hashes[~validates])


def test_the_split_holds_its_fraction_and_does_not_depend_on_the_order():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 5000)
    hashes = random.integers(0, 2**64, 5000, dtype=np.uint64)
    validates = split_documents(lengths, hashes, 0.05, "source")
    assert 0 <= lengths[validates].sum() / lengths.sum() - 0.05 < 100 / lengths.sum()
    moved = random.permutation(5000)
    assert np.array_equal(split_documents(lengths[moved], hashes[moved], 0.05, "source"), validates[moved])


def test_what_cannot_be_split_is_an_error_with_a_way_out():
    one = np.array([7, 7]), np.array([1, 1], np.uint64)
    with pytest.raises(
        DataError, match=r"one document only(.|\n)*validation_fraction to 0 and train with `main.evaluation=null`"
    ):
        split_documents(*one, 0.1, "source")
    assert not split_documents(*one, 0, "source").any()
    with pytest.raises(DataError, match=r"too small for a validation split of 0\.1"):
        split_documents(np.array([100, 1]), np.array([1, 2], np.uint64), 0.1, "source")


def test_a_part_of_a_source_is_taken_by_hash_and_cut_to_the_token():
    lengths = np.array([10, 10, 10, 10])
    hashes = np.array([4, 1, 3, 2], np.uint64)
    assert take_tokens(lengths, hashes, np.array([True, True, True, False]), 15).tolist() == [0, 10, 5, 0]
