"""How near a student's predictions are to its teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import FoldError
from pipeline.folding.walk import Images, as_batches

__all__ = ["Closeness", "Comparison", "closeness"]


@dataclass(frozen=True)
class Closeness:
    """How near a student's predictions are to its teacher's.

    Args:
        agreement: Share of images with the same most likely class, 0 to 1.
        kl: Mean Kullback-Leibler divergence of the student's distribution from the teacher's, in nats.
        count: Images compared.
    """

    agreement: float
    kl: float
    count: int


class Comparison:
    """Adds up agreement and divergence over batches."""

    def __init__(self) -> None:
        self.same = 0
        self.divergence = 0.0
        self.count = 0

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Adds the logits Tensor[N, classes] of a batch."""
        logs = student.double().log_softmax(1), teacher.double().log_softmax(1)
        self.divergence += float(F.kl_div(*logs, log_target=True, reduction="sum"))
        self.same += int((teacher.argmax(1) == student.argmax(1)).sum())
        self.count += teacher.shape[0]

    def result(self) -> Closeness:
        """The closeness over everything added.

        Raises:
            FoldError: Nothing was.
        """
        if not self.count:
            raise FoldError("no image was given to compare on", hint="pass images, or batches that can be read again")
        return Closeness(self.same / self.count, self.divergence / self.count, self.count)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts networks in evaluation mode, and every module back in its own mode afterwards.

    In training mode a norm would follow the images it sees, and so change the teacher that it is to be compared with.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def closeness(teacher: nn.Module, student: nn.Module, images: Images, *, batch_size: int = 32) -> Closeness:
    """Compares the logits Tensor[N, classes] of two networks in evaluation mode; neither is changed.

    Args:
        teacher: The reference.
        student: The network compared.
        images: As for `closed_form_fold`; no labels are needed.
        batch_size: Batches that a tensor of images is cut into.

    Raises:
        FoldError: There are no images.
    """
    compared = Comparison()
    with torch.no_grad(), _evaluating(teacher, student):
        for batch in as_batches(images, batch_size, again=False)():
            compared.add(teacher(batch), student(batch))
    return compared.result()
