"""The weighted layers of a lowered network, and what flows out of them."""

__all__ = ["Weighted", "is_depthwise", "is_inside", "unit_of", "watch_outputs", "weighted_layers"]

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

Weighted = nn.Conv2d | nn.Linear


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether each output channel sees one input channel of its own."""
    return layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def weighted_layers(network: fx.GraphModule) -> dict[str, Weighted]:
    """The convolutions and linear layers of a lowered network, by name, in the order in which they run."""
    layers: dict[str, Weighted] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            layer = network.get_submodule(str(node.target))
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layers[str(node.target)] = layer
    return layers


def is_inside(layer: str, units: Iterable[str]) -> bool:
    """Whether a layer is one of the named layers or lies in one of the named units."""
    return any(layer == unit or layer.startswith(f"{unit}.") for unit in units)


def unit_of(layer: str, units: Iterable[str]) -> str:
    """The unit that a layer is or lies in; a layer outside every unit is its own."""
    inside = [unit for unit in units if is_inside(layer, (unit,))]
    return max(inside, key=len) if inside else layer


def watch_outputs(
    network: fx.GraphModule,
    names: Iterable[str],
    images: Iterable[npt.NDArray[np.float32]],
    see: Callable[[str, Tensor], None],
) -> None:
    """Runs images through a network and shows the output of each named layer, batch by batch.

    Args:
        network: A lowered network.
        names: Layers to watch.
        images: Batches [N, C, H, W].
        see: Called with the layer's name and its output, before any activation.
    """
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: see(name, output.detach())
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            for batch in images:
                network(torch.from_numpy(np.ascontiguousarray(batch, dtype=np.float32)))
    finally:
        for handle in handles:
            handle.remove()
