"""How good a network is: against labels where there are any, and against a teacher where there is one."""

__all__ = ["Evaluation", "evaluate"]

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.sources import ImageSource
from pipeline.errors import TrainingError


@dataclass(frozen=True)
class Evaluation:
    """Scores over one split.

    Attributes:
        top1: Fraction of labelled images whose best class is right; None without labels.
        top5: Fraction whose five best classes hold the right one; None without labels or with five classes or fewer.
        agreement: Fraction of images on which student and teacher name the same class; None without a teacher.
        kl: Mean KL(teacher ‖ student) in nats; None without a teacher.
        count: Images evaluated.
        labelled: How many of them have a label.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    count: int
    labelled: int = 0

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for results and checkpoints."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    source: ImageSource,
    *,
    batch_size: int = 128,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Evaluates a classifier on a whole split, in order and unaugmented.

    Args:
        model: Maps Tensor[N, 3, H, W] to logits Tensor[N, classes]; its training mode is given back afterwards.
        source: The images; labels of −1 count as none.
        batch_size: Images at a time; no figure depends on it.
        teacher: A network to agree with.
        device: Where to run; both networks are moved there.

    Raises:
        TrainingError: The split is empty.
    """
    networks = [network for network in (model, teacher) if network is not None]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.to(device).eval()
    counts = dict.fromkeys(("images", "labelled", "top1", "top5", "same"), 0)
    divergence = 0.0
    classes = 0
    try:
        with torch.inference_mode():
            for images, labels in source.batches(batch_size):
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                logits = model(images).float()
                classes = logits.shape[1]
                counts["images"] += len(images)
                known = labels >= 0
                counts["labelled"] += int(known.sum())
                ranks = _ranks(logits[known], labels[known])
                counts["top1"] += int((ranks < 1).sum())
                counts["top5"] += int((ranks < 5).sum())
                if teacher is not None:
                    wanted = teacher(images).float()
                    counts["same"] += int((wanted.argmax(1) == logits.argmax(1)).sum())
                    divergence += float(_kl(wanted, logits).sum(dtype=torch.float64))
    finally:
        for module, training in modes:
            module.training = training
    if counts["images"] == 0:
        raise TrainingError(f"{source.name} holds no image to evaluate on", hint="give a split with images")
    labelled, images_seen = counts["labelled"], counts["images"]
    return Evaluation(
        top1=counts["top1"] / labelled if labelled else None,
        top5=counts["top5"] / labelled if labelled and classes > 5 else None,
        agreement=counts["same"] / images_seen if teacher is not None else None,
        kl=divergence / images_seen if teacher is not None else None,
        count=images_seen,
        labelled=labelled,
    )


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes score higher than the right one, Tensor[N]; NaN logits rank last."""
    right = logits.gather(1, labels.unsqueeze(1))
    higher = (logits > right).sum(1)
    return torch.where(logits.isnan().any(1), logits.shape[1], higher)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence of each image's class distribution, Tensor[N], in nats."""
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
