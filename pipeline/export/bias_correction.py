"""Bias correction: takes the mean error that weight rounding causes out of each layer's bias.

Rounding the weights of a channel shifts its output by a constant on average, E[W̃x] − E[Wx] = E[(W̃−W)x]; the bias
absorbs it (Nagel et al., ICCV 2019, section 4.2, the empirical form: layer by layer, on the inputs that the already
quantised layers before it produce).
"""

__all__ = ["correct_biases", "rounded_weight"]

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from pipeline.export.layers import Weighted, is_inside, watch_outputs, weighted_layers

_LEVELS = 127


def rounded_weight(layer: Weighted, *, per_channel: bool = True) -> Tensor:
    """The weights as symmetric int8 represents them, as float32.

    Args:
        layer: A convolution or a linear layer; output channels lie along axis 0.
        per_channel: One scale per output channel; one for the tensor otherwise.
    """
    weight = layer.weight.detach().double()
    if per_channel:
        largest = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        largest = weight.abs().max()
    step = (largest / _LEVELS).clamp_min(1e-30)
    return ((weight / step).round().clamp(-_LEVELS, _LEVELS) * step).float()


def correct_biases(
    network: fx.GraphModule,
    images: Iterable[npt.NDArray[np.float32]],
    *,
    per_channel: bool = True,
    float_layers: Iterable[str] = (),
) -> tuple[fx.GraphModule, dict[str, float]]:
    """Corrects every layer's bias for the rounding of all weights up to and including its own.

    Args:
        network: A lowered network; it is not changed.
        images: Calibration images, batches [N, C, H, W]; a few dozen do. One layer's output for all of them is in
            memory at a time.
        per_channel: How the weights will be quantised.
        float_layers: Names of layers or units that will stay float32: they are not rounded, but absorb what comes in.

    Returns:
        A copy with float weights as before and corrected biases, to be quantised; and the largest correction of
        each layer, in units of its output.
    """
    batches = [np.asarray(batch, dtype=np.float32) for batch in images]
    wanted = _means(network, list(weighted_layers(network)), batches)
    corrector = _Corrector(copy.deepcopy(network), wanted, per_channel, tuple(float_layers))
    with torch.no_grad():
        corrector.run(torch.from_numpy(np.concatenate(batches)))
    result = copy.deepcopy(network)
    for name, layer in weighted_layers(result).items():
        bias = torch.zeros_like(corrector.shifts[name]) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(bias + corrector.shifts[name])
    return result, {name: float(shift.abs().max()) for name, shift in corrector.shifts.items()}


class _Corrector(fx.Interpreter):
    """Runs all images through the rounded layers together, correcting each output as it is made.

    So each layer sees what the corrected layers before it produce, in one pass instead of one per layer.
    """

    def __init__(
        self, network: fx.GraphModule, wanted: dict[str, Tensor], per_channel: bool, kept: tuple[str, ...]
    ) -> None:
        super().__init__(network)
        self._wanted = wanted
        self.shifts: dict[str, Tensor] = {}
        for name, layer in weighted_layers(network).items():
            if not is_inside(name, kept):
                layer.weight.data.copy_(rounded_weight(layer, per_channel=per_channel))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(target, args, kwargs)
        if target not in self._wanted:
            return output
        axes = [axis for axis in range(output.ndim) if axis != 1]
        shift = (self._wanted[target] - output.double().mean(axes)).float()
        self.shifts[target] = shift
        return output + shift.reshape(1, -1, *[1] * (output.ndim - 2))


def _means(network: fx.GraphModule, names: list[str], batches: list[npt.NDArray[np.float32]]) -> dict[str, Tensor]:
    """The mean output per channel of each named layer, float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, output: Tensor) -> None:
        axes = [axis for axis in range(output.ndim) if axis != 1]
        sums[name] = sums.get(name, torch.zeros(output.shape[1], dtype=torch.float64)) + output.double().sum(axes)
        counts[name] = counts.get(name, 0) + output.numel() // output.shape[1]

    watch_outputs(network, names, batches, see)
    return {name: sums[name] / counts[name] for name in names}
