"""Activation ranges for static quantisation: what interval of real values the 256 steps should span.

Methods: ``minmax`` (everything seen), ``percentile`` (clip the tails), ``mse`` (the clipping that minimises the
expected squared error of rounding and clipping together; Nagel et al., "A White Paper on Neural Network
Quantization", 2021, section 3.1).
"""

__all__ = ["RANGE_METHODS", "Range", "activation_ranges"]

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.observe import Observer, regrouped

RANGE_METHODS = ("minmax", "percentile", "mse")
_BINS = 2048
# A histogram needs no more than this many values of one tensor from one image.
_VALUES_PER_IMAGE = 65_536
_MSE_CANDIDATES = 60
_STEPS = 255


@dataclass(frozen=True)
class Range:
    """A closed interval of real values that contains zero, which padding and ReLU need exactly."""

    low: float
    high: float


def activation_ranges(
    observer: Observer,
    images: Iterable[npt.NDArray[np.float32]],
    *,
    method: str = "minmax",
    percentile: float = 99.99,
) -> dict[str, Range]:
    """Observes every activation over calibration images.

    Args:
        observer: The float file, opened for watching.
        images: Normalised images in batches [N, C, H, W] of any N.
        method: One of `RANGE_METHODS`.
        percentile: For ``percentile``: the share of values kept inside, in per cent, half of the rest on each side.

    Returns:
        A range per tensor name. The graph's input and output keep all they showed, whatever the method: clipping a
        logit changes the answer.

    Raises:
        ExportError: There are no images, they are not finite, an activation is not finite, or `method` is unknown.
    """
    if method not in RANGE_METHODS:
        raise ExportError(f"unknown range method '{method}'", hint=f"expected one of {', '.join(RANGE_METHODS)}")
    kept = [] if method == "minmax" else list(images)
    extremes = _extremes(observer, _files_batches(images if method == "minmax" else kept, observer.batch))
    if not extremes:
        raise ExportError("there are no calibration images", hint="point the recipe's calibration split at images")
    whole = {name: Range(min(low, 0.0), max(high, 0.0)) for name, (low, high) in extremes.items()}
    if method == "minmax":
        return whole
    histograms = _histograms(observer, _files_batches(kept, observer.batch), whole)
    tail = (100.0 - percentile) / 200.0
    chosen = {}
    for name, span in whole.items():
        if name in observer.ends or span.low == span.high:
            chosen[name] = span
        elif method == "percentile":
            chosen[name] = _between_quantiles(histograms[name], span, tail)
        else:
            chosen[name] = _least_error(histograms[name], span)
    return chosen


def _files_batches(images: Iterable[npt.NDArray[np.float32]], size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Batches of the file's own size; a repeated image moves no extreme."""
    return (batch for batch, _ in regrouped(images, size))


def _extremes(observer: Observer, batches: Iterator[npt.NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    extremes: dict[str, tuple[float, float]] = {}
    for number, batch in enumerate(batches):
        if not np.isfinite(batch).all():
            raise ExportError(
                f"calibration batch {number} holds NaN or infinite pixels", hint="check the preprocessing"
            )
        for name, values in observer.watch(batch).items():
            low, high = float(values.min()), float(values.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ExportError(
                    f"activation '{name}' is NaN or infinite on calibration batch {number}",
                    hint="the float model is broken: check it before quantising",
                )
            old = extremes.get(name, (low, high))
            extremes[name] = (min(low, old[0]), max(high, old[1]))
    return extremes


def _histograms(
    observer: Observer, batches: Iterator[npt.NDArray[np.float32]], spans: dict[str, Range]
) -> dict[str, npt.NDArray[np.float64]]:
    counts = {name: np.zeros(_BINS) for name in spans}
    for number, batch in enumerate(batches):
        for name, values in observer.watch(batch).items():
            span = spans[name]
            if span.low == span.high:
                continue
            flat = values.reshape(-1)
            stride = max(1, flat.size // (_VALUES_PER_IMAGE * len(batch)))
            # Another offset each time, so that no channel is always skipped.
            flat = flat[number % stride :: stride]
            bins = ((flat - span.low) * (_BINS / (span.high - span.low))).astype(np.int64)
            counts[name] += np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)
    return counts


def _between_quantiles(counts: npt.NDArray[np.float64], span: Range, tail: float) -> Range:
    cumulative = np.cumsum(counts) / counts.sum()
    width = (span.high - span.low) / _BINS
    low = span.low + width * int(np.searchsorted(cumulative, tail, side="right"))
    high = span.low + width * (int(np.searchsorted(cumulative, 1.0 - tail, side="left")) + 1)
    return Range(min(low, 0.0), max(high, 0.0))


def _least_error(counts: npt.NDArray[np.float64], span: Range) -> Range:
    centres = span.low + (np.arange(_BINS) + 0.5) * (span.high - span.low) / _BINS
    shares = np.linspace(1.0, 0.05, _MSE_CANDIDATES)
    low, high = span.low, span.high
    # The two ends are chosen in turn: the error is nearly separable, and two rounds settle it.
    for _ in range(2):
        high = min((_error(counts, centres, low, span.high * share), span.high * share) for share in shares)[1]
        low = min((_error(counts, centres, span.low * share, high), span.low * share) for share in shares)[1]
    return Range(low, high)


def _error(counts: npt.NDArray[np.float64], centres: npt.NDArray[np.float64], low: float, high: float) -> float:
    """Expected squared error: a uniform rounding error inside [low, high], the distance to it outside."""
    step = (high - low) / _STEPS
    outside = np.maximum(low - centres, 0.0) + np.maximum(centres - high, 0.0)
    inside = counts[outside == 0].sum() * step**2 / 12.0
    return float(inside + (counts * outside**2).sum())
