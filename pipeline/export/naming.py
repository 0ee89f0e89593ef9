"""Gives the tensors of an exported file the layer names of the network it came from.

The converters name tensors after their own classes and number them. With the model's layer names in the file
a profile, a census or a quantisation table can be read: ``blocks.3.2.conv_dw`` instead of ``Conv2d_conv_dw;36``.
"""

__all__ = ["ACTIVATION_SUFFIX", "layer_of", "name_tensors", "name_values"]

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from pipeline.export import flatbuffer
from pipeline.export.identity import APART

_WEIGHT = "/weight"
# ONNX keeps a layer's activation apart: its output is named after the layer, with this behind it.
ACTIVATION_SUFFIX = "/act"


def name_tensors(path: Path | str, network: fx.GraphModule) -> int:
    """Renames the tensors of a float32 file in place.

    A layer is recognised by its weights, byte for byte; equal weights are told apart by their order. The output of
    a layer (after its fused activation) takes the layer's name, its constants ``name/weight`` and ``name/bias``. A sum
    is called ``<block>.add`` after the block whose last layer it adds to, anything else ``<operator>_<n>``.

    Args:
        path: The file that was converted from `network`.
        network: The network that `pipeline.export.lowering.lower` returned.

    Returns:
        How many layers were recognised.
    """
    model = flatbuffer.read(path)
    graph = model.subgraphs[0]
    layers = _layers_by_weight(network)
    names: dict[int, str] = {}
    numbers: dict[str, int] = defaultdict(int)
    recognised: list[str] = []
    for operator in graph.operators:
        kind = flatbuffer.operator_name(model, operator)
        weight = _weight(model, graph, operator, kind)
        queue = layers.get(weight.tobytes(), []) if weight is not None else []
        if queue:
            name = queue.pop(0)
            recognised.append(name)
            for index, part in zip(operator.inputs[1:], ("weight", "bias"), strict=False):
                if index >= 0:
                    # Two layers may share one bias buffer, most often a zero one: the first names it.
                    names.setdefault(int(index), f"{name}/{part}")
        else:
            inputs = [names.get(int(index), "") for index in operator.inputs]
            name = _sum_name(inputs, recognised, names.values()) if kind == "ADD" else ""
            if not name:
                name = f"{kind.lower()}_{numbers[kind]}"
                numbers[kind] += 1
        for index in operator.outputs:
            names[int(index)] = name
    for index, label in [(graph.inputs[0], "image"), (graph.outputs[0], "logits")]:
        names[int(index)] = label
    for index, tensor in enumerate(graph.tensors):
        tensor.name = names.get(index, f"constant_{index}").encode()
    flatbuffer.write(model, path)
    return len(recognised)


def layer_of(model: Any, operator: Any) -> str:
    """The layer that an operator of a named file is: by its weight, or, where it has none, by its output."""
    tensors = model.subgraphs[0].tensors
    if len(operator.inputs) > 1:
        weight = flatbuffer.tensor_name(tensors[operator.inputs[1]])
        if weight.endswith(_WEIGHT):
            return weight.removesuffix(_WEIGHT)
    return flatbuffer.tensor_name(tensors[operator.outputs[0]])


def name_values(proto: Any) -> None:
    """Renames the nodes and intermediate values of a float `onnx.ModelProto` in place.

    A node with a weight ``name.weight`` and its output are called ``name``; the Clip or Relu that follows is called
    ``name/act``; a sum ``<block>.add`` after the block whose last layer it adds to; any other node ``<operator>_<n>``.
    Weights, graph inputs and outputs keep their names.
    """
    ends = {value.name for value in [*proto.graph.input, *proto.graph.output]}
    names: dict[str, str] = {}
    numbers: dict[str, int] = defaultdict(int)
    recognised: list[str] = []
    for node in proto.graph.node:
        weights = [name for name in node.input if name.endswith(".weight")]
        source = names.get(node.input[0], "") if node.input else ""
        if weights:
            label = weights[0].removesuffix(".weight")
            recognised.append(label)
        elif node.op_type in {"Clip", "Relu"} and source and ACTIVATION_SUFFIX not in source:
            label = source + ACTIVATION_SUFFIX
        else:
            inputs = [names.get(name, "") for name in node.input]
            label = _sum_name(inputs, recognised, names.values()) if node.op_type == "Add" else ""
            if not label:
                label = f"{node.op_type.lower()}_{numbers[node.op_type]}"
                numbers[node.op_type] += 1
        node.name = label
        for output in node.output:
            names[output] = output if output in ends else label
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in proto.graph.value_info:
        value.name = names.get(value.name, value.name)


def _sum_name(inputs: Sequence[str], layers: Sequence[str], taken: Iterable[str]) -> str:
    """``<block>.add`` for a sum of these inputs, after the latest of the layers among them; empty where there is none.

    The other input comes from an earlier block, so the sum is the last thing that the latest layer's block computes. A
    kernel whose identity was taken out and its input sum up to the layer that they were.
    """
    latest = max((layers.index(name) for name in inputs if name in layers), default=None)
    if latest is None:
        return ""
    block, _, leaf = layers[latest].rpartition(".")
    name = block if leaf == APART else f"{block}.add"
    return name if block and name not in set(taken) else ""


def _layers_by_weight(network: fx.GraphModule) -> dict[bytes, list[str]]:
    layers: dict[bytes, list[str]] = defaultdict(list)
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        layer = network.get_submodule(str(node.target))
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layers[_file_order(layer).tobytes()].append(str(node.target))
    return layers


def _file_order(layer: nn.Conv2d | nn.Linear) -> npt.NDArray[np.float32]:
    weight = layer.weight.detach().numpy().astype(np.float32)
    if isinstance(layer, nn.Linear):
        return weight
    depthwise = layer.groups == layer.in_channels and layer.groups > 1
    # TFLite keeps CONV_2D weights as [O, H, W, I] and DEPTHWISE_CONV_2D weights as [1, H, W, C].
    order = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(order)


def _weight(model: Any, graph: Any, operator: Any, kind: str) -> npt.NDArray[Any] | None:
    if kind not in {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}:
        return None
    return flatbuffer.constant(model, graph.tensors[operator.inputs[1]])
