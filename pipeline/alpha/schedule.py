"""How α is driven through a fine-tuning: the penalty's strength, forced annealing, and the final snap."""

__all__ = ["AlphaSchedule", "apply_"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pipeline.alpha import surgery
from pipeline.errors import TrainingError


@dataclass(frozen=True)
class AlphaSchedule:
    """The auxiliary loss λ_c Σ_l c_l (1 − α_l^p), and what happens to α outside the loss.

    Positions in the fine-tuning are fractions of its optimiser steps, in [0, 1].

    Attributes:
        lambda_c: λ_c, the price of keeping a non-linearity.
        p: Exponent of the penalty.
        threshold: τ; an activation with α above it goes.
        alpha_lr: Learning rate of α; None takes the network's.
        weights: c_l by unit or layer name; None is 1 for all (the paper).
        lambda_warmup: Fraction of the fine-tuning over which λ_c rises linearly from 0.
        anneal: α to bring to 1 whatever the loss says, by name.
        anneal_order: All at once, or one after another in the order given.
        anneal_fraction: Fraction of the fine-tuning by which the last of them is at 1.
        snap_at: Fraction after which every α is fixed at 1 or 0 by the threshold, so that the rest of the
            fine-tuning trains the network that will be settled; None leaves that to `settle`.

    Raises:
        TrainingError: A value is out of range.
    """

    lambda_c: float = 0.25
    p: float = 2.0
    threshold: float = 0.9
    alpha_lr: float | None = None
    weights: Mapping[str, float] | None = None
    lambda_warmup: float = 0.0
    anneal: tuple[str, ...] = ()
    anneal_order: Literal["together", "sequential"] = "together"
    anneal_fraction: float = 0.5
    snap_at: float | None = None

    def __post_init__(self) -> None:
        for name, low in (("lambda_c", 0.0), ("p", 1.0)):
            if not getattr(self, name) >= low:  # NaN is neither
                raise TrainingError(f"AlphaSchedule.{name} is {getattr(self, name)}, expected at least {low:g}")
        if self.alpha_lr is not None and not self.alpha_lr >= 0.0:
            raise TrainingError(f"AlphaSchedule.alpha_lr is {self.alpha_lr}, expected at least 0, or None")
        for name in ("threshold", "lambda_warmup", "anneal_fraction", "snap_at"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise TrainingError(f"AlphaSchedule.{name} is {value}, expected a fraction between 0 and 1")

    def lambda_at(self, position: float) -> float:
        """λ_c at a position of the fine-tuning."""
        if position >= self.lambda_warmup or self.lambda_warmup == 0:
            return self.lambda_c
        return self.lambda_c * position / self.lambda_warmup

    def rests_at(self, free: Iterable[str]) -> float:
        """Position from which no α moves any more, so that what is trained is what will be settled; 1 for never.

        Args:
            free: The α that train, by name.
        """
        if self.snap_at is None and not set(free) <= set(self.anneal):
            return 1.0
        return max(self.anneal_fraction if self.anneal else 0.0, self.snap_at or 0.0)

    def annealed(self, position: float) -> dict[str, float]:
        """The forced α at a position: each rises linearly and ends at exactly 1."""
        done = 1.0 if self.anneal_fraction == 0 else min(position / self.anneal_fraction, 1.0)
        if self.anneal_order == "together":
            return dict.fromkeys(self.anneal, done)
        turns = done * len(self.anneal)
        return {name: min(max(turns - turn, 0.0), 1.0) for turn, name in enumerate(self.anneal)}


def apply_(student: nn.Module, schedule: AlphaSchedule, position: float) -> None:
    """Sets what the schedule dictates for the optimiser step at `position`; learned α are left alone.

    Raises:
        UnitError: `schedule.anneal` names no α of the student.
    """
    forced = schedule.annealed(position)
    if forced:
        surgery.freeze_(student, forced)
    if schedule.snap_at is not None and position >= schedule.snap_at:
        free = [group for group, alpha in surgery.alphas(student).items() if alpha.requires_grad]
        if not free:
            return
        now = surgery.values(student)
        surgery.freeze_(student, {group: 1.0 if now[group] > schedule.threshold else 0.0 for group in free})
