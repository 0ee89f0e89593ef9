"""Folding without training: the best single convolution for a unit is a least-squares problem, solved once.

For a unit with input X (the student's, with the units before it already folded) and the teacher's output Y over
unlabelled images, the kernel is W = argmin ‖im2col(X)·W + b − Y‖² + λ‖W − W₀‖², where W₀ is the identity for a residual
unit. Nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, fx, nn

from pipeline.errors import FoldError, UnitError
from pipeline.folding.algebra import AffineConv
from pipeline.folding.checks import check_at_least, check_one_of
from pipeline.folding.fold import FoldResult, Segment, fold
from pipeline.folding.geometry import Axis
from pipeline.folding.modules import as_module
from pipeline.folding.normal_equations import NormalEquations, Window
from pipeline.folding.reading import conv_of
from pipeline.folding.refit import Refit, refit_between
from pipeline.folding.trace import shape_of
from pipeline.folding.units import linearise
from pipeline.folding.walk import Images, Walk, as_batches, first_image, run
from pipeline.folding.windows import WindowFit, WindowOptions, tune, windows_of

__all__ = ["ClosedFormResult", "FitOptions", "UnitFit", "closed_form_fold", "fit_unit", "unit_places"]


@dataclass(frozen=True)
class UnitFit:
    """How one unit was fitted.

    Args:
        unit: Its name; of several joined by " + " where they became one convolution together.
        kernel: Taps (rows, cols) chosen.
        residual: Mean squared error over the variance of the teacher's output, on images not fitted to.
        macs_before: Multiply-accumulates of the unit's layers for one image.
        macs_after: The same of the convolution.
        tried: Held-out residual of every kernel size tried.
    """

    unit: str
    kernel: tuple[int, int]
    residual: float
    macs_before: int
    macs_after: int
    tried: dict[int, float]


@dataclass(frozen=True)
class FitOptions:
    """Options of one unit's fit; see `closed_form_fold`."""

    ridge: float = 1e-3
    kernels: tuple[int, ...] = (1, 3, 5)
    max_macs_ratio: float = 1.0
    tolerance: float = 0.05
    held_out: int = 5
    samples: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("ridge", self.ridge, 0)
        for kernel in self.kernels:
            check_at_least("a size among kernels", kernel, 1, whole=True)
            if not kernel % 2:
                raise FoldError(f"kernels holds {kernel}, expected odd sizes", hint=f"{kernel + 1}, for instance")
        check_at_least("max_macs_ratio", self.max_macs_ratio, 0, above=True)
        check_at_least("tolerance", self.tolerance, 0)
        check_at_least("held_out", self.held_out, 2, whole=True)
        check_at_least("samples", self.samples, 1, whole=True)


@dataclass(frozen=True)
class ClosedFormResult:
    """What `closed_form_fold` returns.

    Args:
        model: The folded model: norms fused, each named unit one convolution. As `FoldResult.model`.
        units: How each unit was fitted, in network order.
        refitted: Names of other layers that were refitted.
        windows: What fine-tuning around the units did, where it was asked for.
    """

    model: fx.GraphModule
    units: tuple[UnitFit, ...]
    refitted: tuple[str, ...]
    windows: tuple[WindowFit, ...] = ()


def closed_form_fold(
    model: nn.Module,
    units: Collection[str],
    images: Images,
    *,
    ridge: float = 1e-3,
    kernels: Sequence[int] = (1, 3, 5),
    max_macs_ratio: float = 1.0,
    tolerance: float = 0.05,
    refit: Refit = "none",
    refit_ridge: float = 1e-2,
    windows: WindowOptions | None = None,
    held_out: int = 5,
    samples: int = 60,
    batch_size: int = 32,
    cache_mb: int = 1024,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> ClosedFormResult:
    """Folds units by least squares on unlabelled images.

    Args:
        model: The teacher, activations in place; not changed.
        units: Names of units (`find_units`).
        images: What the network sees in use: a tensor of normalised images, or batches that can be read again.
        ridge: λ in units of the mean variance of the inputs.
        kernels: Odd kernel sizes to choose from for each unit; the size that plain folding would give is always
            among them.
        max_macs_ratio: A size that costs more MACs than this times the unit's own is left out (the smallest size
            stays).
        tolerance: The smallest size is taken whose held-out residual is within this fraction of the best.
        refit: Whether the layers behind the first folded unit are refitted: "none", "bias" (channel means),
            "pointwise" (regression of dense convolutions, means of the others) or "all".
        refit_ridge: Pull of a refitted layer to its old weights.
        windows: Fine-tunes each unit with the block behind it against the teacher's values there, before the next
            unit is fitted; the only part that needs gradients. Off where None.
        held_out: Every so many-th batch is kept for the residuals and the choice of kernel, to which the kernel
            chosen is then fitted as well; of a set with fewer batches, every so many-th image.
        samples: Pixels to use for each unknown of a system, at most; more cost time and change little.
        batch_size: Batches that a tensor of images is cut into.
        cache_mb: Memory for values between passes. A set that needs more is run from the start in every pass.
        seed: Chooses the pixels.
        on_step: Called during the windows' fine-tuning with (units, steps done, steps in all).

    Returns:
        The folded model and how each unit was fitted.

    Raises:
        UnitError: A name is unknown or no unit that can become linear, or two units share layers.
        FoldError: There are no images, values are not finite, or an option has no such value.
    """
    options = FitOptions(ridge, tuple(kernels), max_macs_ratio, tolerance, held_out, samples, seed)
    check_one_of("refit", refit, get_args(Refit))
    check_at_least("refit_ridge", refit_ridge, 0)
    check_at_least("batch_size", batch_size, 1, whole=True)
    check_at_least("cache_mb", cache_mb, 0)
    names = list(dict.fromkeys([units] if isinstance(units, str) else units))
    batches = as_batches(images, batch_size)
    example = first_image(batches)
    teacher = fold(model, example, units=[]).model
    folded = fold(linearise(model, names), example, units=names)
    student = folded.model
    walk = Walk(teacher, student, batches, cache_bytes=int(cache_mb * 2**20))
    places = unit_places(walk, folded, names)
    fits: list[UnitFit] = []
    refitted: list[str] = []
    tuned: list[WindowFit] = []
    spans = windows_of(walk, {i: segment.units for i, segment in places.items()}, windows.reach) if windows else []
    begins: dict[int, Callable[[], None]] = {}
    for index in range(1, len(walk.pairs)):
        if any(start == index - 1 for start, _, _ in spans):
            walk.advance(index - 1)
            begins[index - 1] = walk.mark()
        if index in places:
            walk.advance(index - 1)
            fitted, fit = fit_unit(walk, index, places[index], options)
            _replace(student, places[index].name, fitted)
            walk.alike = False
            fits.append(fit)
        elif refit != "none" and fits and walk.has_convolution(index - 1, index):
            walk.advance(index - 1)
            refitted += refit_between(walk, index, refit, ridge=refit_ridge, samples=samples, seed=seed)
        for start, stop, inside in spans:
            if windows is not None and stop == index:
                begins[start]()
                told = None if on_step is None else partial(on_step, " + ".join(inside))
                tuned.append(tune(walk, stop, inside, windows, held_out=held_out, on_step=told))
    return ClosedFormResult(student, tuple(fits), tuple(refitted), tuple(tuned))


def unit_places(walk: Walk, folded: FoldResult, names: Collection[str]) -> dict[int, Segment]:
    """Where in a walk each unit's convolution is: the index of its output among the walk's cuts.

    Raises:
        UnitError: A unit did not become one convolution between two cuts.
    """
    segments = {segment.name: segment for segment in folded.segments if segment.units}
    places = {
        index: segments[str(node.target)]
        for index, (_, node) in enumerate(walk.pairs)
        if str(node.target) in segments and index and node.all_input_nodes[0] is walk.pairs[index - 1][1]
    }
    missing = set(names).difference(*(segment.units for segment in places.values()))
    if missing:
        reasons = [f"{', '.join(skip.names)}: {skip.reason}" for skip in folded.skipped]
        raise UnitError(
            f"{', '.join(sorted(missing))} did not become one convolution between two values through which all "
            f"else passes" + "".join(f"; {reason}" for reason in reasons),
            hint="name foldable units; `find_units` lists them",
        )
    return places


def fit_unit(walk: Walk, index: int, segment: Segment, options: FitOptions) -> tuple[AffineConv, UnitFit]:
    """Fits one unit, whose output is the walk's cut `index`, on the values at the cut before it."""
    conv = conv_of(walk.student.get_submodule(segment.name), segment.in_channels)
    assert conv is not None, "fold writes convolutions that it can read"
    size = _size(walk, index - 1)
    windows = _windows(conv, options.kernels, options.max_macs_ratio * segment.macs_before, size)
    sums, control = _accumulate(walk, index, windows[-1], options)
    fitted, tried = _choose(sums, control, windows, options)
    kernel = fitted.spec.kernel
    after = fitted.spec.macs(*size)
    return fitted, UnitFit(" + ".join(segment.units), kernel, tried[kernel[0]], segment.macs_before, after, tried)


def _size(walk: Walk, index: int) -> tuple[int, int]:
    shape = shape_of(walk.pairs[index][1])
    assert shape is not None and len(shape) == 4, "a unit reads a map"
    return shape[2], shape[3]


def _windows(conv: AffineConv, kernels: Sequence[int], budget: float, size: tuple[int, int]) -> list[Window]:
    """The windows to choose from, smallest first: all centred where plain folding puts its kernel.

    The smallest is always among them; of the others, those within the budget of MACs.
    """
    spec = conv.spec
    found: dict[int, Window] = {}
    for kernel in sorted({*kernels, *spec.kernel}):
        try:
            rows, cols = (_resized(axis, kernel) for axis in (spec.rows, spec.cols))
        except FoldError:
            continue  # no centre at every input size: a 1×1 with SAME padding and a stride
        macs = replace(spec, groups=1, rows=rows, cols=cols).macs(*size)
        if not found or macs <= budget:
            found[kernel] = Window(spec.in_channels, spec.out_channels, rows, cols)
    # Where no square window has a centre at every input size, the one that plain folding gives is left.
    return list(found.values()) or [Window(spec.in_channels, spec.out_channels, spec.rows, spec.cols)]


def _resized(axis: Axis, kernel: int) -> Axis:
    """The same axis with another number of taps around the same centre, as far from each other as before."""
    if kernel == axis.kernel:
        return axis
    if kernel % 2 != axis.kernel % 2:
        raise FoldError(f"no {kernel} taps around the centre of {axis.kernel}")
    if axis.is_fixed:
        low, high = axis.pads(64)
        more = (kernel - axis.kernel) // 2 * axis.dilation
        if min(low, high) + more < 0:
            raise FoldError(f"no {kernel} taps around the centre of {axis.kernel}: padding would be negative")
        return Axis.fixed(kernel, stride=axis.stride, dilation=axis.dilation, low=low + more, high=high + more)
    resized = Axis.same(kernel, stride=axis.stride, dilation=axis.dilation)
    Axis.union([axis, resized])  # raises where the two move against each other
    return resized


def _accumulate(walk: Walk, index: int, window: Window, options: FitOptions) -> tuple[NormalEquations, NormalEquations]:
    """Sums over the images to fit to, and over those kept for the residual."""
    positions = max(-(-options.samples * window.unknowns // walk.images), 1)
    sums, control = (NormalEquations(window, positions=positions, seed=options.seed + part) for part in (0, 1))
    from_teacher, to_teacher = walk.pairs[index - 1][0], walk.pairs[index][0]
    for of_teacher, of_student, held in walk.parts(options.held_out):
        with torch.no_grad():
            target = run(walk.teacher, from_teacher, to_teacher, of_teacher)[to_teacher]
        (control if held else sums).add(of_student, target)
    return sums, control if control.count else sums


def _choose(
    sums: NormalEquations, control: NormalEquations, windows: list[Window], options: FitOptions
) -> tuple[AffineConv, dict[int, float]]:
    """Solves for every window and takes the smallest that is nearly the best on images not fitted to."""
    solved = {}
    for window in windows:
        prior = _prior(window)
        candidate = sums.solve(options.ridge, prior=prior, window=window)
        solved[window.rows.kernel] = control.residual(candidate), window, prior
    best = min(residual for residual, _, _ in solved.values())
    _, window, prior = next(row for row in solved.values() if row[0] <= best * (1 + options.tolerance) + 1e-12)
    everything = sums if control is sums else sums.merged(control)
    fitted = everything.solve(options.ridge, prior=prior, window=window)
    return fitted, {kernel: residual for kernel, (residual, _, _) in solved.items()}


def _prior(window: Window) -> AffineConv | None:
    """The identity where the unit could be one: a residual block differs from it by what its branch adds."""
    same_size = window.rows.stride == window.cols.stride == 1 and window.rows.output(64) == 64
    if not same_size or window.in_channels != window.out_channels:
        return None
    point = Axis.fixed(1)
    for axis in (window.rows, window.cols):
        if Axis.union([axis, point])[0].kernel != axis.kernel:
            return None  # the pixel itself lies between the taps of a dilated window
    return AffineConv.identity(window.in_channels)


def _replace(student: fx.GraphModule, name: str, conv: AffineConv) -> None:
    like = student.get_submodule(name).weight
    assert isinstance(like, Tensor)
    parent, _, child = name.rpartition(".")
    setattr(student.get_submodule(parent), child, as_module(conv, dtype=like.dtype, device=like.device))
