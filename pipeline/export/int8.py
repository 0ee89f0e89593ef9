"""From a float network to an int8 file: the surgery before quantisation in its right order, then the quantiser.

First the identity leaves the folded kernels and equalisation moves weights, since the others must see both; then comes
training with rounding; bias correction is last, since it measures the rounding of the weights that will ship.
"""

__all__ = ["QUANTISERS", "Int8Options", "Operated", "operate", "quantise"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from pipeline.errors import ExportError
from pipeline.export import qat, quantize
from pipeline.export.bias_correction import correct_biases
from pipeline.export.equalise import EqualisedPair, equalise
from pipeline.export.identity import split_identity
from pipeline.export.tflite import ExportInfo

QUANTISERS = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}
"""The static quantiser of each format."""
# More images than this hardly move a mean; the corrector holds one layer's outputs for all of them in memory, so large
# pictures have to be fewer.
_CORRECTION_IMAGES, _FEWEST, _USUAL_PX = 64, 8, 224
Images = Sequence[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Int8Options:
    """How a network becomes int8.

    Attributes:
        method: ``ptq`` quantises the network as it is; ``qat`` trains it with rounding first.
        split_identity: Whether folded residual kernels are rounded without their identity (`pipeline.export.identity`).
        equalise: Whether neighbouring layers share their weight ranges (`pipeline.export.equalise`).
        bias_correction: Whether biases absorb the mean error of weight rounding (`pipeline.export.bias_correction`).
        per_channel: One weight scale per output channel; one per tensor otherwise.
        ranges: ``minmax``, ``percentile`` or ``mse`` (`pipeline.export.ranges`).
        percentile: The share of values that ``percentile`` keeps, in per cent.
        float_units: Layers or units that stay float32.
        qat_steps: Optimiser steps of ``qat``.
        qat_learning_rate: Its learning rate.
    """

    method: str = "ptq"
    split_identity: bool = True
    equalise: bool = False
    bias_correction: bool = True
    per_channel: bool = True
    ranges: str = "minmax"
    percentile: float = 99.99
    float_units: tuple[str, ...] = ()
    qat_steps: int = 100
    qat_learning_rate: float = 1e-5

    @property
    def rounding(self) -> dict[str, Any]:
        """What the quantisers of all formats take, by the names of their arguments."""
        return {
            "ranges": self.ranges,
            "percentile": self.percentile,
            "per_channel": self.per_channel,
            "float_layers": self.float_units,
        }

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON-ready values, for manifests and metadata; those of another method are left out."""
        kept = {**asdict(self), "float_units": list(self.float_units)}
        if self.method != "qat":
            del kept["qat_steps"], kept["qat_learning_rate"]
        if self.ranges != "percentile":
            del kept["percentile"]
        return kept


@dataclass(frozen=True)
class Operated:
    """A network made ready for the quantiser.

    Attributes:
        network: What to export and quantise.
        reference: The float network whose layers the int8 file's layers should reproduce: equalised and trained as
            `network`, but with whole kernels and uncorrected biases. The network that was given, where nothing else
            was done.
        identities: How much finer the scale of each kernel became whose identity was taken out, as a factor.
        pairs: What equalisation did.
        bias_shifts: The largest bias correction of each layer, in units of its output.
        losses: The loss of every step of quantisation-aware training.
    """

    network: fx.GraphModule
    reference: fx.GraphModule
    identities: dict[str, float]
    pairs: tuple[EqualisedPair, ...] = ()
    bias_shifts: dict[str, float] | None = None
    losses: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What was done, as JSON-ready values for the manifest."""
        record: dict[str, Any] = {
            "identities_apart": {name: round(gain, 2) for name, gain in self.identities.items()},
            "weight_spreads": {p.first: [round(p.spread_before, 3), round(p.spread_after, 3)] for p in self.pairs},
        }
        if self.bias_shifts is not None:
            record["bias_shifts"] = {name: round(shift, 5) for name, shift in self.bias_shifts.items()}
        if self.losses:
            share = max(1, len(self.losses) // 10)
            record["qat"] = {
                "steps": len(self.losses),
                "first_loss": float(np.mean(self.losses[:share])),
                "last_loss": float(np.mean(self.losses[-share:])),
            }
        return record


def operate(
    network: fx.GraphModule,
    calibration: Images,
    options: Int8Options,
    *,
    training: Iterable[Tensor] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Operated:
    """Applies the options' surgery to a lowered network.

    Args:
        network: A lowered network; it is not changed.
        calibration: Calibration images, batches [N, C, H, W].
        options: What to do.
        training: Normalised images [N, C, H, W], at least `options.qat_steps` batches; read with method ``qat`` only.
        on_step: Told (steps done, steps in all) of quantisation-aware training.

    Raises:
        ExportError: The method is unknown, there are no calibration images or they are not finite, or ``qat`` was
            asked for without training images.
        TrainingError: The training images run out, or the loss is not finite.
    """
    if options.method not in {"ptq", "qat"}:
        raise ExportError(f"unknown quantisation method '{options.method}'", hint="expected ptq or qat")
    if not any(len(batch) for batch in calibration):
        raise ExportError("there are no calibration images", hint="give images of the training split")
    for number, batch in enumerate(calibration):
        if not np.isfinite(batch).all():
            raise ExportError(
                f"calibration batch {number} holds NaN or infinite pixels", hint="check the preprocessing"
            )
    reference = network
    identities: dict[str, float] = {}
    if options.split_identity:
        split, identities = split_identity(network, keep=options.float_units)
        network = split if identities else network
    pairs: list[EqualisedPair] = []
    if options.equalise:
        network, pairs = equalise(network, calibration)
        reference = network
    losses: list[float] = []
    if options.method == "qat":
        if training is None:
            raise ExportError("quantisation-aware training has no images", hint="give training images, or use ptq")
        prepared = qat.prepare(network, per_channel=options.per_channel, float_layers=options.float_units).train()
        with torch.no_grad():
            for batch in calibration:
                prepared(torch.from_numpy(batch))
        losses = qat.distil(
            prepared,
            network,
            training,
            steps=options.qat_steps,
            learning_rate=options.qat_learning_rate,
            on_step=on_step,
        )
        reference = network = qat.finish(prepared)
    shifts = None
    if options.bias_correction:
        few = _first(calibration, _correction_images(calibration))
        network, shifts = correct_biases(
            network, few, per_channel=options.per_channel, float_layers=options.float_units
        )
    return Operated(network, reference, identities, tuple(pairs), shifts, tuple(losses))


def quantise(
    float_path: Path | str, out_path: Path | str, calibration: Images, options: Int8Options, *, name: str | None = None
) -> ExportInfo:
    """Quantises a float file; the format is chosen by its suffix.

    Args:
        float_path: The file that was exported from `Operated.network`.
        out_path: Where to write.
        calibration: Calibration images, batches [N, C, H, W].
        options: The ranges, the granularity and the float units apply here.
        name: Stands for the float file in messages, where that is a temporary one.

    Raises:
        ExportError: The file or the images are unfit, or the quantiser fails; no file is left.
    """
    source = Path(float_path)
    try:
        return QUANTISERS[source.suffix.removeprefix(".")](source, out_path, calibration, **options.rounding)
    except ExportError as error:
        if name is None:
            raise
        raise ExportError(f"{name}: {error.what}", hint=error.hint) from error


def _correction_images(calibration: Images) -> int:
    px = calibration[0].shape[-1] if len(calibration) else _USUAL_PX
    return min(_CORRECTION_IMAGES, max(_FEWEST, _CORRECTION_IMAGES * _USUAL_PX**2 // px**2))


def _first(batches: Images, count: int) -> Images:
    kept: list[npt.NDArray[np.float32]] = []
    for batch in batches:
        if count <= 0:
            break
        kept.append(batch[:count])
        count -= len(batch)
    return kept
