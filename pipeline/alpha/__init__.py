"""α-training: activations that fade into identities, and borders that fade with them.

from pipeline import alpha
student = alpha.attach(model, units=["blocks.3.2"])
ready = alpha.settle(student, threshold=0.9)
"""

from pipeline.alpha.activation import AlphaActivation, is_activation
from pipeline.alpha.padding import RingConv2d
from pipeline.alpha.penalty import penalty, weights_from_savings
from pipeline.alpha.replacement import AlphaUnit, attach_replacements
from pipeline.alpha.schedule import AlphaSchedule, apply_
from pipeline.alpha.surgery import (
    activations,
    alphas,
    attach,
    clamp_,
    freeze_,
    hold_,
    parameters,
    ring_report,
    set_values,
    settle,
    snap_,
    values,
)

__all__ = [
    "AlphaActivation",
    "AlphaSchedule",
    "AlphaUnit",
    "RingConv2d",
    "activations",
    "alphas",
    "apply_",
    "attach",
    "attach_replacements",
    "clamp_",
    "freeze_",
    "hold_",
    "is_activation",
    "parameters",
    "penalty",
    "ring_report",
    "set_values",
    "settle",
    "snap_",
    "values",
    "weights_from_savings",
]
