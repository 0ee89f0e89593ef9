"""A data set in memory whose classes a linear map can tell apart, and a network for it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class TinySource:
    """Random images; class c is brighter in its own corner. Order and noise come from (seed, epoch, index)."""

    class_names = ("a", "b", "c", "d")

    def __init__(self, count: int = 64, *, labelled: bool = True, px: int = 8, poison_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(count)
        self.name = f"tiny/{count}"
        self.labelled = labelled
        self.num_classes: int | None = 4 if labelled else None
        self.labels = torch.arange(count) % 4
        self.images = 0.5 * torch.randn(count, 3, px, px, generator=generator)
        half = px // 2
        for index, label in enumerate(self.labels.tolist()):
            top, left = half * (label // 2), half * (label % 2)
            self.images[index, :, top : top + half, left : left + half] += 1.0
        self.poison_at = poison_at
        self.served = 0

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int, train: bool = False) -> int:
        return len(self) // batch_size if train else -(-len(self) // batch_size)

    def describe(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def paths(self, i: int) -> str | None:
        return None

    def batches(
        self, batch_size: int, *, train: bool = False, seed: int = 0, epoch: int = 0, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self))
        if train:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for step in range(start_step, self.steps(batch_size, train)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            images = self.images[chosen].clone()
            if train:
                noise = torch.Generator().manual_seed(10_000 * seed + 100 * epoch + step)
                images += 0.1 * torch.randn(images.shape, generator=noise)
                self.served += 1
                if self.served == self.poison_at:
                    images[0, 0, 0, 0] = torch.nan
            labels = self.labels[chosen] if self.labelled else torch.full((len(chosen),), -1)
            yield images, labels


def tiny_network(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions with norms and ReLU6, pooled to four logits."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )
