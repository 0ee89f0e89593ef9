"""The learning rate as a function of the step alone, so that nothing of it needs to be saved."""

__all__ = ["factor"]

import math

_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1e-4


def factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at an optimiser step.

    Args:
        schedule: "constant"; "cosine" to 0; "step" to 0.1 at half and 0.01 at three quarters (He et al. 2016,
            section 4.2); "onecycle", a cosine up over 30% of the steps and down over the rest (Smith 2018).
        step: From 0 to total_steps − 1.
        total_steps: Of the fine-tuning.
        warmup_steps: Steps of linear rise before the schedule begins; "onecycle" rises by itself.
    """
    if step < warmup_steps and schedule != "onecycle":
        return (step + 1) / (warmup_steps + 1)
    if schedule == "onecycle":
        return _onecycle(step / max(total_steps - 1, 1))
    position = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * position))
    if schedule == "step":
        return 1.0 if position < 0.5 else 0.1 if position < 0.75 else 0.01
    return 1.0


def _onecycle(position: float) -> float:
    if position < _ONECYCLE_RISE:
        return _between(_ONECYCLE_START, 1.0, position / _ONECYCLE_RISE)
    return _between(1.0, _ONECYCLE_END, (position - _ONECYCLE_RISE) / (1 - _ONECYCLE_RISE))


def _between(start: float, end: float, position: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * position))
