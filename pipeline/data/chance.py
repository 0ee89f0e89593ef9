"""Random numbers as a function of (seed, epoch, index) and nothing else.

Training draws from these, so a run that resumes at step k of an epoch, or reads with another number of workers,
sees the very same images. The mixer is SplitMix64's finaliser (Steele, Lea and Flood 2014), applied to every word
in turn; unlike numpy's generators its stream is part of this code and does not change between releases.
"""

__all__ = ["order", "sample_seed", "words"]

import numpy as np

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]], *keys: int) -> Words:
    """One uniform 64-bit word per index.

    Args:
        indices: int64 array[n] of sample indices.
        keys: Whole numbers that name the stream, e.g. seed, epoch and purpose.

    Returns:
        uint64 array[n].
    """
    state: Words = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix(state ^ np.uint64(key & 0xFFFF_FFFF_FFFF_FFFF))
    return _mix(_mix(indices.astype(np.uint64) + _GOLDEN) ^ state)


def order(count: int, *keys: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A permutation of range(count), int64 array[count], chosen by the keys."""
    return np.argsort(words(np.arange(count, dtype=np.int64), *keys), kind="stable").astype(np.int64)


def sample_seed(index: int, *keys: int) -> int:
    """A seed for one sample's own generator, within 63 bits."""
    return int(words(np.array([index], dtype=np.int64), *keys)[0] >> np.uint64(1))


def _mix(state: Words) -> Words:
    # Wrap-around is meant: these are arithmetics modulo 2**64 (numpy does not warn for arrays).
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)
