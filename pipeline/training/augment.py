"""RandAugment by timm around any image source, repeatable from seed, epoch and step."""

__all__ = ["RandAugmented"]

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.errors import TrainingError


class RandAugmented:
    """An image source whose training images go through RandAugment; evaluation is left as it is.

    Source: Cubuk et al., "RandAugment", 2020; timm's implementation.

    Args:
        source: What is augmented, after its own crops and flips.
        preprocessing: Its mean and standard deviation, to get pixels back from normalised images.
        policy: timm's notation: "rand-m9-mstd0.5-inc1" is two operations of magnitude 9 ± 0.5.

    Raises:
        TrainingError: timm does not understand the policy.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing, policy: str = "rand-m9-mstd0.5-inc1") -> None:
        from pipeline.models.torchvision_repair import repair

        repair()
        from timm.data.auto_augment import rand_augment_transform

        self.source, self.preprocessing = source, preprocessing
        options: dict[str, Any] = {
            "translate_const": round(0.45 * preprocessing.input_px),
            "img_mean": tuple(round(255 * value) for value in preprocessing.mean),
        }
        if "mmax" not in policy:
            # At magnitude 10 timm asks Pillow to keep 0 bits a channel, which Pillow refuses.
            options["magnitude_max"] = 9.9
        try:
            self._augment: Any = rand_augment_transform(policy, options)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise TrainingError(
                f"'{policy}' is no RandAugment policy: {error}", hint="write it as rand-m9-mstd0.5-inc1"
            ) from error

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def labelled(self) -> bool:
        """Whether the source has labels."""
        return self.source.labelled

    @property
    def num_classes(self) -> int | None:
        """The source's classes."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The source's class names."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def steps(self, batch_size: int, train: bool = False) -> int:
        """Batches of one pass."""
        return self.source.steps(batch_size, train)

    def describe(self, i: int) -> str:
        """Names sample i."""
        return self.source.describe(i)

    def paths(self, i: int) -> str | None:
        """File of sample i."""
        return self.source.paths(i)

    def batches(
        self, batch_size: int, *, train: bool = False, seed: int = 0, epoch: int = 0, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource; with `train`, each image is augmented by chance of (seed, epoch, step) alone."""
        given = self.source.batches(batch_size, train=train, seed=seed, epoch=epoch, start_step=start_step)
        if not train:
            yield from given
            return
        for step, (images, labels) in enumerate(given, start=start_step):
            yield self._augmented(images, np.random.SeedSequence([seed, epoch, step])), labels

    def _augmented(self, images: Tensor, chance: np.random.SeedSequence) -> Tensor:
        prep = self.preprocessing
        mean = torch.tensor(prep.mean).reshape(1, 3, 1, 1)
        std = torch.tensor(prep.std).reshape(1, 3, 1, 1)
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        # timm draws from the two global generators; what others draw from them must not change because of that.
        python_before, numpy_before = random.getstate(), np.random.get_state()
        words = chance.generate_state(2)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        try:
            changed = np.stack([np.asarray(self._augment(Image.fromarray(image))) for image in pixels])
        finally:
            random.setstate(python_before)
            np.random.set_state(numpy_before)
        return prep.normalise(torch.from_numpy(changed).permute(0, 3, 1, 2))
