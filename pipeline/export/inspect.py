"""The census of an exported file: which operators it holds, what is fused, what stayed float; and the gate on it."""

__all__ = ["MOBILE_OPERATORS", "Census", "Port", "WeightRange", "census", "gate"]

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.errors import ExportError, LayerfoldError
from pipeline.export.census_executorch import read_executorch
from pipeline.export.census_onnx import read_onnx
from pipeline.export.census_tflite import read_tflite
from pipeline.export.census_types import Census, Port, WeightRange
from pipeline.export.layers import is_inside

# What LiteRT's CPU (XNNPACK), GPU and NPU delegates all run for a folded classifier, and the ONNX names beside them.
MOBILE_OPERATORS: Mapping[str, frozenset[str]] = {
    "tflite": frozenset(
        {"ADD", "AVERAGE_POOL_2D", "CAST", "CONV_2D", "DEPTHWISE_CONV_2D", "DEQUANTIZE", "FULLY_CONNECTED"}
        | {"HARD_SWISH", "LOGISTIC", "MAX_POOL_2D", "MEAN", "MUL", "PAD", "PADV2", "QUANTIZE", "RELU", "RELU6"}
        | {"RESHAPE", "SOFTMAX", "SUB", "SUM"}
    ),
    "onnx": frozenset(
        {"Add", "AveragePool", "Cast", "Clip", "Conv", "DequantizeLinear", "Flatten", "Gemm", "GlobalAveragePool"}
        | {"HardSigmoid", "HardSwish", "MatMul", "MaxPool", "Mul", "Pad", "QuantizeLinear", "ReduceMean", "Relu"}
        | {"Reshape", "Sigmoid", "Softmax", "Sub", "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger"}
    ),
    # XNNPACK's names: whatever its delegate does not take is left to ExecuTorch's slow portable kernels.
    "executorch": frozenset(
        {"Add", "AvgPooling2d", "Clamp", "Conv2d", "Convert", "DepthwiseConv2d", "FullyConnected"}
        | {"GlobalAvgPooling2d", "Hardswish", "MaxPooling2d", "Multiply", "Sigmoid", "Softmax", "StaticConstantPad"}
        | {"StaticReshape", "StaticTranspose of the input", "StaticTranspose of one pixel", "Subtract"}
        # The cast of uint8 pixels, which XNNPACK does not have.
        | {"dim_order_ops::_to_dim_order_copy.out"}
    ),
}
_READERS = {".tflite": read_tflite, ".onnx": read_onnx, ".pte": read_executorch}
_TRANSPOSES = frozenset({"TRANSPOSE", "Transpose", "StaticTranspose"})


def census(path: Path | str) -> Census:
    """Counts what a `.tflite`, `.onnx` or `.pte` file holds.

    Raises:
        ExportError: The file is missing, damaged or of another format.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise ExportError(f"cannot inspect '{file.suffix}' ({file.name})", hint="expected .tflite, .onnx or .pte")
    try:
        return reader(file)
    except LayerfoldError:
        raise
    except Exception as error:  # a flipped byte may break any rule of a format
        raise ExportError(
            f"{file.name} is damaged: {type(error).__name__}: {error}", hint="export it again, or copy it again"
        ) from error


def gate(
    found: Census,
    *,
    allowed: Collection[str] | None = None,
    max_pads: int | None = None,
    float_tensors: Collection[str] = (),
    lone_activations: bool = False,
) -> list[str]:
    """What in a census keeps the file from running well on a phone; empty when it passes.

    Args:
        found: The census.
        allowed: Operator types that the target runs; `MOBILE_OPERATORS` of the format by default.
        max_pads: Padding operators that the network's own padding accounts for; not judged when None.
        float_tensors: Tensors of layers or units that were asked to stay float in a quantised file.
        lone_activations: Whether activations may be operators of their own.
    """
    known = MOBILE_OPERATORS[found.format] if allowed is None else frozenset(allowed)
    findings = []
    transposes = found.count(*_TRANSPOSES)
    if transposes:
        findings.append(f"{found.file}: {transposes} layout transposes, expected none")
    foreign = sorted(set(found.ops) - known - _TRANSPOSES)
    if foreign:
        findings.append(f"{found.file}: operators outside the target's set: {', '.join(foreign)}")
    asked = tuple(float_tensors)
    islands = [name for name in found.float_tensors if not is_inside(name, asked)]
    if islands:
        findings.append(
            f"{found.file}: {len(islands)} tensors are float inside a quantised file: {', '.join(islands[:4])}"
        )
    pads = found.count("PAD", "PADV2", "Pad")
    if max_pads is not None and pads > max_pads:
        findings.append(f"{found.file}: {pads} padding operators, expected at most {max_pads}")
    alone = found.count("RELU", "RELU6")
    if alone and found.format == "tflite" and not lone_activations:
        findings.append(f"{found.file}: {alone} activations stand alone, expected all fused")
    return findings
