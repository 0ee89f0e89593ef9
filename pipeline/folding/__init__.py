"""Folding: linear regions of a network become single convolutions."""

from pipeline.folding.closed_form import ClosedFormResult, UnitFit, closed_form_fold
from pipeline.folding.closeness import Closeness, closeness
from pipeline.folding.counters import Counts, count
from pipeline.folding.fold import FoldResult, Segment, Skipped, fold
from pipeline.folding.selection import Selection, select_units
from pipeline.folding.sensitivity import Sensitivity, scan
from pipeline.folding.units import Unit, find_activations, find_units, linearise
from pipeline.folding.windows import WindowFit, WindowOptions

__all__ = [
    "ClosedFormResult",
    "Closeness",
    "Counts",
    "FoldResult",
    "Segment",
    "Selection",
    "Sensitivity",
    "Skipped",
    "Unit",
    "UnitFit",
    "WindowFit",
    "WindowOptions",
    "closed_form_fold",
    "closeness",
    "count",
    "find_activations",
    "find_units",
    "fold",
    "linearise",
    "scan",
    "select_units",
]
