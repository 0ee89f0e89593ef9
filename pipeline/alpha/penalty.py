"""The penalty that draws α to 1, and the weights c_l of its terms.

Source: Ben Dror et al., "Layer Folding", BMVC 2022, equation 2: L = L_task + λ_c Σ_l c_l (1 − α_l^p).
"""

__all__ = ["penalty", "weights_from_savings"]

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.alpha import surgery
from pipeline.errors import UnitError, nearest


def penalty(student: nn.Module, p: float = 2.0, weights: Mapping[str, float] | None = None) -> Tensor:
    """Σ_l c_l (1 − α_l^p) over the α that still train, shape (); multiply it by λ_c.

    Args:
        student: What `attach` returned.
        p: The exponent; with p > 1 the pull grows with α, so units decide for one side.
        weights: c_l by unit or layer name; missing ones, or None, weigh 1 (the paper).

    Raises:
        UnitError: A weight names no α, or there is no α at all.
    """
    alphas = surgery.alphas(student)
    if not alphas:
        raise UnitError("the network has no α to penalise", hint="call alpha.attach first")
    for name in weights or {}:
        if name not in alphas:
            raise UnitError(f"penalty weight for unknown α '{name}'", hint=nearest(name, alphas))
    free = {name: alpha for name, alpha in alphas.items() if alpha.requires_grad}
    if not free:
        return next(iter(alphas.values())).new_zeros(())
    stacked = torch.stack(list(free.values()))
    scale = stacked.new_tensor([1.0 if weights is None else weights.get(name, 1.0) for name in free])
    return (scale * (1.0 - stacked.pow(p))).sum()


def weights_from_savings(savings: Mapping[str, float]) -> dict[str, float]:
    """Penalty weights in proportion to what folding each unit saves, with mean 1 over the positive savings.

    Args:
        savings: MACs or milliseconds saved by folding each unit; a unit that would cost more gets weight 0,
            so nothing draws its α up.

    Raises:
        UnitError: Folding saves nothing anywhere.
    """
    gains = {name: max(float(saved), 0.0) for name, saved in savings.items()}
    positive = [gain for gain in gains.values() if gain > 0]
    if not positive:
        raise UnitError(
            "folding saves nothing in any of the units, so no penalty weight is positive",
            hint="use uniform weights, or choose other units or another target",
        )
    mean = sum(positive) / len(positive)
    return {name: gain / mean for name, gain in gains.items()}
