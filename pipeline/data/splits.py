"""Who belongs to which split, decided by content.

Equal content always lands in the same split, however often and under whatever name it occurs, so nothing that was
trained on is evaluated on.
"""

__all__ = ["SPLITS", "content_keys", "hold_out", "subset"]

import hashlib
from collections.abc import Iterable

import numpy as np

from pipeline.data import chance

SPLITS = ("train", "select", "calibration", "eval", "labelled")
"""`train` fits; `select` is held out of it to make choices by; `calibration` is drawn from train; `eval` is only ever
evaluated; `labelled` is a second, labelled set that is only evaluated."""

Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Keys = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

_SUBSET = 11


def content_keys(contents: Iterable[bytes | memoryview]) -> Keys:
    """A 64-bit key per content (BLAKE2b), uint64 array[n]; equal contents have equal keys."""
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def hold_out(keys: Keys, fraction: float) -> tuple[Indices, Indices]:
    """Parts samples into kept and held out, whole groups of equal content at a time.

    The groups with the smallest keys are held out, as many as come closest to the fraction of all groups: the answer
    does not depend on the samples' order or on any seed.

    Args:
        keys: uint64 array[n] from `content_keys`.
        fraction: Share of the distinct contents to hold out, 0 to 1.

    Returns:
        Indices of the kept and of the held-out samples, each ascending.
    """
    distinct = np.unique(keys)
    held = np.isin(keys, distinct[: round(fraction * len(distinct))])
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def subset(indices: Indices, split: str, limit: int | None, seed: int) -> Indices:
    """At most `limit` of the indices, ascending; all of them where there is no limit.

    The seed chooses what is trained on and calibrated with. What is evaluated on (`eval`, `select`) is the same for
    every seed, so that runs can be compared.
    """
    if limit is None or limit >= len(indices):
        return indices
    stream = seed if split in ("train", "calibration") else 0
    return np.sort(indices[chance.order(len(indices), stream, _SUBSET, SPLITS.index(split))[:limit]])
