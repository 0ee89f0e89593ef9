"""What folding each unit saves in time: the unit and its one convolution, measured as files of their own."""

__all__ = ["UnitLatency", "measure"]

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import FoldError, UnitError
from pipeline.export import tflite
from pipeline.folding import fold, linearise
from targets.base import Target
from targets.stats import ratio_interval


@dataclass(frozen=True)
class UnitLatency:
    """Time of one unit on a target.

    Attributes:
        unit: Its name.
        baseline_ms: Median time of one inference of the unit alone.
        folded_ms: The same of its convolution.
        difference_shown: Whether the 95 % interval of the ratio excludes 1.
    """

    unit: str
    baseline_ms: float
    folded_ms: float
    difference_shown: bool

    @property
    def saved_ms(self) -> float:
        """Time saved; 0 where the measurement shows no difference."""
        return self.baseline_ms - self.folded_ms if self.difference_shown else 0.0


def measure(
    model: nn.Module,
    units: Sequence[str],
    example: Tensor,
    target: Target,
    *,
    runs: int = 30,
    restarts: int = 2,
    on_unit: Callable[[int, int], None] | None = None,
) -> list[UnitLatency]:
    """Converts every unit to TFLite, as it is and folded, and measures the pair interleaved.

    A unit alone costs less than inside its network, where it must fetch its input from memory; what matters here is the
    order of the units.

    Args:
        model: The network; not changed.
        units: Names of units that are modules of the network (`find_units`).
        example: Tensor[1, C, H, W], an input of the network.
        target: Runs `.tflite` files and gives times.
        runs: Timed inferences in each process.
        restarts: Processes.
        on_unit: Called with (units done, units in all).

    Raises:
        UnitError: A unit is one activation and no module of its own.
        TargetError: The target failed.
    """
    inputs = _inputs(model, units, example)
    rows = []
    with tempfile.TemporaryDirectory(prefix="layerfold-units-") as text:
        for number, (unit, value) in enumerate(inputs.items(), start=1):
            block = model.get_submodule(unit)
            linear = _linear(block, model, unit)
            folded = fold(linear, value).model
            paths = [Path(text) / f"{number}-{which}.tflite" for which in ("baseline", "folded")]
            for part, path in zip((block, folded), paths, strict=True):
                tflite.export_fp32(part, value, path)
            baseline, after = target.benchmark(paths, runs=runs, restarts=restarts)
            if baseline.median_ms is None or after.median_ms is None:
                raise FoldError(
                    f"{target.name} gives no times: {baseline.invalid_reason or after.invalid_reason}",
                    hint="measure on a target with a clock, such as host-litert",
                )
            shown = ratio_interval(baseline, after).difference_shown
            rows.append(UnitLatency(unit, baseline.median_ms, after.median_ms, shown))
            if on_unit is not None:
                on_unit(number, len(inputs))
    return rows


def _linear(block: nn.Module, model: nn.Module, unit: str) -> nn.Module:
    """The block of the linearised network, so that an activation after the unit's end stays."""
    linear = linearise(model, [unit]).get_submodule(unit)
    assert type(linear) is type(block)
    return linear


def _inputs(model: nn.Module, units: Sequence[str], example: Tensor) -> dict[str, Tensor]:
    """What each unit reads when the network sees the example."""
    found: dict[str, Tensor] = {}
    handles = []
    for unit in units:
        block = model.get_submodule(unit)
        if not list(block.children()):
            raise UnitError(
                f"unit '{unit}' is one activation with the layers around it, no module that can be measured alone",
                hint="choose by MACs: --save-by macs",
            )

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], unit: str = unit) -> None:
            found[unit] = inputs[0].detach().clone()

        handles.append(block.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
