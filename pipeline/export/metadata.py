"""What a file says about itself: labels, preprocessing, recipe, fold list, licence, inside the file.

A `.tflite` file carries it as the named metadata entry ``layerfold`` (UTF-8 JSON), an `.onnx` file as the
`metadata_props` entry of the same name, a `.pte` file as a method of that name that returns it. Runtimes ignore all.
"""

__all__ = ["ENTRY", "read", "read_entry", "write", "write_entry"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ExportError
from pipeline.export import flatbuffer
from pipeline.export.extras import require
from pipeline.export.onnx_files import load_onnx
from pipeline.export.pte_files import read_text, write_text
from pipeline.export.quiet import quietly
from pipeline.export.writing import replacing

ENTRY = "layerfold"


def write(path: Path | str, content: Mapping[str, Any]) -> None:
    """Writes `content` into a `.tflite`, `.onnx` or `.pte` file in place of what an earlier call wrote.

    Args:
        path: The file; it is replaced whole.
        content: JSON-ready values.

    Raises:
        ExportError: The file is missing, damaged or of another format, or `content` is not JSON.
    """
    write_entry(path, ENTRY, content)


def read(path: Path | str) -> dict[str, Any]:
    """The metadata of a `.tflite`, `.onnx` or `.pte` file; empty where it has none.

    Raises:
        ExportError: The file is missing, damaged or of another format.
    """
    return read_entry(path, ENTRY)


def write_entry(path: Path | str, entry: str, content: Mapping[str, Any]) -> None:
    """Writes `content` as the named entry, as `write` does for the main one; other entries stay."""
    file = Path(path)
    try:
        text = json.dumps(dict(content), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"the metadata of {file.name} is not JSON: {error}") from error
    _choose(file, _write_tflite, _write_onnx, write_text)(file, entry, text)


def read_entry(path: Path | str, entry: str) -> dict[str, Any]:
    """The named entry, as `read` does for the main one."""
    file = Path(path)
    text = _choose(file, _read_tflite, _read_onnx, read_text)(file, entry)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ExportError(f"the metadata of {file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"the metadata of {file.name} is {type(content).__name__}, expected an object")
    return content


def _choose(file: Path, tflite: Any, onnx: Any, executorch: Any) -> Any:
    found = {".tflite": tflite, ".onnx": onnx, ".pte": executorch}.get(file.suffix)
    if found is None:
        raise ExportError(
            f"'{file.suffix}' files carry no metadata ({file.name})", hint="expected .tflite, .onnx or .pte"
        )
    return found


def _write_tflite(file: Path, name: str, text: str) -> None:
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite")
    model = flatbuffer.read(file)
    data = list(text.encode())
    for entry in model.metadata or []:
        if entry.name == name.encode():
            model.buffers[entry.buffer].data = data
            break
    else:
        buffer = schema.BufferT()
        buffer.data = data
        model.buffers.append(buffer)
        entry = schema.MetadataT()
        entry.name = name.encode()
        entry.buffer = len(model.buffers) - 1
        model.metadata = [*(model.metadata or []), entry]
    flatbuffer.write(model, file)


def _read_tflite(file: Path, name: str) -> str | None:
    model = flatbuffer.read(file)
    for entry in model.metadata or []:
        if entry.name == name.encode():
            return bytes(bytearray(model.buffers[entry.buffer].data)).decode()
    return None


def _write_onnx(file: Path, name: str, text: str) -> None:
    onnx = require("onnx", extra="onnx")
    model = load_onnx(file)
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != name]
    del model.metadata_props[:]
    for key, value in [*kept, (name, text)]:
        model.metadata_props.add(key=key, value=value)
    with replacing(file) as temporary, quietly(f"write {file.name}"):
        onnx.save_model(model, str(temporary))


def _read_onnx(file: Path, name: str) -> str | None:
    for entry in load_onnx(file).metadata_props:
        if entry.key == name:
            return str(entry.value)
    return None
