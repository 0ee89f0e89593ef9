"""What a fine-tuning minimises, apart from the α penalty."""

__all__ = ["FeatureMatch", "distillation", "mixed_task", "task"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import TrainingError, nearest


def task(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with label smoothing, averaged over the labelled images; 0 where none has a label.

    Args:
        logits: Tensor[N, classes].
        labels: Tensor[N] int64, −1 where there is no label.
        smoothing: ε: the target is (1−ε)·one-hot + ε/classes.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def mixed_task(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against distributions Tensor[N, classes], as mixup makes them."""
    return -(targets * F.log_softmax(logits.float(), 1)).sum(1).mean()


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(teacher ‖ student) of the softened classes, averaged over images.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student: Logits, Tensor[N, classes].
        teacher: Logits, Tensor[N, classes], without gradient.
        temperature: T.
    """
    log_q = F.log_softmax(student.float() / temperature, 1)
    log_p = F.log_softmax(teacher.float() / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class FeatureMatch:
    """Mean squared distance of a student's unit outputs to its teacher's, each in units of the teacher's variance.

    Usable as a context manager: the hooks that read the outputs live as long as the context.

    Args:
        student: The network that learns.
        teacher: The network to follow.
        units: Dotted names of modules that both have and whose outputs have equal shapes.

    Raises:
        TrainingError: A name is missing in either network.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, units: Sequence[str]) -> None:
        self.units = tuple(units)
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []
        self._networks = {"student": student, "teacher": teacher}
        for role, network in self._networks.items():
            known = dict(network.named_modules())
            for unit in self.units:
                if unit not in known:
                    raise TrainingError(
                        f"feature distillation: the {role} has no module '{unit}'", hint=nearest(unit, known)
                    )

    def __enter__(self) -> "FeatureMatch":
        for role, network in self._networks.items():
            for unit in self.units:
                self._handles.append(network.get_submodule(unit).register_forward_hook(self._reader(role, unit)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _reader(self, role: str, unit: str) -> Any:
        def read(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            self._seen[role, unit] = output

        return read

    def loss(self) -> Tensor:
        """The mean over units, after both networks ran on the same images; shape ()."""
        terms = []
        for unit in self.units:
            wanted = self._seen["teacher", unit].float()
            distance = F.mse_loss(self._seen["student", unit].float(), wanted)
            terms.append(distance / wanted.var().clamp(min=torch.finfo(torch.float32).tiny))
        self._seen.clear()
        return torch.stack(terms).mean()
