"""What each unit costs: how far the network's predictions move when one unit alone is folded.

One pass through the teacher serves all units (two where neighbours share a layer): at each unit its input is at hand,
and only the layers behind the unit are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pipeline.errors import UnitError, nearest
from pipeline.folding.closed_form import FitOptions, fit_unit, unit_places
from pipeline.folding.closeness import Closeness, Comparison
from pipeline.folding.fold import fold
from pipeline.folding.modules import as_module
from pipeline.folding.units import Unit, find_units, linearise
from pipeline.folding.walk import Images, Walk, as_batches, first_image, run

__all__ = ["Sensitivity", "plot", "scan", "table"]

Batches = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Sensitivity:
    """What folding one unit alone does.

    Args:
        unit: Its name.
        kind: Its kind (`Unit.kind`).
        linear: Closeness to the teacher with the unit's activations taken away, nothing else changed.
        closed_form: Closeness with the unit folded by least squares.
        kernel: Taps of the fitted kernel, (rows, cols).
        residual: Mean squared error of the fit over the variance, on images not fitted to.
        macs_before: Multiply-accumulates of the unit.
        macs_after: Of the convolution.
    """

    unit: str
    kind: str
    linear: Closeness
    closed_form: Closeness
    kernel: tuple[int, int]
    residual: float
    macs_before: int
    macs_after: int

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def scan(
    model: nn.Module,
    images: Images,
    selection: Images,
    *,
    units: Collection[str] | None = None,
    options: FitOptions | None = None,
    batch_size: int = 32,
    cache_mb: int = 1024,
    on_unit: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Folds every unit alone, twice: by taking its activations away, and by least squares.

    Args:
        model: The teacher; not changed.
        images: What to fit to.
        selection: What to measure on: neither the images fitted to nor those reported on, else the choice made from
            the scan flatters itself.
        units: Names; every foldable unit where None.
        options: Of the fits.
        batch_size: Batches that a tensor of images is cut into.
        cache_mb: Memory for values between passes, for each of the two sets of images.
        on_unit: Called with (units done, units in all).

    Returns:
        A row for each unit, in network order.

    Raises:
        UnitError: A name is no unit, or a unit does not become one convolution.
        FoldError: There are no images.
    """
    if isinstance(units, str):
        units = [units]
    known = {unit.name: unit for unit in find_units(model)}
    for name in units or ():
        if name not in known:
            raise UnitError(f"{name!r} is no unit of {type(model).__name__}", hint=nearest(name, known))
    names = [name for name, unit in known.items() if (unit.foldable if units is None else name in units)]
    fits, measured = (as_batches(part, batch_size) for part in (images, selection))
    teacher = fold(model, first_image(fits), units=[]).model
    done: dict[str, Sensitivity] = {}

    def add(row: Sensitivity) -> None:
        done[row.unit] = row
        if on_unit is not None:
            on_unit(len(done), len(names))

    blocks = all(known[name].kind != "activation" for name in names)
    for part in [names] if blocks else _apart(model, names, first_image(fits)):
        _scan_apart(model, teacher, part, known, (fits, measured), options or FitOptions(), cache_mb << 20, add)
    return [done[name] for name in names]


def _apart(model: nn.Module, names: Sequence[str], example: Tensor) -> list[list[str]]:
    """Splits units into sets in which no two are neighbours.

    Units that are single activations share the convolution between them: folded together they would become one.
    """
    apart: list[list[str]] = []
    left = list(names)
    while left:
        merged = [segment.units for segment in fold(linearise(model, left), example, units=left).segments]
        later = {unit for units in merged for unit in units[1::2]}
        apart.append([name for name in left if name not in later])
        left = [name for name in left if name in later]
    return apart


def _scan_apart(
    model: nn.Module,
    teacher: fx.GraphModule,
    names: Sequence[str],
    known: Mapping[str, Unit],
    batches: tuple[Batches, Batches],
    options: FitOptions,
    cache_bytes: int,
    add: Callable[[Sensitivity], None],
) -> None:
    """Scans units of which no two are neighbours, in one pass through the teacher."""
    fits, measured = batches
    example = first_image(fits)
    # The same graph with every unit linear but unmerged, and with every unit one convolution.
    straightened = linearise(model, names)
    linear = fold(straightened, example, units=[]).model
    folded = fold(straightened, example, units=names)
    walk = Walk(teacher, folded.model, fits, cache_bytes=cache_bytes)
    control = Walk(teacher, folded.model, measured, cache_bytes=cache_bytes)
    ahead = Walk(teacher, linear, measured, cache_bytes=0)
    for index, segment in unit_places(walk, folded, names).items():
        walk.advance(index - 1)
        control.advance(index - 1)
        fitted, fit = fit_unit(walk, index, segment, options)
        like = next(model.parameters())
        conv = as_module(fitted, dtype=like.dtype, device=like.device)
        start, stop, last = walk.pairs[index - 1][0], walk.pairs[index][0], walk.pairs[-1][0]
        lines = dict(ahead.pairs)
        straight, closed = Comparison(), Comparison()
        with torch.no_grad():
            for value, _ in control.batches():
                truth = run(teacher, start, last, value)[last]
                bent = run(linear, lines[start], lines[stop], value)[lines[stop]]
                straight.add(truth, run(teacher, stop, last, bent)[last])
                closed.add(truth, run(teacher, stop, last, conv(value))[last])
        add(
            Sensitivity(
                fit.unit,
                known[fit.unit].kind,
                straight.result(),
                closed.result(),
                fit.kernel,
                fit.residual,
                fit.macs_before,
                fit.macs_after,
            )
        )


def table(rows: Sequence[Sensitivity]) -> str:
    """The scan as a Markdown table."""
    heads = ["unit", "kind", "kernel", "MACs ratio", "residual"]
    heads += ["agreement, linear", "KL, linear", "agreement, fitted", "KL, fitted"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(
            f"| {row.unit} | {row.kind} | {row.kernel[0]}×{row.kernel[1]} | {row.macs_after / row.macs_before:.2f} "
            f"| {row.residual:.3f} | {row.linear.agreement:.3f} | {row.linear.kl:.3f} "
            f"| {row.closed_form.agreement:.3f} | {row.closed_form.kl:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Sensitivity], path: Path) -> None:
    """Writes a picture of the scan: agreement of every unit, linear and fitted, in network order.

    Args:
        rows: What `scan` returns.
        path: A file whose suffix matplotlib knows (.png, .svg, .pdf).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 0.5 * len(rows) + 1.5), 3.2), layout="constrained")
    axes = figure.add_subplot()
    at = range(len(rows))
    axes.bar([x - 0.2 for x in at], [row.linear.agreement for row in rows], 0.4, label="activations taken away")
    axes.bar([x + 0.2 for x in at], [row.closed_form.agreement for row in rows], 0.4, label="folded by least squares")
    axes.set_xticks(list(at), [row.unit for row in rows], rotation=60, ha="right")
    axes.set_ylabel("agreement with the teacher")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
