"""Post-training quantisation of exported files: static int8, dynamic int8 and float16, TFLite and ONNX."""

__all__ = ["onnx_int8", "tflite_int8"]

import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError, nearest
from pipeline.export import flatbuffer
from pipeline.export.dead_channels import widen_dead_channels
from pipeline.export.extras import require
from pipeline.export.naming import layer_of
from pipeline.export.observe import observe_onnx, observe_tflite
from pipeline.export.onnx_files import load_onnx
from pipeline.export.probe import require_runs
from pipeline.export.quiet import quietly
from pipeline.export.ranges import Range, activation_ranges
from pipeline.export.tflite import ExportInfo
from pipeline.export.writing import replacing

Calibration = Iterable[npt.NDArray[np.float32]]


def tflite_int8(
    fp32_path: Path | str,
    out_path: Path | str,
    calibration: Calibration,
    *,
    ranges: str = "minmax",
    percentile: float = 99.99,
    per_channel: bool = True,
    float_layers: Iterable[str] = (),
    float_io: bool = False,
) -> ExportInfo:
    """Quantises a float `.tflite` file to int8 weights and activations.

    Args:
        fp32_path: The float file that `pipeline.export.tflite.export_fp32` wrote.
        out_path: Where to write.
        calibration: Normalised images, batches [N, C, H, W] of any N, read once.
        ranges: How activation ranges are chosen: ``minmax``, ``percentile`` or ``mse``. The quantiser's own
            calibration is a moving average that clips what late images show; it is not used.
        percentile: The share of values kept by ``percentile``, in per cent.
        per_channel: One weight scale per output channel; one per tensor otherwise.
        float_layers: Names of layers or units that stay float32, such as ``"blocks.3.2"``.
        float_io: Whether input and output stay float32 (a QUANTIZE and a DEQUANTIZE operator are added).

    Raises:
        ExportError: The file or the calibration images are unfit, or the quantiser fails; no file is left.
    """
    source, target = Path(fp32_path), Path(out_path)
    started = time.perf_counter()
    observer = observe_tflite(source)
    spans = activation_ranges(observer, calibration, method=ranges, percentile=percentile)
    model = flatbuffer.read(source)
    pixels = _cast_of_pixels(model)
    if pixels is not None:
        # With exactly these ends the step is one grey level: uint8 and int8 pixels differ by their zero point only.
        spans[pixels] = Range(0.0, 255.0)
    kept = _float_tensors(float_layers, model)
    widened = widen_dead_channels(model, spans)
    with replacing(target) as temporary, quietly(f"quantise {source.name} to int8"):
        flatbuffer.write(model, temporary)
        quantizer_module = require("ai_edge_quantizer.quantizer", extra="tflite")
        qtyping = require("ai_edge_quantizer.qtyping", extra="tflite")
        version = require("importlib.metadata", extra="tflite").version("ai-edge-quantizer")
        quantizer = quantizer_module.Quantizer(str(temporary))
        operations = qtyping.TFLOperationName
        granularity = qtyping.QuantGranularity
        quantizer.add_static_config(
            regex=".*",
            operation_name=operations.ALL_SUPPORTED,
            activation_num_bits=8,
            weight_num_bits=8,
            weight_granularity=granularity.CHANNELWISE if per_channel else granularity.TENSORWISE,
        )
        never = quantizer_module.AlgorithmName.NO_QUANTIZE
        if float_io:
            for operation in (operations.INPUT, operations.OUTPUT):
                quantizer.update_quantization_recipe(".*", operation, algorithm_key=never)
        for expression in kept:
            quantizer.update_quantization_recipe(expression, operations.ALL_SUPPORTED, algorithm_key=never)
        statistics = {name: _statistics(span) for name, span in spans.items()}
        content = quantizer.quantize(statistics, enable_progress_report=False).quantized_model
        temporary.write_bytes(bytes(content))
        # The quantiser appends the weights behind the tree; older runtimes only read them inside it.
        quantized = flatbuffer.read(temporary)
        if pixels is not None and not float_io:
            _drop_cast_of_pixels(quantized)
        flatbuffer.write(quantized, temporary)
        require_runs(temporary, name=target.name)
    dead: list[str] = []
    if widened:
        count = sum(widened.values())
        where = ", ".join(widened) if len(widened) <= 3 else f"{len(widened)} layers, {next(iter(widened))} first"
        dead.append(f"widened {count} dead channels, whose bias overflows 32 bits, in {where}")
    notes = rounding_notes(ranges, per_channel, float_layers, dead)
    return ExportInfo.of(target, converter=f"ai-edge-quantizer {version}", since=started, notes=notes)


def rounding_notes(
    ranges: str, per_channel: bool, float_layers: Iterable[str], others: Iterable[str] = ()
) -> tuple[str, ...]:
    """What a record says of how a file was rounded, whatever its format; `others` before the layers that stay float."""
    kept = sorted(float_layers)
    weights = "per-channel weights" if per_channel else "per-tensor weights"
    return (f"{ranges} ranges", weights, *others, *([f"float32: {', '.join(kept)}"] if kept else []))


def _cast_of_pixels(model: Any) -> str | None:
    """The float tensor that a pixel input is cast to, or None for a file that takes float images."""
    graph = model.subgraphs[0]
    for operator in graph.operators:
        if flatbuffer.operator_name(model, operator) == "CAST" and operator.inputs[0] == graph.inputs[0]:
            return flatbuffer.tensor_name(graph.tensors[operator.outputs[0]])
    return None


def _drop_cast_of_pixels(model: Any) -> None:
    """Feeds uint8 pixels to the QUANTIZE operator behind the CAST, which then only moves the zero point.

    Where a layer that stays float reads the CAST as well, everything stays as it is.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    graph = model.subgraphs[0]
    image = int(graph.inputs[0])
    casts = [
        operator
        for operator in graph.operators
        if flatbuffer.operator_name(model, operator) == "CAST" and operator.inputs[0] == image
    ]
    readers = [[item for item in graph.operators if cast.outputs[0] in list(item.inputs)] for cast in casts]
    if any(flatbuffer.operator_name(model, reader) != "QUANTIZE" for group in readers for reader in group):
        return
    for cast, group in zip(casts, readers, strict=True):
        for reader in group:
            reader.inputs = [image, *list(reader.inputs)[1:]]
        graph.operators.remove(cast)
    parameters = schema.QuantizationParametersT()
    parameters.scale, parameters.zeroPoint = [1.0], [0]
    graph.tensors[image].quantization = parameters


def _statistics(span: Range) -> dict[str, npt.NDArray[np.float32]]:
    return {"min": np.full((1, 1, 1, 1), span.low, np.float32), "max": np.full((1, 1, 1, 1), span.high, np.float32)}


def _float_tensors(float_layers: Iterable[str], model: Any) -> list[str]:
    """Regular expressions that match exactly the output tensors of the named layers or units."""
    graph = model.subgraphs[0]
    outputs = {
        layer_of(model, item): flatbuffer.tensor_name(graph.tensors[item.outputs[0]]) for item in graph.operators
    }
    expressions = []
    for name in float_layers:
        inside = [tensor for layer, tensor in outputs.items() if layer == name or layer.startswith(f"{name}.")]
        if not inside:
            units = sorted({layer.rsplit(".", 1)[0] for layer in outputs if "." in layer})
            raise ExportError(
                f"no layer of the file is called '{name}' or lies inside it",
                hint=nearest(name, outputs) or f"name a layer or a unit of it, such as {', '.join(units[:4])}",
            )
        # The quantiser matches a scope that ends with a semicolon.
        expressions += [f"^{re.escape(tensor)};?$" for tensor in inside]
    return expressions


def onnx_int8(
    fp32_path: Path | str,
    out_path: Path | str,
    calibration: Calibration,
    *,
    ranges: str = "minmax",
    percentile: float = 99.99,
    per_channel: bool = True,
    float_layers: Iterable[str] = (),
) -> ExportInfo:
    """Quantises a float `.onnx` file to QDQ form: uint8 activations, int8 weights (u8s8).

    The arguments are those of `tflite_int8`; input and output stay float32.

    Raises:
        ExportError: The file or the calibration images are unfit, or the quantiser fails; no file is left.
    """
    source, target = Path(fp32_path), Path(out_path)
    started = time.perf_counter()
    observer = observe_onnx(source)
    spans = activation_ranges(observer, calibration, method=ranges, percentile=percentile)
    onnx = require("onnx", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    tools = require("onnxruntime.quantization", extra="onnx")
    doing = f"quantise {source.name} to int8"
    with replacing(target) as temporary, tempfile.TemporaryDirectory() as folder, quietly(doing):
        model = load_onnx(source)
        cache = Path(folder) / "ranges.json"
        _write_cache(cache, spans)
        tools.quantize_static(
            str(source),
            str(temporary),
            None,
            quant_format=tools.QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            nodes_to_exclude=_float_nodes(float_layers, model),
            calibration_cache_path=str(cache),
        )
        onnx.checker.check_model(str(temporary))
        require_runs(temporary, name=target.name)
    notes = rounding_notes(ranges, per_channel, float_layers)
    return ExportInfo.of(target, converter=f"onnxruntime {runtime.__version__} static QDQ", since=started, notes=notes)


def _write_cache(path: Path, spans: dict[str, Range]) -> None:
    """Hands the ranges over in the form in which ONNX Runtime reads its own calibration back."""
    calibrate = require("onnxruntime.quantization.calibrate", extra="onnx")
    data = {
        name: calibrate.TensorData(lowest=np.float32(span.low), highest=np.float32(span.high))
        for name, span in spans.items()
    }
    calibrate.save_tensors_data(calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, data), path)


def _float_nodes(float_layers: Iterable[str], model: Any) -> list[str]:
    nodes = []
    weights = {tensor.name for tensor in model.graph.initializer}
    for name in float_layers:
        # By its weights or its output: the layer behind reads a tensor named after this one, but is not inside.
        inside = [
            node.name
            for node in model.graph.node
            if any(tensor.startswith(f"{name}.") for tensor in (*weights.intersection(node.input), *node.output))
        ]
        if not inside:
            raise ExportError(
                f"no layer of the file is called '{name}' or lies inside it",
                hint="name a layer or a unit of the model, such as blocks.3.2",
            )
        nodes += inside
    return nodes
