"""What a fine-tuning is asked to do, and what it reports."""

__all__ = ["FitConfig", "FitResult", "Progress"]

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from pipeline.errors import TrainingError
from pipeline.training.evaluate import Evaluation

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimiser": ("sgd", "adamw"),
    "schedule": ("cosine", "step", "onecycle", "constant"),
    "amp": ("off", "bf16", "fp16"),
}
_POSITIVE = ("epochs", "lr", "batch_size", "accumulate", "distill_temperature")
_NON_NEGATIVE = ("retries", "weight_decay", "warmup_epochs", "checkpoint_every_s", "feature_weight", "mixup", "cutmix")
_POSITIVE_IF_GIVEN = ("grad_clip", "patience", "max_steps")
_WHOLE = ("batch_size", "accumulate", "patience", "max_steps", "retries", "seed")
_FRACTIONS = ("momentum", "label_smoothing", "ema_decay", "distill_weight")


@dataclass(frozen=True)
class FitConfig:
    """One fine-tuning.

    Attributes:
        epochs: Passes over the training split; a fraction is allowed.
        lr: Peak learning rate.
        optimiser: SGD with Nesterov momentum, or AdamW.
        momentum: Of SGD; β₁ of AdamW.
        weight_decay: On kernels only: not on α, biases and norms.
        batch_size: Images of one optimiser step, over all processes and accumulated parts together.
        accumulate: Parts in which a batch goes through the network, to save memory.
        schedule: Shape of the learning rate after the warm-up.
        warmup_epochs: Epochs of linear rise from 0.
        label_smoothing: ε of the cross-entropy.
        ema_decay: Decay of the exponential moving average of weights that is returned; None for no averaging.
        grad_clip: Largest L2 norm of the gradient; None for no clipping.
        distill_weight: w in (1−w)·task + w·KL(teacher ‖ student).
        distill_temperature: T of the KL term, which is multiplied by T².
        feature_units: Modules whose outputs should match the teacher's modules of the same names.
        feature_weight: Factor of that term.
        freeze_bn: Keep BatchNorm's running statistics; scales and shifts still train.
        mixup: α of mixup's beta distribution; 0 is off.
        cutmix: α of CutMix's beta distribution; 0 is off.
        seed: Chooses order, augmentation and dropout.
        checkpoint_every_s: Seconds between checkpoints; there is one at the end of each epoch as well.
        max_steps: Ends the fine-tuning early, the schedule with it.
        amp: Mixed precision: bfloat16, float16 with loss scaling, or off.
        channels_last: Train in NHWC memory order, which CPUs and GPUs prefer; the network comes back in NCHW.
        compile: Run the network through torch.compile.
        patience: Stop when so many evaluations in a row brought no better one; None never stops early. What is
            returned is then chosen on the evaluation split: give a split that no report is made on.
        retries: How often a non-finite loss may send the fine-tuning back to its last checkpoint.

    Raises:
        TrainingError: A value is out of range.
    """

    epochs: float
    lr: float
    optimiser: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 128
    accumulate: int = 1
    schedule: Literal["cosine", "step", "onecycle", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    grad_clip: float | None = None
    distill_weight: float = 0.0
    distill_temperature: float = 1.0
    feature_units: tuple[str, ...] = ()
    feature_weight: float = 1.0
    freeze_bn: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0
    checkpoint_every_s: float = 20.0
    max_steps: int | None = None
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = True
    compile: bool = False
    patience: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise self._wrong(name, f"one of {', '.join(allowed)}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise self._wrong(name, "more than 0")
        for name in _POSITIVE_IF_GIVEN:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise self._wrong(name, "more than 0, or None")
        for name in _WHOLE:
            if not isinstance(getattr(self, name), int | None):
                raise self._wrong(name, "a whole number")
        for name in _NON_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise self._wrong(name, "at least 0")
        for name in _FRACTIONS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise self._wrong(name, "a fraction between 0 and 1")
        if self.batch_size % self.accumulate:
            raise self._wrong("accumulate", f"a divisor of batch_size {self.batch_size}")

    def _wrong(self, name: str, expected: str) -> TrainingError:
        return TrainingError(f"FitConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    def fingerprint(self) -> dict[str, str]:
        """What must be equal for a checkpoint to be continued: all but how often checkpoints are written."""
        ignored = ("checkpoint_every_s", "compile", "retries")
        return {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name not in ignored}


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning stands.

    Attributes:
        epoch: Epoch in progress, from 0.
        step: Optimiser steps done.
        total_steps: Optimiser steps in all.
        loss: Loss of the last step, penalty included.
        lr: Learning rate of the last step.
        alphas: α by unit or layer name; empty where there is none.
        images_per_s: Training throughput since this process began.
        note: Something out of the ordinary, such as a return to a checkpoint; else empty.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    lr: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    images_per_s: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class FitResult:
    """What a fine-tuning ended with.

    Attributes:
        model: The network that was given, trained in place, in evaluation mode.
        history: One row an epoch (`epoch`, `step`, `loss`, `lr`, `alphas`, `evaluation`) and one for each event
            (`event`, `step`, …), in order of time, earlier runs of a resumed fine-tuning included.
        alpha_trace: α at up to 200 evenly spaced steps (`step`, `alphas`); empty without α.
        final: The last evaluation, where an evaluation split was given.
        steps: Optimiser steps done.
        resumed_at: Step of the checkpoint that was continued; None for a fresh start.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    alpha_trace: list[dict[str, Any]]
    final: Evaluation | None
    steps: int
    resumed_at: int | None
