"""Channels that training has switched off, and what they do to an int8 file.

A channel whose weights have decayed to 1e-10 gets a weight scale of 1e-12. Its bias is stored in units of input scale
times weight scale, which 32 bits cannot hold: the stored bias is clipped to -2^31, the accumulator wraps around, and a
channel that was silent in the float model shouts. Released ImageNet weights of EfficientNet-lite have such channels
in the first layers.
"""

__all__ = ["widen_dead_channels"]

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.export import flatbuffer
from pipeline.export.ranges import Range

_LEVELS = 127
_STEPS = 255
# Half of what 32 bits hold: the other half is room for the sum of products.
_LARGEST_BIAS = 2.0**30
_CHANNEL_AXIS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}


def widen_dead_channels(model: Any, spans: Mapping[str, Range]) -> dict[str, int]:
    """Gives each channel of a float TFLite tree enough weight range for its bias to fit 32 bits.

    The largest weight of such a channel is raised to 127·|b| / (s·2^30), s being the input's step: for a bias of 3 and
    inputs up to 6 that is 1.5e-5, whose product with any input is far below one step of the output.

    Args:
        model: A `ModelT` tree, changed in place.
        spans: The range of every activation.

    Returns:
        How many channels were widened, by layer; layers without any are left out.
    """
    graph = model.subgraphs[0]
    widened: dict[str, int] = {}
    for operator in graph.operators:
        axis = _CHANNEL_AXIS.get(flatbuffer.operator_name(model, operator))
        if axis is None or len(operator.inputs) < 3 or operator.inputs[2] < 0:
            continue
        source, weight_tensor, bias_tensor = (graph.tensors[index] for index in operator.inputs[:3])
        weight = flatbuffer.constant(model, weight_tensor)
        bias = flatbuffer.constant(model, bias_tensor)
        span = spans.get(flatbuffer.tensor_name(source))
        if weight is None or bias is None or span is None or span.high == span.low:
            continue
        step = (span.high - span.low) / _STEPS
        channels = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
        least = _LEVELS * np.abs(bias.astype(np.float64)) / (step * _LARGEST_BIAS)
        largest = np.abs(channels).argmax(axis=1)
        rows = np.flatnonzero(np.abs(channels[np.arange(len(channels)), largest]) < least)
        if not len(rows):
            continue
        # Upwards in magnitude; a weight of exactly zero becomes positive.
        signs = np.where(channels[rows, largest[rows]] < 0, -1.0, 1.0)
        channels[rows, largest[rows]] = signs * least[rows] * (1 + 1e-6)
        shape = np.moveaxis(weight, axis, 0).shape
        changed = np.moveaxis(channels.reshape(shape), 0, axis).astype(np.float32)
        data = np.frombuffer(np.ascontiguousarray(changed).tobytes(), dtype=np.uint8)
        model.buffers[weight_tensor.buffer].data = data
        widened[flatbuffer.tensor_name(graph.tensors[operator.outputs[0]])] = len(rows)
    return widened
