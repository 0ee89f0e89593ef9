"""The optimiser and its parameter groups."""

__all__ = ["build", "set_rate"]

import torch
from torch import nn

from pipeline import alpha
from pipeline.errors import TrainingError
from pipeline.training.config import FitConfig


def build(model: nn.Module, config: FitConfig, alpha_lr: float | None) -> torch.optim.Optimizer:
    """Makes the optimiser: kernels decay; biases and norms do not; α has its own rate and no decay.

    Args:
        model: The network; parameters without gradient are left out, α excepted, which may be freed later.
        config: Rates and kind.
        alpha_lr: Peak rate of α; None takes the network's.

    Raises:
        TrainingError: Nothing can be trained.
    """
    alphas = alpha.parameters(model)
    known = {id(parameter) for parameter in alphas}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if not others and not alphas:
        raise TrainingError("no parameter of the network requires a gradient", hint="unfreeze some of its layers")
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay, "peak": config.lr},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "peak": config.lr},
        {"params": alphas, "weight_decay": 0.0, "peak": config.lr if alpha_lr is None else alpha_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to a share of its own peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
