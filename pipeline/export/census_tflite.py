"""The census of a `.tflite` file."""

__all__ = ["read_tflite"]

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.export import flatbuffer, metadata
from pipeline.export.census_types import Census, Port, WeightRange
from pipeline.export.naming import layer_of

_FLOAT = frozenset({"FLOAT32", "FLOAT16"})
_ACTIVATIONS = {1: "RELU", 2: "RELU_N1_TO_1", 3: "RELU6", 4: "TANH"}


def read_tflite(file: Path) -> Census:
    """Counts what the main graph of a `.tflite` file holds; raises ExportError where the file is damaged."""
    model = flatbuffer.read(file)
    graph = model.subgraphs[0]
    operators: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    kinds = {index: flatbuffer.type_name(tensor.type) for index, tensor in enumerate(graph.tensors)}
    ends = {int(index) for index in (*graph.inputs, *graph.outputs)}
    float_tensors: list[str] = []
    weights: list[WeightRange] = []
    static = False
    for operator in graph.operators:
        name = flatbuffer.operator_name(model, operator)
        operators[name] += 1
        activation = _ACTIVATIONS.get(int(flatbuffer.option(operator, "fusedActivationFunction", 0) or 0))
        if activation:
            fused[activation] += 1
        output = int(operator.outputs[0])
        if kinds[output] in {"INT8", "UINT8"}:
            static = True
        elif (
            kinds[output] in _FLOAT
            and output not in ends
            and name != "DEQUANTIZE"
            and not _is_constant(model, graph, operator)
        ):
            float_tensors.append(flatbuffer.tensor_name(graph.tensors[output]))
        if name in {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}:
            weight = _weight(model, graph, operator)
            if weight is not None:
                axis = 3 if name == "DEPTHWISE_CONV_2D" else 0
                weights.append(WeightRange.of(layer_of(model, operator), weight, axis))
    quantized = any(kind in {"INT8", "UINT8"} for kind in kinds.values())
    return Census(
        file.name,
        "tflite",
        file.stat().st_size,
        dict(sorted(operators.items())),
        dict(fused),
        tuple(_port(graph.tensors[index]) for index in graph.inputs),
        tuple(_port(graph.tensors[index]) for index in graph.outputs),
        quantized,
        tuple(float_tensors) if static else (),
        tuple(weights),
        metadata.read(file),
    )


def _is_constant(model: Any, graph: Any, operator: Any) -> bool:
    """Whether an operator only unpacks a stored weight (fp16 files do so with DEQUANTIZE)."""
    return all(index < 0 or flatbuffer.constant(model, graph.tensors[index]) is not None for index in operator.inputs)


def _port(tensor: Any) -> Port:
    shape = tuple(int(size) for size in tensor.shape)
    return Port(flatbuffer.tensor_name(tensor), shape, flatbuffer.type_name(tensor.type).lower())


def _weight(model: Any, graph: Any, operator: Any) -> npt.NDArray[np.float32] | None:
    tensor = graph.tensors[operator.inputs[1]]
    values = flatbuffer.constant(model, tensor)
    if values is None:
        return None
    if values.dtype != np.int8:
        return values.astype(np.float32)
    scale = np.asarray(tensor.quantization.scale, dtype=np.float32)
    shape = [1] * values.ndim
    shape[tensor.quantization.quantizedDimension] = -1
    return values.astype(np.float32) * (scale if scale.size == 1 else scale.reshape(shape))
