"""Checks of option values, so that a slip of the pen is named and not taken for a choice."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.errors import FoldError, nearest

__all__ = ["check_at_least", "check_one_of"]


def check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        FoldError: Names the option, the value, the nearest allowed one and all of them.
    """
    if value not in allowed:
        near = nearest(value, allowed) if isinstance(value, str) else ""
        raise FoldError("; ".join(filter(None, [f"{name} is {value!r}", near])), hint=f"one of {', '.join(allowed)}")


def check_at_least(name: str, value: float, least: float, *, above: bool = False, whole: bool = False) -> None:
    """Refuses a number below a bound.

    Args:
        name: Of the option.
        value: The number; NaN and infinity are refused.
        least: The bound.
        above: Whether the bound itself is refused.
        whole: Whether the number must be an integer.

    Raises:
        FoldError: Names the option, the value and the bound.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and not (whole and not isinstance(value, int)) and (value > least if above else value >= least):
        return
    kind = "a whole number" if whole else "a number"
    raise FoldError(f"{name} is {value!r}, expected {kind} {'above' if above else 'of at least'} {least}")
