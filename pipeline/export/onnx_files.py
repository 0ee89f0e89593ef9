"""Reads `.onnx` files."""

__all__ = ["load_onnx"]

from pathlib import Path
from typing import Any

from pipeline.errors import ExportError
from pipeline.export.extras import require
from pipeline.export.quiet import quietly

_HINT = "the file is damaged or was not written to its end: export it again"


def load_onnx(path: Path | str) -> Any:
    """Parses an `.onnx` file into an `onnx.ModelProto`.

    Raises:
        ExportError: The file is missing, is not ONNX, or is cut off.
    """
    file = Path(path)
    onnx = require("onnx", extra="onnx")
    if not file.is_file():
        raise ExportError(f"no such file: {file}", hint="export it first")
    with quietly(f"read {file.name}", hint=_HINT):
        model = onnx.load_model(str(file))
    # To the parser an empty file is an empty model.
    if not model.graph.node:
        raise ExportError(f"{file.name} ({file.stat().st_size} bytes) holds no graph", hint=_HINT)
    return model
