"""Takes the identity out of folded residual kernels before they are rounded to int8.

Folding a residual unit adds a Dirac kernel to the convolution: W = I + R. The tap of the identity is about 1, all
others are small, and the largest weight sets the scale of its channel: int8 spends its steps on the one tap whose value
is known, and R is left with four bits or so. Kept apart, y = x + R*x, the kernel R has a scale of its own; the price is
one ADD operator a unit in the int8 file.
"""

__all__ = ["APART", "split_identity"]

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from pipeline.export.layers import is_inside, weighted_layers

APART = "apart"
"""Last part of the name of a kernel whose identity was taken out; the sum keeps the name of the whole."""
# One bit won for the median channel: less is not worth an operator.
_LEAST_GAIN = 2.0
_aten = torch.ops.aten


def split_identity(network: fx.GraphModule, *, keep: Iterable[str] = ()) -> tuple[fx.GraphModule, dict[str, float]]:
    """Splits every convolution whose scale the identity decides into the identity and the rest.

    Args:
        network: A lowered network; it is not changed.
        keep: Layers or units to leave as they are, since they will stay float32.

    Returns:
        A copy that computes the same; and for each layer that was split, how much finer the median channel's scale
        became (a factor, at least 2).
    """
    result = copy.deepcopy(network)
    kept = tuple(keep)
    gains: dict[str, float] = {}
    for name, layer in weighted_layers(result).items():
        if not isinstance(layer, nn.Conv2d) or is_inside(name, kept) or not _maps_onto_itself(layer):
            continue
        rest = layer.weight.detach() - _identity(layer)
        before, after = (weight.abs().flatten(1).amax(1) for weight in (layer.weight.detach(), rest))
        gain = float((before / after.clamp_min(1e-30)).median())
        if gain < _LEAST_GAIN:
            continue
        gains[name] = min(gain, 1e6)
        layer.weight = nn.Parameter(rest)
        _add_input(result, name, layer)
    result.delete_all_unused_submodules()
    result.recompile()
    return result, gains


def _maps_onto_itself(layer: nn.Conv2d) -> bool:
    """Whether output pixel and channel can be those of the input: stride 1, centred, dense, as many channels."""
    centred = layer.padding == "same" or layer.padding == tuple(
        step * (size - 1) // 2 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    odd = all(size % 2 for size in layer.kernel_size)
    return layer.groups == 1 and layer.in_channels == layer.out_channels and layer.stride == (1, 1) and odd and centred


def _identity(layer: nn.Conv2d) -> Tensor:
    dirac = torch.zeros_like(layer.weight)
    nn.init.dirac_(dirac)
    return dirac


def _add_input(network: fx.GraphModule, name: str, layer: nn.Conv2d) -> None:
    node = next(item for item in network.graph.nodes if item.op == "call_module" and item.target == name)
    readers = list(node.users)
    parent, _, leaf = name.rpartition(".")
    holder = nn.Module()
    holder.add_module(APART, layer)
    network.get_submodule(parent).add_module(leaf, holder)
    node.target = f"{name}.{APART}"
    with network.graph.inserting_after(node):
        total = network.graph.call_function(_aten.add.Tensor, (node, node.all_input_nodes[0]))
    for reader in readers:
        reader.replace_input_with(node, total)
