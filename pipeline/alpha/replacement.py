"""Fading a whole unit into one given layer, such as the convolution that least squares fits to it.

y = α·layer(x) + (1−α)·unit(x). At α=0 this is the original network, at α=1 the folded one, border included, since
the layer itself is what ships. Where `attach` starts the linear path at the unit's own kernels, whose output without
activations may be far from the unit's, this starts it at the best single layer.
"""

__all__ = ["AlphaUnit", "attach_replacements"]

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.alpha.activation import AlphaActivation, is_activation
from pipeline.errors import UnitError, nearest


class AlphaUnit(nn.Module):
    """A unit blended with its replacement by a trainable scalar α.

    Args:
        unit: The original block, Tensor[N, C, H, W] to Tensor[N, D, H', W'].
        replacement: A layer of the same input and output shapes; it trains along.
        alpha: Parameter of shape ().
        group: Name of the unit.
    """

    alpha: nn.Parameter

    def __init__(self, unit: nn.Module, replacement: nn.Module, alpha: nn.Parameter, group: str) -> None:
        super().__init__()
        self.unit, self.replacement, self.alpha, self.group = unit, replacement, alpha, group
        self.frozen: float | None = None
        self._of_unit = [name for name, p in unit.named_parameters() if p.requires_grad]
        self._of_replacement = [name for name, p in replacement.named_parameters() if p.requires_grad]

    def freeze(self, value: float | None) -> None:
        """Fixes α at `value`, or with None lets it train again; at exactly 0 or 1 only one of the two runs."""
        if value is not None:
            with torch.no_grad():
                self.alpha.fill_(value)
        self.frozen = value
        self.alpha.requires_grad_(value is None)
        # What does not run gets no gradient; data-parallel training would wait for it.
        for name in self._of_unit:
            self.unit.get_parameter(name).requires_grad_(value != 1.0)
        for name in self._of_replacement:
            self.replacement.get_parameter(name).requires_grad_(value != 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Blends the outputs of both."""
        if self.frozen == 1.0:
            return cast(Tensor, self.replacement(x))
        if self.frozen == 0.0:
            return cast(Tensor, self.unit(x))
        linear = self.replacement(x)  # first, since a block may work on its input in place
        return torch.lerp(self.unit(x), linear, self.alpha.to(linear.dtype))

    def extra_repr(self) -> str:
        """Shows α and the group in the printed model."""
        return f"alpha={float(self.alpha):.3f}, group={self.group!r}"


def attach_replacements(model: nn.Module, layers: Mapping[str, nn.Module], *, initial: float = 0.0) -> nn.Module:
    """Blends units with layers that may take their place; returns a copy of `model`.

    The functions of `pipeline.alpha` treat the result like that of `attach`; `settle` leaves the unit or the layer.

    Args:
        model: The network, activations in place.
        layers: The replacement of each unit by the unit's dotted name; copied.
        initial: The value of α at the start.

    Raises:
        UnitError: A name is no module of the network or is an activation, or the network has α already.
    """
    student = copy.deepcopy(model)
    modules = dict(student.named_modules())
    if any(isinstance(module, AlphaActivation | AlphaUnit) for module in modules.values()):
        raise UnitError("the network has α already", hint="attach to the plain model")
    reference = next(iter(student.parameters()), torch.zeros(()))
    for name, layer in layers.items():
        if not name or name not in modules:
            raise UnitError(f"{type(model).__name__} has no module '{name}'", hint=nearest(name, modules))
        if is_activation(modules[name]):
            raise UnitError(
                f"unit '{name}' is an activation: there is no block that one layer could replace",
                hint="use prefold.init=network",
            )
        alpha = nn.Parameter(torch.full((), float(initial), dtype=reference.dtype, device=reference.device))
        blend = AlphaUnit(modules[name], copy.deepcopy(layer), alpha, name)
        blend.train(modules[name].training)
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, blend)
    return student
