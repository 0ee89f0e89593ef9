"""Choosing which units to fold: as much saved as the wanted closeness to the teacher allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import FoldError, UnitError
from pipeline.folding.closed_form import ClosedFormResult, closed_form_fold
from pipeline.folding.closeness import Closeness, closeness
from pipeline.folding.sensitivity import Sensitivity, scan
from pipeline.folding.walk import Images

__all__ = ["Selection", "Trial", "select_units"]

_NOTHING = "folding saves nothing in any unit"
_OTHERWISE = "choose units by another measure, or none"


@dataclass(frozen=True)
class Trial:
    """One unit tried on top of those chosen before it.

    Args:
        unit: Its name.
        saving: What folding it saves, in the unit of the savings given (MACs where none were).
        closeness: Of the network with this and the chosen units folded, on the selection images.
        accepted: Whether it was kept.
    """

    unit: str
    saving: float
    closeness: Closeness
    accepted: bool


@dataclass(frozen=True)
class Selection:
    """What `select_units` returns.

    Args:
        units: The chosen units in network order; may be empty.
        result: The network with these folded; None where none was chosen.
        trials: Everything tried, in order.
        scan: Every unit alone.
    """

    units: tuple[str, ...]
    result: ClosedFormResult | None
    trials: tuple[Trial, ...]
    scan: tuple[Sensitivity, ...]


def select_units(
    model: nn.Module,
    images: Images,
    selection: Images,
    *,
    keep_agreement: float,
    savings: Mapping[str, float] | None = None,
    units: Collection[str] | None = None,
    patience: int = 3,
    on_unit: Callable[[int, int], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    **fold_options: Any,
) -> Selection:
    """Folds units one after another, the one that saves most for each prediction lost first.

    A unit is kept if the network with it still agrees with the teacher often enough; each trial fits all chosen units
    anew in network order, so that later ones make up for earlier ones. Counted in MACs, the network must also cost less
    than without the unit: neighbours that are single activations become one convolution together, which may be large.

    Args:
        model: The teacher; not changed.
        images: What to fit to.
        selection: What to decide on: not the images fitted to, nor those reported on.
        keep_agreement: Least share of selection images whose most likely class stays, 0 to 1.
        savings: What folding each unit saves, in any unit (ms of a latency table); units not in it, and units that
            save nothing, are left out. MACs where None.
        units: Names to choose from; every foldable unit where None.
        patience: Stop after so many units in a row were not kept.
        on_unit: Called during the scan with (units done, units in all).
        on_trial: Called after each trial.
        **fold_options: Of `closed_form_fold`; `refit` and the like.

    Raises:
        FoldError: `keep_agreement` is not a share.
        UnitError: No unit saves anything.
    """
    if not 0 < keep_agreement <= 1:
        raise FoldError(f"keep_agreement is {keep_agreement}, expected a share above 0 and at most 1")
    if savings is not None and max(savings.values(), default=0.0) <= 0:
        raise UnitError(_NOTHING, hint=_OTHERWISE)  # before the scan, which takes long
    rows = scan(model, images, selection, units=units, on_unit=on_unit)
    saved = {row.unit: float(row.macs_before - row.macs_after) for row in rows} if savings is None else savings
    useful = [row for row in rows if saved.get(row.unit, 0.0) > 0]
    if not useful:
        raise UnitError(_NOTHING, hint=_OTHERWISE)

    def bargain(row: Sensitivity) -> float:
        # One image is the finest loss that the selection can show; divergence settles what agreement cannot.
        lost = max(1 - row.closed_form.agreement, 1 / row.closed_form.count) + row.closed_form.kl
        return saved[row.unit] / lost

    order = [row.unit for row in rows]
    chosen: list[str] = []
    result: ClosedFormResult | None = None
    trials: list[Trial] = []
    refused = 0
    for row in sorted(useful, key=bargain, reverse=True):
        wanted = sorted([*chosen, row.unit], key=order.index)
        candidate = closed_form_fold(model, wanted, images, **fold_options)
        measured = closeness(model, candidate.model, selection)
        cheaper = savings is not None or _macs_saved(candidate) > (_macs_saved(result) if result else 0)
        accepted = measured.agreement >= keep_agreement and cheaper
        trials.append(Trial(row.unit, saved[row.unit], measured, accepted))
        if on_trial is not None:
            on_trial(trials[-1])
        if accepted:
            chosen, result, refused = wanted, candidate, 0
        else:
            refused += 1
            if refused >= patience:
                break
    return Selection(tuple(chosen), result, tuple(trials), tuple(rows))


def _macs_saved(result: ClosedFormResult) -> int:
    return sum(fit.macs_before - fit.macs_after for fit in result.units)
