"""The loss of one batch, all of its terms together but the α penalty."""

__all__ = ["Objective"]

from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.data.sources import ImageSource
from pipeline.errors import TrainingError
from pipeline.training import losses
from pipeline.training.config import FitConfig
from pipeline.training.mixing import Mixing

_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Objective:
    """(1−w)·task + w·KL + feature distance, for a student and perhaps a teacher.

    A context manager: hooks that read features live as long as the context.

    Args:
        model: The student.
        teacher: Its teacher; moved to the device and set to evaluation.
        train: Says how many classes there are and whether there are labels.
        config: Weights of the terms, mixed precision, memory order, compilation.
        device: Where both networks run.

    Raises:
        TrainingError: A term needs labels or a teacher that is not there.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, train: ImageSource, config: FitConfig, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        wants_teacher = config.distill_weight > 0 or bool(config.feature_units)
        if wants_teacher and teacher is None:
            raise TrainingError("distillation has a weight but no teacher is given", hint="give fit(teacher=…)")
        if config.distill_weight < 1 and not train.labelled:
            raise TrainingError(
                f"{train.name} has no labels, so only distillation can teach",
                hint="set distill_weight to 1 and give a teacher",
            )
        self.teacher = teacher.to(device).eval() if wants_teacher and teacher is not None else None
        if self.teacher is not None and config.channels_last:
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features: losses.FeatureMatch | None = None
        if config.feature_units and self.teacher is not None:
            self.features = losses.FeatureMatch(model, self.teacher, config.feature_units)
        self.mixing: Mixing | None = None
        if config.mixup > 0 or config.cutmix > 0:
            if train.num_classes is None:
                raise TrainingError(f"mixup needs classes, but {train.name} has none", hint="set mixup and cutmix to 0")
            self.mixing = Mixing(config, train.num_classes)
        self.student: nn.Module = cast(nn.Module, torch.compile(model)) if config.compile else model
        self._stack = ExitStack()

    def __enter__(self) -> "Objective":
        if self.features is not None:
            self._stack.enter_context(self.features)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss of a batch, shape ().

        Args:
            images: Tensor[N, 3, H, W] float32, on any device.
            labels: Tensor[N] int64, −1 where there is no label.
            step: Optimiser step, which decides mixup.
        """
        config = self.config
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = None
        if self.mixing is not None:
            images, targets = self.mixing(images, labels, step)
        precision = _AMP_TYPES.get(config.amp)
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            logits = self.student(images)
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(images)
        weight = config.distill_weight
        terms = []
        if weight < 1:
            value = (
                losses.task(logits, labels, config.label_smoothing)
                if targets is None
                else losses.mixed_task(logits, targets)
            )
            terms.append((1 - weight) * value)
        if weight > 0 and wanted is not None:
            terms.append(weight * losses.distillation(logits, wanted, config.distill_temperature))
        if self.features is not None:
            terms.append(config.feature_weight * self.features.loss())
        return torch.stack(terms).sum()
