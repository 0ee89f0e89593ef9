"""Chance that is a function of its keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import chance

MASK = 2**64 - 1


def mixed(state: int) -> int:
    """SplitMix64's output function in Python's unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0, as published with the reference implementation.
    assert [mixed(0), mixed(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.lists(st.integers(0, MASK), max_size=4), st.integers(0, 10**6))
def test_words_follow_the_definition(keys: list[int], index: int) -> None:
    state = 0
    for key in keys:
        state = mixed(state ^ key)
    expected = mixed(mixed((index + 0x9E3779B97F4A7C15) & MASK) ^ state)
    assert int(chance.words(np.array([index], dtype=np.int64), *keys)[0]) == expected


@given(st.integers(0, 300), st.integers(0, 2**31), st.integers(0, 100))
def test_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(chance.order(count, seed, epoch)) == list(range(count))


def test_keys_give_unrelated_orders() -> None:
    orders = [chance.order(1000, *keys) for keys in ((0, 0), (0, 1), (1, 0), (0, 0, 1), (0,))]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two random permutations of 1000 agree in about one place.
            assert np.count_nonzero(first == second) < 10
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


@pytest.mark.parametrize("shift", [0, 8, 32, 61])
def test_words_are_uniform(shift: int) -> None:
    draws = (chance.words(np.arange(80_000), 3, 7) >> np.uint64(shift)) % np.uint64(8)
    counts = np.bincount(draws.astype(np.int64), minlength=8)
    # Chi-square with 7 degrees of freedom: above 30 once in ten thousand.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30
