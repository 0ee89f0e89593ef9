"""Reads and writes `.tflite` files as trees of Python objects."""

__all__ = ["TENSOR_BITS", "constant", "option", "operator_name", "read", "tensor_name", "type_name", "write"]

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.extras import require
from pipeline.export.writing import replacing

_IDENTIFIER = b"TFL3"
_NUMPY_TYPES = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
TENSOR_BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT8": 8, "UINT8": 8, "INT16": 16, "INT32": 32, "INT64": 64}


def read(path: Path | str) -> Any:
    """Parses a `.tflite` file into the schema's `ModelT` tree.

    Raises:
        ExportError: The file is missing, is not TFLite, or is cut off.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"no such file: {file}", hint="export it first")
    content = file.read_bytes()
    hint = "the file is damaged or was not written to its end: export it again"
    if content[4:8] != _IDENTIFIER:
        raise ExportError(f"{file.name} ({len(content)} bytes) is not a TFLite file", hint=hint)
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        _fetch_appended(model, content)
        _require_whole(model)
    except Exception as error:
        raise ExportError(
            f"{file.name} ({len(content)} bytes) is cut off or damaged: {type(error).__name__}: {error}",
            hint=hint,
        ) from error
    return model


def _fetch_appended(model: Any, content: bytes) -> None:
    """Brings in buffers that a writer appended behind the tree, where older runtimes do not look for them."""
    for number, buffer in enumerate(model.buffers or []):
        if buffer.offset > 1:
            data = content[buffer.offset : buffer.offset + buffer.size]
            if len(data) != buffer.size:
                raise ValueError(f"buffer {number} ends {buffer.size - len(data)} bytes behind the file's end")
            buffer.data = np.frombuffer(data, dtype=np.uint8)
            buffer.offset = buffer.size = 0


def _require_whole(model: Any) -> None:
    if not model.subgraphs or not model.operatorCodes or not model.buffers:
        raise ValueError("it holds no graph")
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        kind = _NUMPY_TYPES.get(type_name(tensor.type))
        if data is None or kind is None or not len(data):
            continue
        wanted = int(np.prod(tensor.shape)) * np.dtype(kind).itemsize
        if len(data) != wanted:
            raise ValueError(f"tensor {tensor_name(tensor)} holds {len(data)} bytes, expected {wanted}")


def write(model: Any, path: Path | str) -> None:
    """Packs a `ModelT` tree and replaces `path` by it."""
    flatbuffers = require("flatbuffers", extra="tflite")
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    with replacing(path) as temporary:
        temporary.write_bytes(builder.Output())


def operator_name(model: Any, operator: Any) -> str:
    """The operator's name, such as ``"CONV_2D"``; custom operators by their own name.

    Old writers put the code into the deprecated byte-wide field, newer operators only fit the wide one: the larger
    of the two is right for both.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    name = names.get(number, f"UNKNOWN_{number}")
    return f"CUSTOM:{code.customCode.decode()}" if name == "CUSTOM" and code.customCode else name


def type_name(tensor_type: int) -> str:
    """The element type's name, such as ``"INT8"``."""
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    names = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    return str(names.get(tensor_type, f"UNKNOWN_{tensor_type}"))


def tensor_name(tensor: Any) -> str:
    """The tensor's name as text."""
    return tensor.name.decode(errors="replace") if isinstance(tensor.name, bytes) else str(tensor.name or "")


def option(operator: Any, name: str, default: Any = None) -> Any:
    """A field of an operator's built-in options, or `default` where it has none."""
    return getattr(operator.builtinOptions, name, default) if operator.builtinOptions is not None else default


def constant(model: Any, tensor: Any) -> npt.NDArray[Any] | None:
    """The values of a constant tensor in its own shape and type, or None for one that is computed."""
    data = model.buffers[tensor.buffer].data
    kind = _NUMPY_TYPES.get(type_name(tensor.type))
    if data is None or kind is None or not len(data):
        return None
    return np.frombuffer(bytes(bytearray(data)), dtype=kind).reshape(tensor.shape)
