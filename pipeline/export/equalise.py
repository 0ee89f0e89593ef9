"""Cross-layer equalisation: moves weight range between neighbouring layers without changing the function.

For two layers with nothing but a ReLU between them, W2·relu(W1·x + b1) = (W2·S)·relu(S⁻¹·(W1·x + b1)) for any positive
diagonal S, and s_i = sqrt(r1_i / r2_i) gives channel i the same range on both sides (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, equations 8 to 11). ReLU6 clips at 6 and so is
not positively homogeneous: a channel may only be scaled where the clip is never reached before or after, which this
module decides from the activations that calibration images produce.
"""

__all__ = ["EqualisedPair", "equalise"]

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from pipeline.export.layers import Weighted, is_depthwise, watch_outputs

_CLIP = 6.0
# A calibration set does not show the largest activation there is: this share of the clip stays free.
_HEADROOM = 0.9
_SCALE_LIMIT = 1e3


@dataclass(frozen=True)
class EqualisedPair:
    """Two layers whose ranges were traded.

    Attributes:
        first, second: The layers' names.
        channels: Channels between them.
        scaled: How many of them were scaled.
        spread_before, spread_after: Largest over median channel range of the first layer.
    """

    first: str
    second: str
    channels: int
    scaled: int
    spread_before: float
    spread_after: float


def equalise(
    network: fx.GraphModule, images: Iterable[npt.NDArray[np.float32]], *, sweeps: int = 4
) -> tuple[fx.GraphModule, list[EqualisedPair]]:
    """Equalises every pair of layers that only a ReLU, a ReLU6 or nothing separates.

    Args:
        network: A lowered network; it is not changed.
        images: Calibration images, batches [N, C, H, W], read once per call; needed for the ReLU6 rule.
        sweeps: Passes over all pairs: a layer in the middle of a chain shares with both neighbours.

    Returns:
        The equalised copy, which computes the same on images like these, and a record of each pair.
    """
    result = copy.deepcopy(network)
    pairs = _pairs(result)
    largest = _largest_outputs(result, [first for first, _, _ in pairs], images)
    before = {first: _spread(_layer(result, first)) for first, _, _ in pairs}
    scaled: dict[str, npt.NDArray[np.bool_]] = {}
    for _ in range(sweeps):
        for first, second, activation in pairs:
            scale = _scale(_layer(result, first), _layer(result, second), activation, largest[first])
            _apply(_layer(result, first), _layer(result, second), scale)
            largest[first] = largest[first] / scale.numpy()
            moved = (scale != 1.0).numpy()
            scaled[first] = moved | scaled.get(first, np.zeros_like(moved))
    records = [
        EqualisedPair(
            first,
            second,
            len(largest[first]),
            int(scaled[first].sum()),
            before[first],
            _spread(_layer(result, first)),
        )
        for first, second, _ in pairs
    ]
    return result, records


def _layer(network: fx.GraphModule, name: str) -> Weighted:
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer


def _pairs(network: fx.GraphModule) -> list[tuple[str, str, str]]:
    """Names of layers that follow each other, with what stands between: ``"relu"``, ``"relu6"`` or ``""``."""
    found = []
    for node in network.graph.nodes:
        if node.op != "call_module" or not isinstance(network.get_submodule(node.target), nn.Conv2d | nn.Linear):
            continue
        following, activation = _only_user(node), ""
        if following is not None and following.op == "call_module":
            between = network.get_submodule(str(following.target))
            if isinstance(between, nn.ReLU6 | nn.ReLU):
                activation = "relu6" if isinstance(between, nn.ReLU6) else "relu"
                following = _only_user(following)
        if following is None or following.op != "call_module":
            continue
        second = network.get_submodule(str(following.target))
        if isinstance(second, nn.Conv2d | nn.Linear) and _shares_channels(second):
            found.append((str(node.target), str(following.target), activation))
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _shares_channels(second: Weighted) -> bool:
    """Whether each input channel of a layer has weights of its own (grouped, but not depthwise, layers mix them)."""
    return isinstance(second, nn.Linear) or second.groups == 1 or is_depthwise(second)


def _largest_outputs(
    network: fx.GraphModule, names: list[str], images: Iterable[npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float64]]:
    """The largest value before the activation, per channel of each layer."""
    largest: dict[str, npt.NDArray[np.float64]] = {}

    def see(name: str, output: Tensor) -> None:
        axes = [axis for axis in range(output.ndim) if axis != 1]
        values = output.amax(axes).double().numpy()
        largest[name] = np.maximum(largest.get(name, values), values)

    watch_outputs(network, names, images, see)
    return largest


def _input_range(layer: Weighted) -> Tensor:
    weight = layer.weight.detach().double().abs()
    if isinstance(layer, nn.Conv2d) and is_depthwise(layer):
        return weight.flatten(1).amax(1)
    return weight.transpose(0, 1).flatten(1).amax(1)


def _output_range(layer: Weighted) -> Tensor:
    return layer.weight.detach().double().abs().flatten(1).amax(1)


def _spread(layer: Weighted) -> float:
    ranges = _output_range(layer)
    return float(ranges.max() / ranges.median().clamp_min(1e-30))


def _scale(first: Weighted, second: Weighted, activation: str, largest: npt.NDArray[np.float64]) -> Tensor:
    """The divisor of each of the first layer's output channels."""
    own, other = _output_range(first), _input_range(second)
    alive = (own > 0) & (other > 0)
    scale = torch.where(alive, (own / other.clamp_min(1e-30)).sqrt(), 1.0).clamp(1 / _SCALE_LIMIT, _SCALE_LIMIT)
    if activation != "relu6":
        return scale
    seen = torch.from_numpy(largest)
    ceiling = _CLIP * _HEADROOM
    # Dividing by s multiplies what is seen by 1/s, which must stay below the clip; a channel at the clip is not moved.
    smallest = (seen / ceiling).clamp_min(1 / _SCALE_LIMIT)
    return torch.where(seen < ceiling, torch.maximum(scale, smallest), 1.0)


def _apply(first: Weighted, second: Weighted, scale: Tensor) -> None:
    with torch.no_grad():
        outputs = scale.reshape(-1, *[1] * (first.weight.ndim - 1))
        first.weight.copy_((first.weight.double() / outputs).float())
        if first.bias is not None:
            first.bias.copy_((first.bias.double() / scale).float())
        if isinstance(second, nn.Conv2d) and is_depthwise(second):
            inputs = scale.reshape(-1, 1, 1, 1)
        else:
            inputs = scale.reshape(1, -1, *[1] * (second.weight.ndim - 2))
        second.weight.copy_((second.weight.double() * inputs).float())
