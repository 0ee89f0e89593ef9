"""One network into all the files that were asked for, each with what it says about itself and a census of it."""

__all__ = ["EXPORTERS", "SHRINKERS", "Checked", "check", "file_name", "without_needless_pads"]

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx

from pipeline.export import inspect, onnx, precision, tflite
from pipeline.export.census_types import Census
from pipeline.export.stride_padding import expected_pads, without_pads
from pipeline.export.tflite import ExportInfo

EXPORTERS: Mapping[str, Callable[..., ExportInfo]] = {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}
"""The converter of each format."""
SHRINKERS: Mapping[tuple[str, str], Callable[[Path, Path], ExportInfo]] = {
    ("tflite", "fp16"): precision.tflite_fp16,
    ("tflite", "dynamic"): precision.tflite_dynamic,
    ("onnx", "fp16"): precision.onnx_fp16,
    ("onnx", "dynamic"): precision.onnx_dynamic,
}
"""What makes a smaller file of a float32 one without calibration, by format and precision."""


def file_name(stem: str, precision_name: str, form: str) -> str:
    """``stem.tflite`` for float32, ``stem.int8.tflite`` and the like for the others."""
    return f"{stem}.{form}" if precision_name == "fp32" else f"{stem}.{precision_name}.{form}"


@dataclass(frozen=True)
class Checked:
    """A file's census and what the gate says about it.

    Attributes:
        census: What the file holds.
        broken: What makes the file unfit for the target; empty when it passes.
        advice: What only costs speed: needless PAD operators, activations that were not fused.
    """

    census: Census
    broken: tuple[str, ...]
    advice: tuple[str, ...]


def check(
    path: Path, *, pads: int, allow_operators: Collection[str] = (), float_units: Collection[str] = ()
) -> Checked:
    """Takes the census of a file and holds it against what the target runs.

    Args:
        path: The file.
        pads: Padding operators that the network's own padding accounts for (`stride_padding.expected_pads`).
        allow_operators: Operator types that the target runs beside `inspect.MOBILE_OPERATORS`.
        float_units: Layers or units that were asked to stay float.
    """
    found = inspect.census(path)
    allowed = inspect.MOBILE_OPERATORS[found.format] | frozenset(allow_operators)
    broken = inspect.gate(found, allowed=allowed, float_tensors=float_units, lone_activations=True)
    everything = inspect.gate(found, allowed=allowed, float_tensors=float_units, max_pads=pads)
    return Checked(found, tuple(broken), tuple(finding for finding in everything if finding not in broken))


def without_needless_pads(
    network: fx.GraphModule, example: Tensor, *, enlarge: bool
) -> tuple[fx.GraphModule, int, list[str]]:
    """The network to convert, how many PAD operators its files need, and which kernels grew to need fewer."""
    changed: list[str] = []
    if enlarge:
        network, changed = without_pads(network, example)
    return network, expected_pads(network, example), changed
