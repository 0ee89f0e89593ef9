"""Which unit quantisation hurts: the signal-to-noise ratio of every layer's output, float against int8."""

__all__ = ["LayerNoise", "layer_noise", "unit_noise"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.layers import unit_of
from pipeline.export.naming import ACTIVATION_SUFFIX
from pipeline.export.observe import Observer, observe_onnx, observe_tflite, regrouped


@dataclass(frozen=True)
class LayerNoise:
    """How much of one output survives quantisation.

    Attributes:
        name: The layer, or the unit.
        sqnr_db: 10·log10(Σ x² / Σ (x − x̂)²) over all values and images; infinite where nothing changed.
        worst_channel_db: The same for the worst of its channels that carries a signal.
    """

    name: str
    sqnr_db: float
    worst_channel_db: float

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values; an infinite ratio becomes None."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


def layer_noise(
    float_path: Path | str, quantized_path: Path | str, images: Iterable[npt.NDArray[np.float32]]
) -> list[LayerNoise]:
    """Compares every tensor that both files compute, in the order in which the float file computes them.

    Args:
        float_path: The float `.tflite` or `.onnx` file.
        quantized_path: The file made from it.
        images: Normalised images, batches [N, C, H, W] of any N.

    Raises:
        ExportError: The files differ in format, or share no tensor.
    """
    reference, found = Path(float_path), Path(quantized_path)
    if reference.suffix != found.suffix:
        raise ExportError(
            f"{reference.name} and {found.name} are of different formats", hint="compare files of one format"
        )
    exact, rounded = _observer(reference), _observer(found)
    signal: dict[str, npt.NDArray[np.float64]] = {}
    noise: dict[str, npt.NDArray[np.float64]] = {}
    channel_axis = -1 if reference.suffix == ".tflite" else 1
    for batch, real in regrouped(images, exact.batch):
        wanted, seen = exact.watch(batch), rounded.watch(batch)
        for name in wanted.keys() & seen.keys():
            label = name.removesuffix(ACTIVATION_SUFFIX)
            if f"{name}{ACTIVATION_SUFFIX}" in wanted or name == exact.ends[0]:
                continue
            axes = tuple(axis for axis in range(wanted[name].ndim) if axis != channel_axis % wanted[name].ndim)
            # A repeated image fills the last batch: it must not count twice.
            truth, found_values = wanted[name][:real].astype(np.float64), seen[name][:real]
            signal[label] = signal.get(label, 0.0) + (truth**2).sum(axes)
            noise[label] = noise.get(label, 0.0) + ((truth - found_values) ** 2).sum(axes)
    if not signal:
        raise ExportError(f"{reference.name} and {found.name} share no tensor", hint="quantise the float file itself")
    order = [name.removesuffix(ACTIVATION_SUFFIX) for name in wanted]
    return [_noise(name, signal[name], noise[name]) for name in dict.fromkeys(order) if name in signal]


def unit_noise(layers: Sequence[LayerNoise], units: Sequence[str]) -> list[LayerNoise]:
    """One row a unit: its last layer's ratio, which holds what all of it lost, and its worst channel anywhere.

    Args:
        layers: What `layer_noise` returned.
        units: Unit names, such as ``"blocks.3.2"``; a layer outside every unit is a unit of its own.
    """
    grouped: dict[str, list[LayerNoise]] = {}
    for layer in layers:
        grouped.setdefault(unit_of(layer.name, units), []).append(layer)
    return [
        LayerNoise(unit, inside[-1].sqnr_db, min(layer.worst_channel_db for layer in inside))
        for unit, inside in grouped.items()
    ]


def _observer(path: Path) -> Observer:
    return observe_tflite(path) if path.suffix == ".tflite" else observe_onnx(path)


def _noise(name: str, signal: npt.NDArray[np.float64], noise: npt.NDArray[np.float64]) -> LayerNoise:
    alive = signal > 1e-9 * max(float(signal.max()), 1e-30)
    return LayerNoise(
        name,
        _decibels(float(signal.sum()), float(noise.sum())),
        min(_decibels(float(s), float(n)) for s, n in zip(signal[alive], noise[alive], strict=True)),
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf
