"""Tiny real model files, written op by op, so that no test here needs a converter or torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIDE_PX = 16


def write_tflite(path: Path, *, channels: int, layers: int = 2, kind: str = "fp32", seed: int = 0) -> Path:
    """Writes a chain of 3x3 convolutions; `kind` is fp32, fp16 (half weights), int8 or int8-weights."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    generator = np.random.default_rng(seed)
    types = schema.TensorType
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    graph.tensors, graph.operators = [], []

    def tensor(shape: list[int], dtype: int, data: Any = None, scale: Any = None) -> int:
        item = schema.TensorT()
        item.shape, item.type, item.name = shape, dtype, f"t{len(graph.tensors)}".encode()
        item.buffer = 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), dtype=np.uint8)
            item.buffer = len(model.buffers)
            model.buffers.append(buffer)
        if scale is not None:
            item.quantization = schema.QuantizationParametersT()
            item.quantization.scale = np.atleast_1d(np.asarray(scale, dtype=np.float32))
            item.quantization.zeroPoint = np.zeros(item.quantization.scale.shape, dtype=np.int64)
        graph.tensors.append(item)
        return len(graph.tensors) - 1

    def code(builtin: int, version: int) -> int:
        item = schema.OperatorCodeT()
        item.builtinCode = item.deprecatedBuiltinCode = builtin
        item.version = version
        model.operatorCodes.append(item)
        return len(model.operatorCodes) - 1

    model.operatorCodes = []
    conv_code = code(schema.BuiltinOperator.CONV_2D, {"int8": 3, "int8-weights": 5}.get(kind, 1))
    widen_code = code(schema.BuiltinOperator.DEQUANTIZE, 3) if kind == "fp16" else None
    activation = types.INT8 if kind == "int8" else types.FLOAT32
    scale = 0.05 if kind == "int8" else None
    current, depth = tensor([1, SIDE_PX, SIDE_PX, 3], activation, scale=scale), 3
    graph.inputs = [current]
    for _ in range(layers):
        shape = [channels, 3, 3, depth]
        weights = generator.normal(0, (9 * depth) ** -0.5, shape).astype(np.float32)
        bias = tensor([channels], types.FLOAT32, np.zeros(channels, np.float32))
        if kind in {"int8", "int8-weights"}:
            steps = np.abs(weights).max(axis=(1, 2, 3)) / 127
            data = np.round(weights / steps[:, None, None, None]).astype(np.int8)
            kernel = tensor(shape, types.INT8, data, scale=steps)
            if kind == "int8":
                bias = tensor([channels], types.INT32, np.zeros(channels, np.int32), scale=steps * 0.05)
        elif kind == "fp16":
            half = tensor(shape, types.FLOAT16, weights.astype(np.float16))
            kernel = tensor(shape, types.FLOAT32)
            widen = schema.OperatorT()
            widen.opcodeIndex, widen.inputs, widen.outputs = widen_code, [half], [kernel]
            graph.operators.append(widen)
        else:
            kernel = tensor(shape, types.FLOAT32, weights)
        following = tensor([1, SIDE_PX, SIDE_PX, channels], activation, scale=scale)
        conv = schema.OperatorT()
        conv.opcodeIndex, conv.inputs, conv.outputs = conv_code, [current, kernel, bias], [following]
        conv.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
        conv.builtinOptions = schema.Conv2DOptionsT()
        conv.builtinOptions.strideW = conv.builtinOptions.strideH = 1
        conv.builtinOptions.padding = schema.Padding.SAME
        graph.operators.append(conv)
        current, depth = following, channels
    graph.outputs = [current]
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def write_onnx(path: Path, *, channels: int, layers: int = 2, kind: str = "fp32", seed: int = 0) -> Path:
    """Writes a chain of 3x3 convolutions; `kind` is fp32, fp16, int8 (QDQ) or int8-weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(seed)
    element = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.FLOAT
    dtype = np.float16 if kind == "fp16" else np.float32
    nodes, constants = [], []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    current, depth = "x", 3
    if kind == "int8":
        constant("scale", np.float32(0.05))
        constant("zero", np.uint8(128))
    for layer in range(layers):
        weights = generator.normal(0, (9 * depth) ** -0.5, (channels, depth, 3, 3)).astype(dtype)
        kernel, source = f"w{layer}", current
        if kind in {"int8", "int8-weights"}:
            steps = (np.abs(weights).max(axis=(1, 2, 3)) / 127).astype(np.float32)
            constant(f"q{layer}", np.round(weights / steps[:, None, None, None]).astype(np.int8))
            constant(f"s{layer}", steps)
            constant(f"z{layer}", np.zeros(channels, np.int8))
            operands = [f"q{layer}", f"s{layer}", f"z{layer}"]
            nodes.append(helper.make_node("DequantizeLinear", operands, [kernel], axis=0))
        else:
            constant(kernel, weights)
        if kind == "int8":
            nodes.append(helper.make_node("QuantizeLinear", [current, "scale", "zero"], [f"{current}q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{current}q", "scale", "zero"], [f"{current}d"]))
            source = f"{current}d"
        following = f"y{layer}"
        nodes.append(helper.make_node("Conv", [source, kernel], [following], pads=[1, 1, 1, 1]))
        current, depth = following, channels
    if kind == "int8":
        nodes.append(helper.make_node("QuantizeLinear", [current, "scale", "zero"], [f"{current}q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{current}q", "scale", "zero"], ["out"]))
        current = "out"
    shape = [1, channels, SIDE_PX, SIDE_PX]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", element, [1, 3, SIDE_PX, SIDE_PX])],
        [helper.make_tensor_value_info(current, element, shape)], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function (format, channels=8, layers=2, kind="fp32") -> path of a model file."""
    folder = tmp_path_factory.mktemp("models")

    def make(form: str, *, channels: int = 8, layers: int = 2, kind: str = "fp32") -> Path:
        path = folder / f"{kind}-{channels}x{layers}.{form}"
        if not path.exists():
            {"tflite": write_tflite, "onnx": write_onnx}[form](path, channels=channels, layers=layers, kind=kind)
        return path

    return make
