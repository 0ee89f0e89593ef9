"""Mixup and CutMix by timm, repeatable from the seed and the step."""

__all__ = ["Mixing"]

from typing import Any

import numpy as np
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.training.config import FitConfig


class Mixing:
    """Blends pairs of images of a batch and their labels.

    Args:
        config: `mixup`, `cutmix`, `label_smoothing`, `seed`.
        classes: Number of classes of the targets.
    """

    def __init__(self, config: FitConfig, classes: int) -> None:
        from pipeline.models.torchvision_repair import repair

        repair()
        from timm.data import Mixup

        self._seed = config.seed
        self._mix: Any = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixes one batch.

        Args:
            images: Tensor[N, 3, H, W], N even; not changed.
            labels: Tensor[N], all known.
            step: Optimiser step; with the seed it decides the mix.

        Returns:
            Mixed images, and targets Tensor[N, classes] that sum to 1.

        Raises:
            TrainingError: N is odd or a label is missing.
        """
        if len(images) % 2:
            raise TrainingError(f"mixup pairs images, but a batch has {len(images)}", hint="take an even batch_size")
        if bool((labels < 0).any()):
            raise TrainingError("mixup blends labels, but some images have none", hint="set mixup and cutmix to 0")
        # timm draws from NumPy's global generator; what others draw from it must not change because of that.
        before = np.random.get_state()
        np.random.seed((self._seed * 1_000_003 + step) % 2**32)
        try:
            mixed, targets = self._mix(images.clone(), labels)
        finally:
            np.random.set_state(before)
        return mixed, targets
