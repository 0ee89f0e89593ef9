"""Fully connected layers that read a feature map, without the transpose that a channels-last file would pay for them.

PyTorch flattens [N, C, H, W] channel by channel, a TFLite file holds [N, H, W, C]. The converter keeps PyTorch's order
by a transpose before the flattening; here the columns of the layer's weights change places instead, once.
"""

__all__ = ["flatten_channels_last"]

import copy
import math

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

aten = torch.ops.aten
_FLATTENING = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}


def flatten_channels_last(network: fx.GraphModule, example: Tensor) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Lets every flattening that only fully connected layers read go through the pixels first, then the channels.

    Args:
        network: A network that `pipeline.export.lowering.lower` returned; it is not changed.
        example: Its input, shape [N, C, H, W], float32.

    Returns:
        A network that computes the same, and the names of the layers whose columns changed places. A flattening that
        something else reads too stays as it was.
    """
    result = copy.deepcopy(network)
    with torch.no_grad():
        ShapeProp(result).propagate(example)
    changed: list[str] = []
    for node in list(result.graph.nodes):
        shape = _flattened(node)
        if shape is None:
            continue
        readers = [str(reader.target) for reader in node.users if reader.op == "call_module"]
        layers = [result.get_submodule(name) for name in readers]
        if len(layers) < len(node.users) or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        with result.graph.inserting_before(node):
            pixels_first = result.graph.call_function(aten.permute.default, (node.args[0], [0, 2, 3, 1]))
            flat = result.graph.call_function(aten.reshape.default, (pixels_first, [-1, math.prod(shape[1:])]))
        node.replace_all_uses_with(flat)
        result.graph.erase_node(node)
        for layer in layers:
            assert isinstance(layer, nn.Linear)
            columns = layer.weight.detach().reshape(-1, *shape[1:]).permute(0, 2, 3, 1)
            layer.weight = nn.Parameter(columns.flatten(1).contiguous())
        changed += readers
    result.recompile()
    return result, tuple(changed)


def _flattened(node: fx.Node) -> torch.Size | None:
    """The shape [N, C, H, W] that a node flattens to [N, C·H·W], where the order of C, H and W matters."""
    if node.op != "call_function" or node.target not in _FLATTENING:
        return None
    source = node.all_input_nodes[0].meta["tensor_meta"].shape
    if len(source) != 4 or source[1] == 1 or source[2] * source[3] == 1:
        return None
    whole = node.meta["tensor_meta"].shape == (source[0], math.prod(source[1:]))
    return torch.Size(source) if whole else None
