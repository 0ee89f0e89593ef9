"""One network into all the files that were asked for, each with what it says about itself and a census of it."""

__all__ = [
    "EXPORTERS",
    "SHRINKERS",
    "SUFFIXES",
    "Checked",
    "check",
    "conversion_record",
    "file_name",
    "require_formats",
    "to_int8",
    "without_needless_pads",
]

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx

from pipeline.errors import ExportError
from pipeline.export import executorch, executorch_int8, inspect, onnx, precision, tflite
from pipeline.export.census_types import Census
from pipeline.export.extras import require_installed
from pipeline.export.input_format import PixelInput
from pipeline.export.int8 import Images, Int8Options, Operated, quantise
from pipeline.export.stride_padding import expected_pads, without_pads
from pipeline.export.tflite import ExportInfo

EXPORTERS: Mapping[str, Callable[..., ExportInfo]] = {
    "tflite": tflite.export_fp32,
    "onnx": onnx.export_fp32,
    "executorch": executorch.export_fp32,
}
"""The converter of each format."""
SUFFIXES: Mapping[str, str] = {"tflite": "tflite", "onnx": "onnx", "executorch": "pte"}
"""What the files of each format end with."""
SHRINKERS: Mapping[tuple[str, str], Callable[[Path, Path], ExportInfo]] = {
    ("tflite", "fp16"): precision.tflite_fp16,
    ("tflite", "dynamic"): precision.tflite_dynamic,
    ("onnx", "fp16"): precision.onnx_fp16,
    ("onnx", "dynamic"): precision.onnx_dynamic,
}
"""What makes a smaller file of a float32 one without calibration, by format and precision."""


def file_name(stem: str, precision_name: str, form: str) -> str:
    """``stem.tflite`` for float32, ``stem.int8.tflite`` and the like for the others."""
    suffix = SUFFIXES[form]
    return f"{stem}.{suffix}" if precision_name == "fp32" else f"{stem}.{precision_name}.{suffix}"


def require_formats(formats: Collection[str], precisions: Collection[str]) -> None:
    """Finds out before any work whether files of these formats and precisions can be made.

    Raises:
        ExportError: A format has no such precision, or its library is not installed.
    """
    for form in formats:
        for name in precisions:
            if name not in ("fp32", "int8") and (form, name) not in SHRINKERS:
                raise ExportError(
                    f"{form} files are not written in {name}",
                    hint=f"leave {name} out, or export {form} by itself in fp32 and int8",
                )
    if "executorch" in formats:
        require_installed("executorch", extra="executorch")


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


def to_int8(
    form: str,
    network: fx.GraphModule,
    ready: Operated,
    exported: Path,
    path: Path,
    calibration: Images,
    options: Int8Options,
    *,
    example: Tensor,
    pixels: PixelInput | None,
    scratch: Path,
) -> tuple[ExportInfo, Path]:
    """Writes the int8 file of a network in one format.

    Args:
        form: The format.
        network: The lowered network before the surgery.
        ready: What the surgery made of it.
        exported: The float file of `network`.
        path: Where to write.
        calibration: Calibration images, batches [N, C, H, W].
        options: How to quantise.
        example: The network's input.
        pixels: The normalisation inside the files, if any.
        scratch: Where a float file of the network after surgery goes, where one is needed.

    Returns:
        The record, and the float file of the same network: `exported` where the surgery changed nothing, and for
        ExecuTorch, whose quantiser starts from the network itself.

    Raises:
        ExportError: The images are unfit, or the converter or the quantiser fails; no int8 file is left.
    """
    if form == "executorch":
        info = executorch_int8.export_int8(ready.network, example, path, calibration, pixels=pixels, **options.rounding)
        return info, exported
    source = exported
    if ready.network is not network:
        source = scratch
        EXPORTERS[form](ready.network, example, source, pixels=pixels)
    return quantise(source, path, calibration, options, name=exported.name), source


def conversion_record(precision_name: str, info: ExportInfo) -> dict[str, object]:
    """What a file says about its making: precision, converter, which simplifier ran, what was changed."""
    return {"precision": precision_name, "converter": info.converter, "notes": list(info.notes)}


def without_needless_pads(
    network: fx.GraphModule, example: Tensor, *, enlarge: bool
) -> tuple[fx.GraphModule, int, list[str]]:
    """The network to convert, how many PAD operators its files need, and which kernels grew to need fewer."""
    changed: list[str] = []
    if enlarge:
        network, changed = without_pads(network, example)
    return network, expected_pads(network, example), changed
