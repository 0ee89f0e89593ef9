"""Reads what can be told about a model file without running it: format, identity, precision."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.errors import ModelFileError, RuntimeMissingError

__all__ = ["ModelFile", "inspect", "sha256_of", "telling_names"]

_SUFFIXES = {".tflite": "tflite", ".onnx": "onnx"}
_WEIGHTED_TFLITE_OPS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}
_WEIGHTED_ONNX_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelFile:
    """A model file as it lies on disk.

    Attributes:
        path: Where it is.
        format: ``tflite`` or ``onnx``.
        sha256: SHA-256 of its bytes, in hex.
        size_bytes: Its size.
        precision: What its convolutions and matrix products compute in: ``fp32``, ``fp16``, ``int8``, ``int16x8``,
            ``int8-weights`` (8-bit weights, float activations), ``dynamic`` (activations quantised at each inference),
            ``fp64``, ``mixed``, or ``unknown`` where the reader is missing.
    """

    path: Path
    format: str
    sha256: str
    size_bytes: int
    precision: str


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex.

    Raises:
        ModelFileError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def telling_names(paths: Sequence[Path | str]) -> list[str]:
    """Names each file so that different ones differ: its file name, and as many folders as that takes.

    Args:
        paths: Files, which need not be there; one may come twice, under one name.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - links keep the names that they were given
    names = []
    for path in whole:
        rivals = {other for other in whole if other != path}
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in rivals):
            length += 1
        names.append(Path(*path.parts[-length:]).as_posix())
    return names


def inspect(path: Path, *, expected: str, runtime: str) -> ModelFile:
    """Reads a model file and checks that `runtime` can be expected to run it.

    Args:
        path: The file.
        expected: The format that the runtime reads: ``tflite`` or ``onnx``.
        runtime: Name of the runtime, for messages.

    Raises:
        ModelFileError: If the file is missing, of another format, or damaged.
    """
    if not path.is_file():
        raise ModelFileError(f"no model file at {path}", hint="give the path of a .tflite or .onnx file")
    found = _SUFFIXES.get(path.suffix.lower())
    if found != expected:
        other = {"tflite": "host-litert", "onnx": "host-ort"}.get(found or "")
        hint = f"target {other} runs {path.suffix} files" if other else "export the model to .tflite or .onnx first"
        raise ModelFileError(f"{runtime} runs .{expected} files, not {path.name}", hint=hint)
    sha256 = sha256_of(path)
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise ModelFileError(f"{path} is empty", hint="export the model again")
    try:
        precision = _tflite_precision(path) if expected == "tflite" else _onnx_precision(path)
    except RuntimeMissingError:
        # Only the label is lost: the runtime itself may well be there without the reader.
        precision = "unknown"
    return ModelFile(path, expected, sha256, size_bytes, precision)


def _verdict(pairs: Iterable[tuple[str, str]]) -> str:
    """Names the precision of a model from the (activation type, weight type) of each weighted op."""
    names = set()
    for activation, weight in pairs:
        if activation == "DYNAMIC":
            names.add("dynamic")
        elif "DOUBLE" in (activation, weight):
            names.add("fp64")
        elif activation.startswith("FLOAT") and weight in {"INT8", "UINT8", "INT4"}:
            names.add("int8-weights")
        elif weight == "FLOAT16" or activation == "FLOAT16":
            names.add("fp16")
        elif activation == "FLOAT32":
            names.add("fp32")
        elif activation in {"INT8", "UINT8"}:
            names.add("int8")
        elif activation == "INT16":
            names.add("int16x8")
        else:
            names.add("unknown")
    if len(names) == 1:
        return names.pop()
    return "mixed" if names else "unknown"


def _tflite_precision(path: Path) -> str:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise RuntimeMissingError("ai-edge-litert is not installed") from error
    data = path.read_bytes()
    if len(data) < 8 or data[4:8] != b"TFL3":
        raise ModelFileError(f"{path} is not a TFLite file (no TFL3 identifier)", hint="export the model again")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
    except Exception as error:  # the generated reader raises whatever a damaged offset leads to
        raise ModelFileError(f"{path} is damaged: {error}", hint="export the model again") from error
    codes = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}

    def pairs() -> Iterator[tuple[str, str]]:
        for graph in model.subgraphs:
            # A float16 file keeps its weights in halves and widens them with DEQUANTIZE, constant-folded on load.
            halves = set()
            for op in graph.operators:
                if _tflite_op(model, op, codes) == "DEQUANTIZE" and graph.tensors[op.inputs[0]].type == (
                    schema.TensorType.FLOAT16
                ):
                    halves.add(int(op.outputs[0]))
            for op in graph.operators:
                if _tflite_op(model, op, codes) in _WEIGHTED_TFLITE_OPS:
                    activation = types[graph.tensors[op.inputs[0]].type]
                    weight = "FLOAT16" if int(op.inputs[1]) in halves else types[graph.tensors[op.inputs[1]].type]
                    yield activation, weight

    return _verdict(pairs())


def _tflite_op(model: Any, op: Any, codes: dict[int, str]) -> str:
    code = model.operatorCodes[op.opcodeIndex]
    # The 8-bit field saturates at 127; newer ops live in the wider one.
    return codes.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")


def _onnx_precision(path: Path) -> str:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeMissingError("onnx is not installed") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode errors share no public base class
        raise ModelFileError(f"{path} is not an ONNX file: {error}", hint="export the model again") from error
    graph = model.graph
    if not graph.node:
        raise ModelFileError(f"{path} has no graph", hint="export the model again")
    outside = [item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        # The file alone is what is hashed and sent to devices; half a model would be measured under a whole one's name.
        hint = "save it as one file: onnx.save(onnx.load(PATH), NEW_PATH)"
        raise ModelFileError(f"{path.name} keeps {len(outside)} tensors ({outside[0]}, …) in other files", hint=hint)
    constants: dict[str, str] = {
        item.name: onnx.TensorProto.DataType.Name(item.data_type) for item in graph.initializer
    }
    producers = {name: node for node in graph.node for name in node.output}

    def kind(name: str) -> str:
        node = producers.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            # A quantised activation has no constant to look at; its zero point has the same type.
            zero_point = constants.get(node.input[2], "INT8") if len(node.input) > 2 else "INT8"
            return constants.get(node.input[0], zero_point)
        if node is not None and node.op_type == "Cast" and constants.get(node.input[0]) == "FLOAT16":
            return "FLOAT16"
        found = constants.get(name, "FLOAT")
        return "FLOAT32" if found == "FLOAT" else found

    def pairs() -> Iterator[tuple[str, str]]:
        for node in graph.node:
            if node.op_type in _WEIGHTED_ONNX_OPS:
                yield kind(node.input[0]), kind(node.input[1])
            elif node.op_type in {"QLinearConv", "QLinearMatMul"}:
                yield "INT8", "INT8"
            elif node.op_type in {"ConvInteger", "MatMulInteger"}:
                # Its input was quantised on the spot, with a scale that each inference finds anew.
                yield "DYNAMIC", "INT8"

    return _verdict(pairs())
