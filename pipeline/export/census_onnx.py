"""The census of an `.onnx` file."""

__all__ = ["read_onnx"]

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.export import metadata
from pipeline.export.census_types import Census, Port, WeightRange
from pipeline.export.extras import require
from pipeline.export.onnx_files import load_onnx


def read_onnx(file: Path) -> Census:
    """Counts what an `.onnx` file holds; raises ExportError where the file is missing or damaged."""
    onnx = require("onnx", extra="onnx")
    model = load_onnx(file)
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    ports = {value.name: _port(onnx, value) for value in [*graph.input, *graph.output]}
    operators = Counter(node.op_type for node in graph.node)
    producers = {output: node for node in graph.node for output in node.output}
    weights = [
        WeightRange.of(_layer_name(node.input[1]), weight, 0)
        for node in graph.node
        if node.op_type in {"Conv", "Gemm"}
        for weight in [_weight(onnx, node, constants, producers)]
        if weight is not None
    ]
    static = operators["QuantizeLinear"] > 0
    islands = [
        node.output[0] for node in graph.node if _is_float(node, producers, constants) and node.output[0] not in ports
    ]
    quantized = static or operators["DynamicQuantizeLinear"] > 0
    return Census(
        file.name,
        "onnx",
        file.stat().st_size,
        dict(sorted(operators.items())),
        {},
        tuple(ports[value.name] for value in graph.input if value.name not in constants),
        tuple(ports[value.name] for value in graph.output),
        quantized,
        tuple(islands) if static else (),
        tuple(weights),
        metadata.read(file),
    )


def _is_float(node: Any, producers: Mapping[str, Any], constants: Mapping[str, Any]) -> bool:
    """Whether a node of a QDQ file computes in float: a runtime fuses it to integers only between DQ and Q."""
    if node.op_type in {"Conv", "Gemm", "MatMul"}:
        inputs = node.input[:2]
    elif node.op_type in {"Add", "Mul", "GlobalAveragePool", "AveragePool", "ReduceMean"}:
        inputs = [name for name in node.input if name not in constants]
    else:
        return False
    dequantized = [name in producers and producers[name].op_type == "DequantizeLinear" for name in inputs]
    return not all(dequantized) if node.op_type in {"Conv", "Gemm", "MatMul"} else not any(dequantized)


def _port(onnx: Any, value: Any) -> Port:
    kind = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim)
    return Port(value.name, shape, onnx.TensorProto.DataType.Name(kind.elem_type).lower())


def _weight(
    onnx: Any, node: Any, constants: Mapping[str, Any], producers: Mapping[str, Any]
) -> npt.NDArray[np.float32] | None:
    name = node.input[1]
    if name in constants:
        return np.asarray(onnx.numpy_helper.to_array(constants[name]), dtype=np.float32)
    source = producers.get(name)
    if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in constants:
        return None
    values = onnx.numpy_helper.to_array(constants[source.input[0]]).astype(np.float32)
    scale = np.asarray(onnx.numpy_helper.to_array(constants[source.input[1]]), dtype=np.float32)
    axis = next((item.i for item in source.attribute if item.name == "axis"), 1) if scale.size > 1 else 0
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.asarray(values * (scale.reshape(shape) if scale.size > 1 else scale), dtype=np.float32)


def _layer_name(weight: str) -> str:
    return weight.removesuffix("_DequantizeLinear_Output").removesuffix(".weight")
