"""Attaching α to a network, reading and setting it, and settling it into a network without α.

    student = attach(model, units=["blocks.3.2"])
    set_values(student, {"blocks.3.2": 1.0})
    ready = settle(student)

`attach` and `settle` copy; the functions ending in an underscore, and `set_values`, change the student.
"""

__all__ = [
    "activations",
    "alphas",
    "attach",
    "clamp_",
    "freeze_",
    "hold_",
    "parameters",
    "ring_report",
    "set_values",
    "settle",
    "snap_",
    "values",
]

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from pipeline.alpha import rings
from pipeline.alpha.activation import AlphaActivation, is_activation
from pipeline.alpha.padding import RingConv2d
from pipeline.alpha.replacement import AlphaUnit
from pipeline.errors import TraceError, UnitError, nearest
from pipeline.folding.units import find_units


def attach(
    model: nn.Module,
    units: Sequence[str] | Literal["all"] = "all",
    *,
    per: Literal["unit", "layer"] = "unit",
    ring: bool = True,
    reach: int | None = None,
    initial: float = 0.0,
) -> nn.Module:
    """Blends the activations of fold units with the identity; returns a copy of `model`.

    At α=0 the copy computes what `model` computes; at α=1, with `ring`, exactly what its folded form will.

    Args:
        model: A network whose activations are modules.
        units: Names of fold units (their activations), of any module (all activations below it), or of
            activations; or "all" for every foldable unit, or every activation where the network has no units.
        per: One α for each entry of `units`, or one for each activation.
        ring: Let zero padding inside a unit follow α (DESIGN: the border). False is the published method.
        reach: How many blended activations a ring looks back through; None for all. A bound is quicker in deep
            networks without bottlenecks, and exact until more consecutive activations than that have gone.
        initial: The value of α at the start, in [0, 1].

    Raises:
        UnitError: A name is unknown, holds no activation, or one activation belongs to two units; `per` or
            `initial` is out of range.
        TraceError: With `ring`, the network cannot be traced. Without, such a network has no units: names are of
            modules and activations, and "all" is every activation.
    """
    if per not in ("unit", "layer"):
        raise UnitError(f"per is {per!r}", hint="it is 'unit' or 'layer'")
    if not 0 <= initial <= 1:
        raise UnitError(f"initial is {initial}", hint="α lies in [0, 1]")
    student = copy.deepcopy(model)
    modules = dict(student.named_modules())
    groups = _groups(student, units, per, traced=ring)
    reference = next(iter(student.parameters()), torch.zeros(()))
    blended: dict[str, AlphaActivation | None] = {}
    owner: dict[int, str] = {}
    for group, names in groups.items():
        alpha = nn.Parameter(torch.full((), float(initial), dtype=reference.dtype, device=reference.device))
        for name in names:
            sigma = modules[name]
            if isinstance(sigma, AlphaActivation):
                raise UnitError(
                    f"activation '{name}' has an α already (of '{sigma.group}')", hint="attach to the plain model"
                )
            if id(sigma) in owner:
                raise UnitError(
                    f"activation '{name}' is claimed by both '{owner[id(sigma)]}' and '{group}'",
                    hint="name it, or a unit that contains it, once",
                )
            owner[id(sigma)] = group
            blend = AlphaActivation(sigma, alpha, group)
            blend.train(sigma.training)
            # One module may hang in several places (a shared nn.ReLU): all of them become the blend.
            for place in [n for n, m in student.named_modules(remove_duplicate=False) if m is sigma]:
                parent, _, leaf = place.rpartition(".")
                setattr(student.get_submodule(parent), leaf, blend)
                blended[place] = blend
    if ring:
        rings.install(student, blended, reach=reach)
    return student


def _groups(model: nn.Module, units: Sequence[str] | str, per: str, *, traced: bool) -> dict[str, list[str]]:
    """Activation names by the name of their α, in the order asked."""
    modules = dict(model.named_modules())
    try:
        known = _fold_units(model)
    except TraceError:
        if traced:
            raise
        known = {}
    if units == "all":
        foldable = [name for name, (_, ok) in known.items() if ok]
        names = foldable or [name for name, module in modules.items() if is_activation(module)]
    else:
        names = [units] if isinstance(units, str) else list(units)
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in known:
            inside = list(known[name][0])
        elif name in modules:
            inside = [n for n in modules if n == name or n.startswith(f"{name}.")]
            inside = [n for n in inside if is_activation(modules[n]) or isinstance(modules[n], AlphaActivation)]
        else:
            raise UnitError(
                f"{type(model).__name__} has no unit, module or activation '{name}'",
                hint=nearest(name, [*known, *modules]) or f"units: {', '.join(known) or 'none'}",
            )
        if not inside:
            raise UnitError(f"'{name}' holds no activation module", hint="name a unit, or an activation itself")
        if per == "layer":
            groups.update({activation: [activation] for activation in inside})
        else:
            groups[name] = inside
    return groups


def _fold_units(model: nn.Module) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Fold units of the network: name to (activation names, foldable)."""
    return {unit.name: (unit.activations, unit.foldable) for unit in find_units(model)}


def activations(student: nn.Module) -> dict[str, list[str]]:
    """Dotted names of the blended activations of each α, by the α's name."""
    found: dict[str, list[str]] = {}
    for name, module in student.named_modules():
        if isinstance(module, AlphaActivation):
            found.setdefault(module.group, []).append(name)
    return found


def _blends(student: nn.Module) -> list[AlphaActivation | AlphaUnit]:
    return [module for module in student.modules() if isinstance(module, AlphaActivation | AlphaUnit)]


def alphas(student: nn.Module) -> dict[str, nn.Parameter]:
    """The α parameter of each group, in network order."""
    return {blend.group: blend.alpha for blend in _blends(student)}


def parameters(student: nn.Module) -> list[nn.Parameter]:
    """The α parameters, one a group, in network order: keep them out of weight decay, with their own rate."""
    return list(alphas(student).values())


def values(student: nn.Module) -> dict[str, float]:
    """α by unit or layer name, in network order."""
    return {group: float(alpha.detach()) for group, alpha in alphas(student).items()}


def set_values(student: nn.Module, value: float | Mapping[str, float]) -> nn.Module:
    """Sets every α to a number, or some by name; returns the same student.

    Raises:
        UnitError: A name has no α, or a value is outside [0, 1].
    """
    known = alphas(student)
    wanted = dict(value) if isinstance(value, Mapping) else dict.fromkeys(known, float(value))
    for group, number in wanted.items():
        _check_known(group, known)
        if not 0.0 <= number <= 1.0:
            raise UnitError(f"α of '{group}' cannot be {number}", hint="α lies between 0 and 1")
    for blend in _blends(student):
        if blend.group in wanted:
            if blend.frozen is not None:
                blend.freeze(wanted[blend.group])
            with torch.no_grad():
                blend.alpha.fill_(wanted[blend.group])
    return student


def _check_known(group: str, known: Iterable[str]) -> None:
    if group not in known:
        raise UnitError(
            f"no α is called '{group}'", hint=nearest(group, known) or f"they are: {', '.join(known) or 'none'}"
        )


def clamp_(student: nn.Module) -> None:
    """Brings every α back into [0, 1]; call it after each optimiser step."""
    with torch.no_grad():
        for alpha in parameters(student):
            alpha.clamp_(0.0, 1.0)


def freeze_(student: nn.Module, fixed: Mapping[str, float | None]) -> None:
    """Fixes α of the named groups at a value (at 0 and 1 the blend then costs nothing), or frees it with None.

    Raises:
        UnitError: A name has no α.
    """
    known = alphas(student)
    for group in fixed:
        _check_known(group, known)
    for blend in _blends(student):
        if blend.group in fixed:
            blend.freeze(fixed[blend.group])


def hold_(student: nn.Module) -> None:
    """Gives every fixed α its value again, after other weights (an average, an earlier epoch's) were loaded over it."""
    for blend in _blends(student):
        if blend.frozen is not None:
            blend.freeze(blend.frozen)


def snap_(student: nn.Module, threshold: float = 0.9) -> dict[str, float]:
    """Fixes every α above `threshold` at 1 and every other at 0; returns the values from before.

    Raises:
        UnitError: `threshold` is outside [0, 1].
    """
    _check_threshold(threshold)
    before = values(student)
    freeze_(student, {group: 1.0 if value > threshold else 0.0 for group, value in before.items()})
    return before


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise UnitError(f"threshold is {threshold}", hint="α lies in [0, 1], and so does its threshold")


def settle(student: nn.Module, threshold: float = 0.9) -> nn.Module:
    """Makes a network without α; returns a copy.

    Where α > `threshold` the activation becomes an identity, and the convolution behind it keeps its ring with
    `ring_exact`, so that plain composition of kernels equals this network at the border too. Elsewhere the
    original activation and convolution come back, at their original speed. Of a unit attached with a replacement,
    one of the two stays.

    Args:
        student: What `attach` returned.
        threshold: τ of the paper, in [0, 1].

    Raises:
        UnitError: `threshold` is out of range.
    """
    _check_threshold(threshold)
    settled = copy.deepcopy(student)
    ringed = any(isinstance(module, RingConv2d) for module in settled.modules())
    rings.remove(settled)
    linear: dict[str, AlphaActivation | None] = {}
    for name, module in list(settled.named_modules(remove_duplicate=False)):
        if not isinstance(module, AlphaActivation | AlphaUnit):
            continue
        parent, _, leaf = name.rpartition(".")
        gone = float(module.alpha.detach()) > threshold
        if isinstance(module, AlphaUnit):
            setattr(settled.get_submodule(parent), leaf, module.replacement if gone else module.unit)
            continue
        replacement = nn.Identity() if gone else module.restore()
        replacement.train(module.training)
        setattr(settled.get_submodule(parent), leaf, replacement)
        if gone:
            linear[name] = None
    if ringed and linear:
        rings.install(settled, linear, reach=None)
    return settled


def ring_report(student: nn.Module) -> dict[str, str]:
    """Padded convolutions that read a blended activation but keep zeros, with the reason.

    A unit that contains one is folded with the published method's border error, and the fold says so.
    """
    bare = copy.deepcopy(student)
    rings.remove(bare)
    blended: dict[str, AlphaActivation | None] = {
        name: module
        for name, module in bare.named_modules(remove_duplicate=False)
        if isinstance(module, AlphaActivation)
    }
    return rings.install(bare, blended)[1]
