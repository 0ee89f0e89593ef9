"""The α-activation σ_α(x) = αx + (1−α)σ(x), a bridge from a non-linearity (α=0) to the identity (α=1).

Source: Ben Dror et al., "Layer Folding", BMVC 2022, equation 1.
"""

__all__ = ["AlphaActivation", "is_activation"]

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.alpha.blend import blend_clipped

_NOT_POINTWISE = (
    nn.MultiheadAttention,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.GLU,
    nn.RReLU,  # random in training, so α=0 would not be the original network twice
)


def is_activation(module: nn.Module) -> bool:
    """Says whether `module` is a pointwise non-linearity that α can blend: torch's own or timm's."""
    if isinstance(module, _NOT_POINTWISE):
        return False
    home = type(module).__module__
    return home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")


class AlphaActivation(nn.Module):
    """An activation module blended with the identity by a trainable scalar α.

    α is a parameter of shape () that several activations of one fold unit may share. Parameters of the
    activation itself (PReLU's slopes) stay registered under their own names, so a checkpoint of the plain
    network and one of the blended network differ by the `alpha` keys only.

    Args:
        activation: The non-linearity σ; any module for which `is_activation` holds.
        alpha: The shared scalar parameter.
        group: Name of the fold unit or layer whose α this is.
    """

    alpha: nn.Parameter

    def __init__(self, activation: nn.Module, alpha: nn.Parameter, group: str) -> None:
        super().__init__()
        self.group = group
        self.alpha = alpha
        # In a tuple, so that it is not a child module and adds no prefix to parameter names.
        self._held = (activation,)
        self._was_inplace = bool(getattr(activation, "inplace", False))
        if self._was_inplace:
            activation.__dict__["inplace"] = False  # the blend reads x again after σ(x)
        for name, parameter in activation.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.frozen: float | None = None
        self._trained = [
            name for name, parameter in activation.named_parameters(recurse=False) if parameter.requires_grad
        ]

    @property
    def activation(self) -> nn.Module:
        """The original non-linearity σ."""
        return self._held[0]

    def restore(self) -> nn.Module:
        """Gives the original activation back, as it was before it was blended."""
        activation = self.activation
        if self._was_inplace:
            activation.__dict__["inplace"] = True
        self._train_slopes(True)
        return activation

    def freeze(self, value: float | None) -> None:
        """Fixes α at `value`, or with None lets it train again; at exactly 0 or 1 the blend costs nothing."""
        if value is not None:
            with torch.no_grad():
                self.alpha.fill_(value)
        self.frozen = value
        self.alpha.requires_grad_(value is None)
        self._train_slopes(value != 1.0)

    def _train_slopes(self, yes: bool) -> None:
        """What does not run gets no gradient; data-parallel training would wait for it."""
        for name in self._trained:
            self.activation.get_parameter(name).requires_grad_(yes)

    def coefficient(self, like: Tensor) -> Tensor:
        """α as a tensor of shape () in `like`'s dtype (mixed precision runs σ_α in a lower one)."""
        return self.alpha.to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Blends a map of any shape; the result has the same shape."""
        if self.frozen == 1.0:
            return x
        sigma = self.activation
        if self.frozen == 0.0:
            return cast(Tensor, sigma(x))
        if isinstance(sigma, nn.ReLU6):
            return blend_clipped(x, self.alpha, 6.0)
        # ReLU, leaky ReLU and PReLU blended with the identity are leaky ReLUs of another slope: one kernel.
        if isinstance(sigma, nn.ReLU):
            return blend_clipped(x, self.alpha, math.inf) if x.device.type == "cpu" else self._leaky(x, 0.0)
        if isinstance(sigma, nn.LeakyReLU):
            return self._leaky(x, sigma.negative_slope)
        if isinstance(sigma, nn.PReLU):
            slope = sigma.weight.to(x.dtype)
            return F.prelu(x, torch.lerp(slope, torch.ones_like(slope), self.coefficient(x)))
        return torch.lerp(sigma(x), x, self.coefficient(x))

    def _leaky(self, x: Tensor, slope: float) -> Tensor:
        alpha = self.coefficient(x)
        return F.prelu(x, (alpha + (1.0 - alpha) * slope).reshape(1))

    def extra_repr(self) -> str:
        """Shows σ, α and the group in the printed model."""
        return f"{type(self.activation).__name__}, alpha={float(self.alpha):.3f}, group={self.group!r}"
