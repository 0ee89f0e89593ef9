"""Precisions that need no calibration: float16 and dynamic int8, TFLite and ONNX.

float16 halves the file; phones' GPUs and NPUs compute in it, their CPUs unpack it. Dynamic int8 stores int8 weights and
quantises activations while running, so it needs no images and keeps more accuracy than static int8, at less speed.
"""

__all__ = ["onnx_dynamic", "onnx_fp16", "tflite_dynamic", "tflite_fp16"]

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.export import flatbuffer
from pipeline.export.extras import require
from pipeline.export.onnx_files import load_onnx
from pipeline.export.quiet import quietly
from pipeline.export.tflite import ExportInfo
from pipeline.export.writing import replacing


def tflite_fp16(fp32_path: Path | str, out_path: Path | str) -> ExportInfo:
    """Stores the weights of a float `.tflite` file as float16; input, output and arithmetic stay float32.

    Raises:
        ExportError: The file is unfit or the quantiser fails; no file is left.
    """

    def configure(quantizer: Any, types: Any, algorithms: Any) -> None:
        for operation in (types.CONV_2D, types.DEPTHWISE_CONV_2D, types.FULLY_CONNECTED):
            quantizer.add_weight_only_config(".*", operation, num_bits=16, algorithm_key=algorithms.FLOAT_CASTING)

    return _tflite(fp32_path, out_path, "float16", configure, "float16 weights")


def tflite_dynamic(fp32_path: Path | str, out_path: Path | str) -> ExportInfo:
    """Stores the weights of a float `.tflite` file as int8 and lets the runtime quantise activations.

    Raises:
        ExportError: The file is unfit or the quantiser fails; no file is left.
    """

    def configure(quantizer: Any, types: Any, algorithms: Any) -> None:
        quantizer.add_dynamic_config(".*", types.ALL_SUPPORTED, num_bits=8)

    return _tflite(fp32_path, out_path, "dynamic int8", configure, "int8 weights, activations quantised while running")


def _tflite(
    fp32_path: Path | str,
    out_path: Path | str,
    precision: str,
    configure: Callable[[Any, Any, Any], None],
    note: str,
) -> ExportInfo:
    source, target = Path(fp32_path), Path(out_path)
    started = time.perf_counter()
    flatbuffer.read(source)
    with replacing(target) as temporary, quietly(f"store {source.name} as {precision}"):
        tools = require("ai_edge_quantizer.quantizer", extra="tflite")
        types = require("ai_edge_quantizer.qtyping", extra="tflite").TFLOperationName
        quantizer = tools.Quantizer(str(source))
        configure(quantizer, types, tools.AlgorithmName)
        temporary.write_bytes(bytes(quantizer.quantize(enable_progress_report=False).quantized_model))
        flatbuffer.write(flatbuffer.read(temporary), temporary)
    converter = f"ai-edge-quantizer {version('ai-edge-quantizer')}"
    return ExportInfo.of(target, converter=converter, since=started, notes=(note,))


def onnx_fp16(fp32_path: Path | str, out_path: Path | str) -> ExportInfo:
    """Converts a float `.onnx` file to float16 weights and arithmetic; input and output stay float32.

    Raises:
        ExportError: The file is unfit or the converter fails; no file is left.
    """
    source, target = Path(fp32_path), Path(out_path)
    started = time.perf_counter()
    onnx = require("onnx", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    with replacing(target) as temporary, quietly(f"store {source.name} as float16"):
        tool = require("onnxruntime.transformers.float16", extra="onnx")
        model = onnx.shape_inference.infer_shapes(load_onnx(source))
        halved = tool.convert_float_to_float16(model, keep_io_types=True)
        # The converter appends the cast of the input behind its readers.
        require("onnxruntime.transformers.onnx_model", extra="onnx").OnnxModel(halved).topological_sort()
        onnx.save_model(halved, str(temporary))
        onnx.checker.check_model(str(temporary))
    converter = f"onnxruntime {runtime.__version__} float16"
    return ExportInfo.of(target, converter=converter, since=started, notes=("float16 weights and arithmetic",))


def onnx_dynamic(fp32_path: Path | str, out_path: Path | str) -> ExportInfo:
    """Stores the weights of a float `.onnx` file as int8 and lets the runtime quantise activations.

    Raises:
        ExportError: The file is unfit or the quantiser fails; no file is left.
    """
    source, target = Path(fp32_path), Path(out_path)
    started = time.perf_counter()
    onnx = require("onnx", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    tools = require("onnxruntime.quantization", extra="onnx")
    load_onnx(source)
    with replacing(target) as temporary, quietly(f"store {source.name} as dynamic int8"):
        tools.quantize_dynamic(
            str(source),
            str(temporary),
            # The tool gives convolutions one weight scale a tensor here whatever `per_channel` says.
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
        onnx.checker.check_model(str(temporary))
    note = "int8 weights, activations quantised while running"
    return ExportInfo.of(target, converter=f"onnxruntime {runtime.__version__} dynamic", since=started, notes=(note,))
