"""Everything that changes while a network is fine-tuned, and its way into and out of a checkpoint."""

__all__ = ["TrainState"]

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.alpha.activation import AlphaActivation
from pipeline.alpha.replacement import AlphaUnit
from pipeline.errors import TrainingError
from pipeline.training.average import MovingAverage


@dataclass
class TrainState:
    """A fine-tuning in progress.

    Attributes:
        model: The network, on its device.
        optimiser: With its momenta.
        scaler: Loss scaling for float16; idle otherwise.
        average: The moving average, if asked for.
        fingerprint: What a checkpoint must agree with to be continued.
        step: Optimiser steps done.
        rate_scale: 1, halved for each return after a non-finite loss.
        history: See FitResult.
        alpha_trace: See FitResult.
        loss_sum: Sum of the losses of the running epoch.
        best: Best score so far, for early stopping.
        best_state: The weights that reached it.
        stale: Evaluations since then.
        stopped: Whether early stopping ended the fine-tuning.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: MovingAverage | None
    fingerprint: dict[str, str]
    step: int = 0
    rate_scale: float = 1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    alpha_trace: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    best: float | None = None
    best_state: dict[str, torch.Tensor] | None = None
    stale: int = 0
    stopped: bool = False

    _PLAIN = (
        "step", "rate_scale", "history", "alpha_trace", "loss_sum", "best", "best_state", "stale", "stopped",
    )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """A snapshot for `checkpoint.save`. Random states are no part of it: each step seeds its own."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "frozen": {m.group: m.frozen for m in self.model.modules() if isinstance(m, AlphaActivation | AlphaUnit)},
            "fingerprint": self.fingerprint,
            **{name: copy.copy(getattr(self, name)) for name in self._PLAIN},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes back to a snapshot.

        Raises:
            TrainingError: The snapshot belongs to another fine-tuning.
        """
        differing = [
            f"{name} was {saved['fingerprint'].get(name, 'missing')}, is {value}"
            for name, value in self.fingerprint.items()
            if saved["fingerprint"].get(name) != value
        ]
        if differing:
            raise TrainingError(
                f"the checkpoint belongs to another fine-tuning: {'; '.join(differing[:3])}",
                hint="delete the checkpoint folder to start over, or give another one",
            )
        for module in self.model.modules():
            if isinstance(module, AlphaActivation | AlphaUnit):
                module.freeze(saved["frozen"][module.group])
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        for name in self._PLAIN:
            setattr(self, name, copy.copy(saved[name]))

    def is_finite(self) -> bool:
        """Whether every trained weight is a number, so that a checkpoint of it is worth keeping."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
