"""What a table is made of, whatever it is rendered to."""

__all__ = ["KINDS", "Row", "Table", "percent"]

from dataclasses import dataclass

KINDS = {
    "torch": "torch",
    "tflite_fp32": "TFLite fp32",
    "tflite_fp16": "TFLite fp16",
    "tflite_dynamic": "TFLite dynamic int8",
    "tflite_int8": "TFLite int8",
    "onnx_fp32": "ONNX fp32",
    "onnx_fp16": "ONNX fp16",
    "onnx_dynamic": "ONNX dynamic int8",
    "onnx_int8": "ONNX int8",
    "executorch_fp32": "ExecuTorch fp32",
    "executorch_int8": "ExecuTorch int8",
    "tensorflow": "TensorFlow's interpreter",
}
"""What readers call the torch model and the kinds of files, in the order in which they are shown."""


@dataclass(frozen=True)
class Row:
    """One line of a table; `failed` makes it red."""

    cells: tuple[str, ...]
    failed: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table of text cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def percent(value: float | None) -> str:
    """A fraction in per cent; nothing for None."""
    return "" if value is None else f"{100 * value:.2f}%"
