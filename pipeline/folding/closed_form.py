"""Folding without training: the best single convolution for a unit is a least-squares problem, solved once.

For a unit with input X (the student's, with the units before it already folded) and the teacher's output Y over
unlabelled images, the kernel is W = argmin ‖im2col(X)·W + b − Y‖² + λ‖W − W₀‖², where W₀ is the identity for a residual
unit. Nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from pipeline.errors import FoldError, UnitError
from pipeline.folding.algebra import AffineConv
from pipeline.folding.fold import fold
from pipeline.folding.geometry import Axis
from pipeline.folding.layers import conv_of
from pipeline.folding.modules import as_module
from pipeline.folding.normal_equations import NormalEquations, Window
from pipeline.folding.refit import Refit, refit_between
from pipeline.folding.trace import shape_of
from pipeline.folding.units import linearise
from pipeline.folding.walk import Images, Walk, as_batches, run

__all__ = ["ClosedFormResult", "UnitFit", "closed_form_fold"]


@dataclass(frozen=True)
class UnitFit:
    """How one unit was fitted.

    Args:
        name: The unit.
        kernel: Taps (rows, cols) chosen.
        residual: Mean squared error over the variance of the teacher's output, on images not fitted to.
        macs_before: Multiply-accumulates of the unit's layers for one image.
        macs_after: The same of the convolution.
        tried: Held-out residual of every kernel size tried.
    """

    name: str
    kernel: tuple[int, int]
    residual: float
    macs_before: int
    macs_after: int
    tried: dict[int, float]


@dataclass(frozen=True)
class ClosedFormResult:
    """What `closed_form_fold` returns.

    Args:
        model: The folded model: norms fused, each named unit one convolution. As `FoldResult.model`.
        units: How each unit was fitted, in network order.
        refitted: Names of other layers that were changed.
    """

    model: fx.GraphModule
    units: tuple[UnitFit, ...]
    refitted: tuple[str, ...]


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
    held_out: int = 5,
    samples: int = 60,
    batch_size: int = 32,
    cache_mb: int = 1024,
    seed: int = 0,
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
        held_out: Every so many-th batch is kept for the residuals and the choice of kernel.
        samples: Pixels to use for each unknown of a system, at most; more cost time and change little.
        batch_size: Batches that a tensor of images is cut into.
        cache_mb: Memory for values between passes. A set that needs more is run from the start in every pass.
        seed: Chooses the pixels.

    Returns:
        The folded model and how each unit was fitted.

    Raises:
        UnitError: A name is unknown or no unit that can become linear, or two units share layers.
        FoldError: There are no images, or values are not finite.
    """
    names = [units] if isinstance(units, str) else list(units)
    batches = as_batches(images, batch_size)
    example = next(batches(), torch.empty(0))[:1]
    if not example.numel():
        raise FoldError("no image was given", hint="pass a tensor of images, or batches that can be read again")
    teacher = fold(model, example, units=[]).model
    folded = fold(linearise(model, names), example, units=names)
    student = folded.model
    segments = {segment.name: segment for segment in folded.segments if segment.windows > 1}
    walk = Walk(teacher, student, batches, cache_bytes=cache_mb << 20)
    places = {node.target: index for index, (_, node) in enumerate(walk.pairs)}
    missing = [name for name in segments if name not in places]
    if missing or len(segments) < len(names):
        known = ", ".join(segments) or "none"
        raise UnitError(
            f"of the units {', '.join(names)} only {known} became one convolution each that can be fitted",
            hint="name units that are blocks of their own; `find_units` lists them",
        )
    fits: list[UnitFit] = []
    refitted: list[str] = []
    for index in range(1, len(walk.pairs)):
        name = str(walk.pairs[index][1].target)
        if name in segments:
            walk.advance(index - 1)
            conv = conv_of(student.get_submodule(name), segments[name].in_channels)
            assert conv is not None, "fold writes convolutions that it can read"
            budget = max_macs_ratio * segments[name].macs_before
            windows = _windows(conv, kernels, budget, _size(walk, index - 1))
            sums, control = _accumulate(walk, index, windows[-1], samples, held_out, seed)
            fitted, tried = _choose(sums, control, windows, ridge, tolerance)
            _replace(student, name, fitted)
            walk.alike = False
            after = fitted.spec.macs(*_size(walk, index - 1))
            residual = tried[fitted.spec.rows.kernel]
            fits.append(UnitFit(name, fitted.spec.kernel, residual, segments[name].macs_before, after, tried))
        elif (
            refit != "none"
            and fits
            and any(isinstance(module, nn.Conv2d) for _, module, _ in walk.between(index - 1, index))
        ):
            walk.advance(index - 1)
            refitted += refit_between(walk, index, refit, ridge=refit_ridge, samples=samples, seed=seed)
    return ClosedFormResult(student, tuple(fits), tuple(refitted))


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
    return list(found.values())


def _resized(axis: Axis, kernel: int) -> Axis:
    """The same axis with another number of taps around the same centre."""
    if axis.dilation != 1 or kernel % 2 != axis.kernel % 2:
        raise FoldError(f"no {kernel} taps around the centre of {axis.kernel}")
    if axis.is_fixed:
        low, high = axis.pads(64)
        more = (kernel - axis.kernel) // 2
        if min(low, high) + more < 0:
            raise FoldError(f"no {kernel} taps around the centre of {axis.kernel}: padding would be negative")
        return Axis.fixed(kernel, stride=axis.stride, low=low + more, high=high + more)
    resized = Axis.same(kernel, stride=axis.stride)
    Axis.union([axis, resized])  # raises where the two move against each other
    return resized


def _accumulate(
    walk: Walk, index: int, window: Window, samples: int, held_out: int, seed: int
) -> tuple[NormalEquations, NormalEquations]:
    """Sums over the images to fit to, and over those kept for the residual."""
    positions = max(-(-samples * window.unknowns // walk.images), 1)
    sums, control = (NormalEquations(window, positions=positions, seed=seed + part) for part in (0, 1))
    (from_teacher, from_student), (to_teacher, to_student) = walk.pairs[index - 1], walk.pairs[index]
    assert to_student.all_input_nodes[0] is from_student, "a unit starts at a cut"
    for number, (of_teacher, of_student) in enumerate(walk.batches(), start=1):
        with torch.no_grad():
            target = run(walk.teacher, from_teacher, to_teacher, of_teacher)[to_teacher]
        (sums if number % held_out else control).add(of_student, target)
    return sums, control if control.count else sums


def _choose(
    sums: NormalEquations, control: NormalEquations, windows: list[Window], ridge: float, tolerance: float
) -> tuple[AffineConv, dict[int, float]]:
    """Solves for every window and takes the smallest that is nearly the best on images not fitted to."""
    solved = {}
    for window in windows:
        prior = _prior(window)
        candidate = sums.solve(ridge, prior=prior, window=window)
        solved[window.rows.kernel] = control.residual(candidate), window, prior
    best = min(residual for residual, _, _ in solved.values())
    _, window, prior = next(row for row in solved.values() if row[0] <= best * (1 + tolerance))
    everything = sums if control is sums else sums.merged(control)
    fitted = everything.solve(ridge, prior=prior, window=window)
    return fitted, {kernel: residual for kernel, (residual, _, _) in solved.items()}


def _prior(window: Window) -> AffineConv | None:
    """The identity where the unit could be one: a residual block differs from it by what its branch adds."""
    same_size = window.rows.stride == window.cols.stride == 1 and window.rows.output(64) == 64
    if not same_size or window.in_channels != window.out_channels:
        return None
    return AffineConv.identity(window.in_channels)


def _replace(student: fx.GraphModule, name: str, conv: AffineConv) -> None:
    like = student.get_submodule(name).weight
    assert isinstance(like, Tensor)
    parent, _, child = name.rpartition(".")
    setattr(student.get_submodule(parent), child, as_module(conv, dtype=like.dtype, device=like.device))
