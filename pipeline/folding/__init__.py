"""Folding: linear regions of a network become single convolutions."""

from pipeline.folding.counters import Counts, count
from pipeline.folding.fold import FoldResult, Segment, Skipped, fold
from pipeline.folding.units import Unit, find_activations, find_units, linearise

__all__ = [
    "Counts",
    "FoldResult",
    "Segment",
    "Skipped",
    "Unit",
    "count",
    "find_activations",
    "find_units",
    "fold",
    "linearise",
]
