"""Refitting the layers behind a folded unit, so that they make up for what one convolution cannot do.

Each convolution is regressed, on what it now gets from the student, against what the teacher gave at the same place;
the ridge draws it to its old weights. A convolution that ends a residual branch is fitted to the teacher's *sum* less
the student's shortcut, so it also mends what the shortcut carries along. One that ends in anything else (a
concatenation, a gate's product) is fitted to its own output in the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.calls import is_sum
from pipeline.folding.normal_equations import NormalEquations, Window
from pipeline.folding.reading import conv_of
from pipeline.folding.walk import Walk, run, value_name

__all__ = ["Refit", "refit_between"]

Refit = Literal["none", "bias", "pointwise", "all"]
_Pairs = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def refit_between(walk: Walk, stop: int, how: Refit, *, ridge: float, samples: int, seed: int = 0) -> list[str]:
    """Refits the student's convolutions between the walk's present cut and a later one, in place.

    Args:
        walk: Teacher, student and their values at the present cut; it does not advance.
        stop: Index of the later cut.
        how: "bias" matches each channel's mean; "pointwise" regresses dense convolutions and matches the means of
            the others; "all" regresses depthwise ones too.
        ridge: Pull to the old weights, in units of the mean variance of the inputs.
        samples: Pixels to use per unknown, at least.
        seed: Chooses the pixels.

    Returns:
        Dotted names of the layers changed.
    """
    changed = []
    for name, module, node in walk.between(walk.at, stop):
        if not isinstance(module, nn.Conv2d) or module.bias is None:
            continue
        pairs = _pairs(walk, stop, node)
        conv = conv_of(module, module.in_channels)
        if pairs is None or conv is None:
            continue
        depthwise = module.groups == module.in_channels == module.out_channels
        if how != "bias" and module.groups == 1:
            _regress_dense(module, conv, pairs, ridge, walk.images, samples, seed)
        elif how == "all" and depthwise:
            _regress_depthwise(module, conv, pairs, ridge, walk.images, samples, seed)
        else:
            _match_means(module, pairs)
        changed.append(name)
    return changed


def _pairs(walk: Walk, stop: int, node: fx.Node) -> _Pairs | None:
    """Starts passes over (input of the student's layer, output that it should give); None without a counterpart."""
    teacher_nodes = {value_name(other): other for other in walk.teacher.graph.nodes}
    source = node.all_input_nodes[0]
    sums = [user for user in node.users if is_sum(user) and len(node.users) == 1]
    aim, shortcut = node, None
    if sums and value_name(sums[0]) in teacher_nodes:
        aim = sums[0]
        shortcut = next(other for other in aim.all_input_nodes if other is not node)
    counterpart = teacher_nodes.get(value_name(aim))
    if counterpart is None:
        return None
    from_teacher, from_student = walk.pairs[walk.at]

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        wanted = [source] if shortcut is None else [source, shortcut]
        for of_teacher, of_student in walk.batches():
            with torch.no_grad():
                target = run(walk.teacher, from_teacher, counterpart, of_teacher)[counterpart]
                values = run(walk.student, from_student, aim, of_student, wanted)
                values.setdefault(from_student, of_student)
                yield values[source], target if shortcut is None else target - values[shortcut]

    return start


def _regress_dense(
    module: nn.Conv2d, conv: AffineConv, pairs: _Pairs, ridge: float, images: int, samples: int, seed: int
) -> None:
    spec = conv.spec
    window = Window(spec.in_channels, spec.out_channels, spec.rows, spec.cols)
    sums = NormalEquations(window, positions=max(-(-samples * window.unknowns // images), 1), seed=seed)
    for inputs, target in pairs():
        sums.add(inputs, target)
    _write(module, sums.solve(ridge, prior=conv))


def _regress_depthwise(
    module: nn.Conv2d, conv: AffineConv, pairs: _Pairs, ridge: float, images: int, samples: int, seed: int
) -> None:
    """One small system per channel."""
    channels, taps = module.in_channels, module.kernel_size[0] * module.kernel_size[1]
    window = Window(1, 1, conv.spec.rows, conv.spec.cols)
    gram = torch.zeros(channels, taps + 1, taps + 1, dtype=torch.float64)
    cross = torch.zeros(channels, taps + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for inputs, target in pairs():
        total = target.shape[2] * target.shape[3]
        place = torch.randperm(total, generator=generator)[: max(-(-20 * samples * taps // images), 1)]
        batch = inputs.shape[0]
        x = window.gather(inputs.reshape(batch * channels, 1, *inputs.shape[2:]), place)
        x = x.reshape(batch, channels, -1, taps).transpose(0, 1).reshape(channels, -1, taps).double()
        x = torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2)
        y = target.flatten(2)[:, :, place].transpose(0, 1).reshape(channels, -1, 1).double()
        gram += x.transpose(1, 2) @ x
        cross += (x.transpose(1, 2) @ y)[:, :, 0]
        count += x.shape[1]
    start = torch.cat([conv.weight.reshape(channels, taps), conv.bias[:, None]], dim=1)
    power = gram.diagonal(dim1=1, dim2=2)[:, :taps].mean(1) / max(count, 1)
    damping = torch.cat([(ridge * power).clamp(min=1e-12)[:, None].expand(-1, taps), torch.zeros(channels, 1)], dim=1)
    system = gram / max(count, 1) + torch.diag_embed(damping.clamp(min=1e-12))
    step = torch.linalg.solve(system, cross / max(count, 1) - (gram / max(count, 1) @ start[:, :, None])[:, :, 0])
    fitted = start + step
    with torch.no_grad():
        module.weight.copy_(fitted[:, :taps].reshape(module.weight.shape))
        cast(Tensor, module.bias).copy_(fitted[:, taps])


def _match_means(module: nn.Conv2d, pairs: _Pairs) -> None:
    """Moves the bias so that each channel's mean is the target's."""
    error = torch.zeros(module.out_channels, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for inputs, target in pairs():
            error += (target - module(inputs)).double().sum(dim=(0, 2, 3))
            count += target.shape[0] * target.shape[2] * target.shape[3]
        cast(Tensor, module.bias).add_((error / max(count, 1)).to(module.weight.dtype))


def _write(module: nn.Conv2d, conv: AffineConv) -> None:
    with torch.no_grad():
        module.weight.copy_(conv.weight)
        cast(Tensor, module.bias).copy_(conv.total_bias)
