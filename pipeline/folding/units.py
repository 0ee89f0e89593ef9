"""Fold units: the blocks of a network whose inner activations can go so that the block becomes one convolution."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from pipeline.errors import UnitError, nearest
from pipeline.folding.calls import is_constant
from pipeline.folding.graph import find_regions
from pipeline.folding.layers import Layer, as_passing, is_affine, is_window
from pipeline.folding.trace import is_activation, trace

__all__ = ["Unit", "find_activations", "find_units", "linearise", "linearised"]

# Class names are shared by timm, torchvision and most published code.
_KINDS = {
    "InvertedResidual": "inverted_residual",
    "DepthwiseSeparableConv": "depthwise_separable",
    "EdgeResidual": "edge_residual",
    "UniversalInvertedResidual": "universal_inverted_residual",
    "MBConv": "inverted_residual",
    "FusedMBConv": "edge_residual",
    "BasicBlock": "basic_block",
    "Bottleneck": "bottleneck",
}
_GATES = re.compile(r"squeeze|excit|attn|attention|gate|^se$|eca", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """A part of a network that becomes one convolution when its activations go.

    Args:
        name: Dotted name of the block, such as ``blocks.3.2``; of the activation where `kind` is "activation".
        kind: "inverted_residual", "depthwise_separable", "basic_block", … by the block's class; "activation" in
            a network without blocks, where a unit is one activation and the layers on both sides of it.
        activations: Dotted names of the activations between the block's layers, in network order. One that comes
            last in the block, after the residual sum, is not among them: it stays.
        foldable: Whether nothing but these activations keeps the block from being linear.
        reason: What does, where something does.
    """

    name: str
    kind: str
    activations: tuple[str, ...]
    foldable: bool
    reason: str


def find_units(model: nn.Module) -> list[Unit]:
    """Finds the fold units in network order.

    Args:
        model: A traceable model; not changed.

    Raises:
        TraceError: The model cannot be traced.
    """
    traced = trace(model)
    blocks = {name: kind for name, module in model.named_modules() if (kind := _KINDS.get(type(module).__name__))}
    units = [unit for name, kind in blocks.items() if (unit := _block_unit(name, kind, traced))]
    if not units:
        units = _structural_units(model, traced)
    if not units:
        passing = {node: as_passing(node) for node in traced.graph.nodes if is_affine(node, traced)}
        units = [_activation_unit(node, traced, passing) for node in _activation_nodes(traced)]
    order = {str(node.target): index for index, node in reversed(list(enumerate(traced.graph.nodes)))}
    return sorted(units, key=lambda unit: order[unit.activations[0]])


def find_activations(model: nn.Module) -> list[str]:
    """Dotted names of all activation modules in network order, each once.

    Raises:
        TraceError: The model cannot be traced.
    """
    return list(dict.fromkeys(str(node.target) for node in _activation_nodes(trace(model))))


def linearise(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Copies a model and puts the identity in place of activations.

    Args:
        model: The model; not changed.
        names: Dotted names of activation modules, or of units (`find_units`) for the activations inside, or of
            other modules for every activation below them.

    Returns:
        The copy.

    Raises:
        UnitError: A name is unknown, holds no activation, or is a unit that is not linear without them either.
    """
    names = [names] if isinstance(names, str) else list(names)
    # One module may be registered at several places; each place has a name, and only the named ones become linear.
    modules = dict(model.named_modules(remove_duplicate=False))
    units: dict[str, Unit] | None = None
    chosen: list[str] = []
    recorded = list(linearised(model))
    for name in names:
        if name not in modules or not name:
            raise UnitError(
                f"{name!r} is no module of {type(model).__name__}", hint=nearest(name, filter(None, modules))
            )
        if is_activation(modules[name]):
            chosen.append(name)
            recorded.append(name)
            continue
        units = {unit.name: unit for unit in find_units(model)} if units is None else units
        if unit := units.get(name):
            if not unit.foldable:
                raise UnitError(f"unit {name!r} cannot become linear: {unit.reason}")
            chosen += unit.activations
            recorded.append(name)
            continue
        below = [path for path, module in modules.items() if path.startswith(f"{name}.") and is_activation(module)]
        if not below:
            raise UnitError(f"{name!r} holds no activation", hint="name a unit or an activation module")
        chosen += below
        recorded += below
    linear = copy.deepcopy(model)
    if any(type(module).__name__ in _KINDS for module in modules.values()):
        linear._linearised = tuple(dict.fromkeys(recorded))  # type: ignore[assignment]
    for path in chosen:
        parent, _, child = path.rpartition(".")
        setattr(linear.get_submodule(parent), child, nn.Identity())
    return linear


def linearised(model: nn.Module) -> tuple[str, ...]:
    """Units and activations of a network of blocks that `linearise` took away; `fold` merges inside these.

    Such networks have linear layers on both sides of a block's end, which nobody asked to merge. Empty for others.
    """
    return tuple(getattr(model, "_linearised", ()))


def _activation_nodes(traced: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in traced.graph.nodes
        if node.op == "call_module" and is_activation(traced.get_submodule(str(node.target)))
    ]


def _inside(name: str, traced: fx.GraphModule) -> list[fx.Node]:
    """Nodes recorded inside a module, in graph order: its layers, and functions that its own code calls."""
    return [node for node in traced.graph.nodes if _within(node, name)]


def _within(node: fx.Node, name: str) -> bool:
    if node.op == "call_module" and str(node.target).startswith(f"{name}."):
        return True
    stack = node.meta.get("nn_module_stack") or {}
    return any(path == name or path.startswith(f"{name}.") for path, _ in stack.values())


def _block_unit(name: str, kind: str, traced: fx.GraphModule) -> Unit | None:
    """The unit of a block, or None where the block has no activation between layers."""
    nodes = _inside(name, traced)
    members = set(nodes)
    activations = [node for node in _activation_nodes(traced) if node in members]
    inner = [node for node in activations if any(user in members for user in node.users)]
    if not inner:
        return None
    last = set(activations) - set(inner)
    reason = _obstacle(nodes, inner, last, traced)
    return Unit(name, kind, tuple(dict.fromkeys(str(node.target) for node in inner)), not reason, reason)


def _obstacle(nodes: Sequence[fx.Node], inner: list[fx.Node], last: set[fx.Node], traced: fx.GraphModule) -> str:
    """What keeps a block from being one linear region once its inner activations are gone."""
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    for node in inner:
        if calls.count(str(node.target)) > 1:
            return f"{node.target} is called at several places: give each its own module"
    members = set(nodes)
    for node in nodes:
        if node not in inner and node not in last and not is_constant(node) and not is_affine(node, traced):
            return f"{_describe(node, traced)} is not linear"
    outside = {source for node in nodes for source in node.all_input_nodes if source not in members}
    if len(outside) != 1:
        return f"it reads {len(outside)} values from outside"
    leaving = {node for node in nodes if any(user not in members for user in node.users)}
    return "" if len(leaving) == 1 else f"{len(leaving)} of its values are read outside"


def _describe(node: fx.Node, traced: fx.GraphModule) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(traced.get_submodule(str(node.target))).__name__})"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"{target!r}" + (f" in {stack[-1][0]} ({stack[-1][1].__name__})" if stack else "")


def _structural_units(model: nn.Module, traced: fx.GraphModule) -> list[Unit]:
    """The smallest modules of a class of their own that hold an activation between two windowed layers."""
    found: dict[str, Unit] = {}
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if not name or plain or _GATES.search(type(module).__name__) or type(module).__module__.startswith("torch."):
            continue
        windows = [node for node in _inside(name, traced) if is_window(node, traced)]
        kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(module).__name__).lower()
        unit = _block_unit(name, kind, traced) if len(windows) > 1 else None
        if unit is not None:
            found = {path: other for path, other in found.items() if not name.startswith(f"{path}.")}
            found[name] = unit
    return list(found.values())


def _activation_unit(node: fx.Node, traced: fx.GraphModule, passing: Mapping[fx.Node, Layer]) -> Unit:
    """One activation as a unit: foldable where its going joins windowed layers before it with some after it."""
    name = str(node.target)
    if sum(other.target == node.target for other in _activation_nodes(traced)) > 1:
        return Unit(name, "activation", (name,), False, f"{name} is called at several places: give each its own")
    layers = {**passing, node: as_passing(node)}
    region = next(region for region in find_regions(traced.graph, layers) if node in region.nodes)
    position = region.nodes.index(node)
    before, after = (
        any(is_window(other, traced) for other in part)
        for part in (region.nodes[:position], region.nodes[position + 1 :])
    )
    reason = ""
    if not after:
        users = [_describe(user, traced) for user in region.exit.users]
        reason = f"no layer to merge with comes after it, but {', '.join(users)}"
    elif not before:
        reason = f"no layer to merge with comes before it, but {_describe(region.entry, traced)}"
    return Unit(name, "activation", (name,), not reason, reason)
