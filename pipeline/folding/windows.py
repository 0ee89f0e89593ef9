"""Fine-tuning around a folded unit, a few layers at a time, against the teacher's values and without labels.

What one convolution cannot say, the next block's non-linear layers often can. A *window* runs from a folded unit's
input to the end of the block behind it; only its layers are trained, so that the student's value at its end is the
teacher's. Nothing is run but the window, which makes a step several times cheaper than one of the whole network, and
every pixel is a sample, which makes a few hundred photos enough where distilling the whole network's logits overfits
them (`tools/bench/closed_form.py` compares the two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.folding.checks import check_at_least
from pipeline.folding.walk import Walk, run

__all__ = ["WindowFit", "WindowOptions", "tune", "windows_of"]

_FLOOR = 1e-3


@dataclass(frozen=True)
class WindowOptions:
    """How windows are fine-tuned.

    Args:
        steps: Steps of AdamW in each window.
        rate: Largest learning rate, in units of each tensor's root mean square: once norms are fused, layers differ
            in scale by orders of magnitude (relative steps: Shazeer & Stern, "Adafactor", 2018, section 8). It rises
            for a tenth of the steps and falls to zero along a cosine.
        batch: Images of a step.
        reach: Convolutions behind the last folded unit that belong to its window.
        seed: Chooses the images of each step.

    Raises:
        FoldError: There is not one step or one image a step, the rate is not above zero, or the reach is below.
    """

    steps: int = 300
    rate: float = 1e-2
    batch: int = 16
    reach: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("windows.steps", self.steps, 1, whole=True)
        check_at_least("windows.rate", self.rate, 0, above=True)
        check_at_least("windows.batch", self.batch, 1, whole=True)
        check_at_least("windows.reach", self.reach, 0, whole=True)


@dataclass(frozen=True)
class WindowFit:
    """What fine-tuning a window did.

    Args:
        units: The folded units inside.
        layers: Layers that were trained.
        before: Mean squared error over the variance of the teacher's value at the window's end, on images not trained
            on.
        after: The same afterwards. Where it is not less, the layers were left as they were.
    """

    units: tuple[str, ...]
    layers: tuple[str, ...]
    before: float
    after: float


def windows_of(walk: Walk, places: Mapping[int, Sequence[str]], reach: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """Where the windows begin and end.

    Args:
        walk: Teacher and student.
        places: For each cut that is a folded unit's output, the names of its units.
        reach: Convolutions behind a unit; a unit that begins before they are reached joins the window.

    Returns:
        (cut before the first unit, cut at the end, units) in network order.
    """
    found: list[tuple[int, int, tuple[str, ...]]] = []
    last = len(walk.pairs) - 1
    for index in sorted(places):
        names = tuple(places[index])
        stop = index
        while stop < last and _convolutions(walk, index, stop) < reach:
            stop += 1
        if _convolutions(walk, index, stop) == 0:
            stop = index
        if found and index - 1 < found[-1][1]:
            start, _, before = found.pop()
            found.append((start, stop, (*before, *names)))
        else:
            found.append((index - 1, stop, names))
    return found


def _convolutions(walk: Walk, start: int, stop: int) -> int:
    return sum(isinstance(module, nn.Conv2d) for _, module, _ in walk.between(start, stop)) if stop > start else 0


def tune(
    walk: Walk,
    stop: int,
    units: tuple[str, ...],
    options: WindowOptions,
    *,
    held_out: int,
    on_step: Callable[[int, int], None] | None = None,
) -> WindowFit:
    """Trains the student's layers between the walk's present cut and a later one, in place.

    Args:
        walk: Teacher, student and images, at the window's begin; it does not advance.
        stop: Cut whose values the student should have.
        units: Names, for the record.
        options: Steps and rates.
        held_out: Every so many-th batch of the walk is not trained on; with fewer batches, every so many-th image.
        on_step: Called with (steps done, steps in all).
    """
    inside = [
        (name, module) for name, module, _ in walk.between(walk.at, stop) if any(True for _ in module.parameters())
    ]
    tensors = [tensor for _, module in inside for tensor in module.parameters()]
    flags = [tensor.requires_grad for tensor in tensors]
    old = [tensor.detach().clone() for tensor in tensors]
    before = _error(walk, stop, held_out)
    for tensor in tensors:
        tensor.requires_grad_(True)
    rates = [options.rate * scale for _, module in inside for scale in _scales(module)]
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(tensors, rates, strict=True)]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    # A cycle rises for at least one step: where few are taken, half of a slightly longer one.
    few = options.steps < 20
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rates, options.steps + 2 * few, pct_start=0.5 if few else 0.1, cycle_momentum=False
    )
    stream = _samples(walk, stop, options, held_out)
    for step in range(options.steps):
        inputs, target = next(stream)
        with torch.enable_grad():
            loss = (_student(walk, stop, inputs) - target).square().mean() / target.var()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, options.steps)
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.grad = None
        tensor.requires_grad_(flag)
    after = _error(walk, stop, held_out)
    if not after < before:  # also where it is no number
        with torch.no_grad():
            for tensor, value in zip(tensors, old, strict=True):
                tensor.copy_(value)
        after = before
    return WindowFit(units, tuple(name for name, _ in inside), before, after)


def _scales(module: nn.Module) -> list[float]:
    """Root mean square of each parameter; of a bias, which may be zero, at least the weight's."""
    sizes = [float(tensor.detach().square().mean().sqrt()) for tensor in module.parameters()]
    largest = max(sizes)
    return [
        max(size, _FLOOR * largest) if tensor.ndim > 1 else max(size, sizes[0], _FLOOR * largest)
        for size, tensor in zip(sizes, module.parameters(), strict=True)
    ]


def _student(walk: Walk, stop: int, inputs: Tensor) -> Tensor:
    node = walk.pairs[stop][1]
    return run(walk.student, walk.pairs[walk.at][1], node, inputs)[node]


def _pairs(walk: Walk, stop: int, held_out: int, *, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over (student's value here, teacher's value at `stop`) of the images held out, or of the others.

    Of fewer images than `held_out`, all are both.
    """
    here, there = walk.pairs[walk.at][0], walk.pairs[stop][0]
    for of_teacher, of_student, kept in walk.parts(held_out):
        if kept == held or walk.images < held_out:
            with torch.no_grad():
                target = run(walk.teacher, here, there, of_teacher)[there]
            yield of_student, target


def _samples(walk: Walk, stop: int, options: WindowOptions, held_out: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches to train on.

    Where the walk keeps its values in memory, the images of each are drawn from all; else they come as they are read.
    """
    while not walk.keeps_values:
        yield from _pairs(walk, stop, held_out, held=False)
    generator = torch.Generator().manual_seed(options.seed)
    everything = list(_pairs(walk, stop, held_out, held=False))
    inputs, targets = (torch.cat([pair[part] for pair in everything]) for part in (0, 1))
    while True:
        chosen = torch.randint(inputs.shape[0], (options.batch,), generator=generator)
        yield inputs[chosen], targets[chosen]


def _error(walk: Walk, stop: int, held_out: int) -> float:
    """Mean squared error at `stop` over the variance of the teacher's value there, on the images held out."""
    squares, total, power, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, target in _pairs(walk, stop, held_out, held=True):
            squares += float((_student(walk, stop, inputs) - target).double().square().sum())
            total += float(target.double().sum())
            power += float(target.double().square().sum())
            count += target.numel()
    return squares / max(power - total**2 / count, 1e-12)
