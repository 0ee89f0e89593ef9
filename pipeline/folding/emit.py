"""Writes the pieces of a partition into a traced model as modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.calls import is_constant
from pipeline.folding.graph import Element, Parallel, Single
from pipeline.folding.layers import Layer
from pipeline.folding.modules import PaddedConv2d, as_linear, as_module
from pipeline.folding.partition import Piece
from pipeline.folding.rules import Rules
from pipeline.folding.trace import module_path, shape_of

__all__ = ["Segment", "emit"]

_PLAIN = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d)
_PADS = (nn.ConstantPad2d, nn.ZeroPad2d, PaddedConv2d)


@dataclass(frozen=True)
class Segment:
    """Layers that became one.

    Args:
        name: Dotted name of the new module in the folded model.
        merged: Dotted names of the layers merged; sums and identities are not named.
        kernel: Taps of the new kernel, (rows, cols).
        stride: (rows, cols).
        groups: Blocks of the new kernel.
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        windows: How many convolutions, poolings or fully connected layers are among the merged; one where only
            norms were fused.
        macs_before: Multiply-accumulates of the merged layers for one image of the example's size.
        macs_after: The same of the new layer.
        border: "exact" if the new layer equals the old ones everywhere, "bias map" if it does through the map
            kept for that, "approximate" if it differs near the image's border.
        units: The named units whose layers, or whose neighbours, it merges; none where only norms were fused.
    """

    name: str
    merged: tuple[str, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    in_channels: int
    out_channels: int
    windows: int
    macs_before: int
    macs_after: int
    border: str
    units: tuple[str, ...]


def emit(pieces: Iterable[Piece], traced: fx.GraphModule, rules: Rules) -> list[Segment]:
    """Replaces every piece by one module, in place.

    Args:
        pieces: Disjoint pieces, in graph order inside each region.
        traced: The graph that they were found in; recompiled.
        rules: The affine nodes, and whether the border is to be exact.

    Returns:
        What was merged; pieces of one plain layer stay as they are and are not listed.
    """
    values: dict[fx.Node, fx.Node] = {}
    segments: list[Segment] = []
    for piece in pieces:
        entry = values.get(piece.entry, piece.entry)
        layers = [rules.layers[node] for node in piece.nodes]
        kept = [layer for layer in layers if not layer.is_identity]
        out = piece.nodes[-1]
        if not kept:
            replacement = entry
        elif len(kept) == 1 and _is_plain(kept[0], traced):
            replacement = kept[0].node
            if entry not in replacement.all_input_nodes:
                replacement.replace_input_with(kept[0].inputs[0], entry)
        else:
            conv = _compose(piece.elements, rules)
            name = _name(piece, traced, rules)
            replacement = _insert(conv, name, entry, out, traced, rules)
            if len(kept) > 1:
                segments.append(_segment(piece, conv, name, kept, traced, rules))
        if replacement is not out:
            out.replace_all_uses_with(replacement)
        values[out] = replacement
        constants = [source for node in piece.nodes for source in node.all_input_nodes if is_constant(source)]
        for node in reversed(piece.nodes):
            if node is not replacement and not node.users:
                traced.graph.erase_node(node)
        _erase_unused(constants, traced)
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return segments


def _erase_unused(constants: Iterable[fx.Node], traced: fx.GraphModule) -> None:
    """Erases parameters that went into a kernel, and what rearranged them."""
    for node in dict.fromkeys(constants):
        if not node.users:
            sources = node.all_input_nodes
            traced.graph.erase_node(node)
            _erase_unused(sources, traced)


def _is_plain(layer: Layer, traced: fx.GraphModule) -> bool:
    """Whether a lone layer can stay: its class is torch's or ours, so the folded model needs no other package."""
    node = layer.node
    return node.op != "call_module" or type(traced.get_submodule(str(node.target))) in _PLAIN + _PADS


def _compose(elements: tuple[Element, ...], rules: Rules) -> AffineConv:
    """Multiplies a chain of elements out."""
    total: AffineConv | None = None
    for element in elements:
        own = _compose_element(element, rules)
        total = own if total is None else total.then(own)
    assert total is not None, "a piece has at least one element"
    return total


def _compose_element(element: Element, rules: Rules) -> AffineConv:
    if isinstance(element, Single):
        assert element.layer.conv is not None, "a sum is never a chain link of its own"
        return element.layer.conv
    if isinstance(element, Parallel):
        shape = shape_of(element.join.node) or ()
        channels = shape[1] if element.join.kind == "map" else shape[-1]
        composed = [_compose(branch, rules) if branch else AffineConv.identity(channels) for branch in element.branches]
        return _signed_sum(composed, element.join.signs)
    known: dict[fx.Node, AffineConv] = {}
    for layer in element.layers:
        shape = shape_of(layer.inputs[0]) or ()
        entry = AffineConv.identity(shape[1] if layer.kind == "map" else shape[-1])
        inputs = [known.get(node, entry) for node in layer.inputs]
        known[layer.node] = _signed_sum(inputs, layer.signs) if layer.conv is None else inputs[0].then(layer.conv)
    return known[element.nodes[-1]]


def _signed_sum(branches: list[AffineConv], signs: tuple[float, ...]) -> AffineConv:
    return AffineConv.add(
        [branch if sign == 1 else branch.scaled(sign) for branch, sign in zip(branches, signs, strict=True)]
    )


def _insert(conv: AffineConv, name: str, entry: fx.Node, out: fx.Node, traced: fx.GraphModule, rules: Rules) -> fx.Node:
    """Adds the module and a call of it in front of `out`."""
    like = next((p for p in traced.parameters() if p.is_floating_point()), torch.empty(0))
    module: nn.Module
    if rules.layers[out].kind == "vector":
        module = as_linear(conv, dtype=like.dtype, device=like.device)
    else:
        exact_for = rules.size(entry) if rules.border == "exact" else None
        module = as_module(conv, dtype=like.dtype, device=like.device, bias_map_for=exact_for)
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(out):
        node = traced.graph.call_module(name, (entry,))
    node.meta = {**out.meta, "stands_for": out.meta.get("stands_for", out.name)}
    return node


def _name(piece: Piece, traced: fx.GraphModule, rules: Rules) -> str:
    """A dotted name for the new module: the unit's where the piece is one, else its first windowed layer's."""
    windows = [module_path(node) for node in piece.nodes if rules.layers[node].is_window]
    named = windows or [module_path(node) or node.name for node in piece.nodes]
    first = named[0]
    if len(set(named)) > 1:
        shared = [unit for unit in rules.units or () if all(f"{path}.".startswith(f"{unit}.") for path in named)]
        common = shared[0] if shared else _common_module(named)
        inside = set(piece.nodes)
        others = [
            node
            for node in traced.graph.nodes
            if (node.op == "call_module" and node not in inside) or (node.op == "get_attr" and _is_read(node, inside))
        ]
        beneath = [node for node in others if f"{node.target}.".startswith(f"{common}.")]
        if common and not beneath:
            return common
        if common and not any(node in rules.layers and rules.layers[node].is_window for node in beneath):
            first = f"{common}.folded"
    taken = {str(node.target) for node in traced.graph.nodes if node not in piece.nodes}
    name, index = first, 2
    while name in taken:
        name, index = f"{first}_{index}", index + 1
    return name


def _is_read(constant: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a parameter, or one made of it, is read by nodes that are not inside."""
    return any(_is_read(user, inside) if is_constant(user) else user not in inside for user in constant.users)


def _common_module(paths: list[str]) -> str:
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(parts[0] for parts in shared)


def _segment(
    piece: Piece, conv: AffineConv, name: str, kept: list[Layer], traced: fx.GraphModule, rules: Rules
) -> Segment:
    windows = [layer for layer in kept if layer.is_window]
    before = sum(layer.conv.spec.macs(*rules.size(layer.inputs[0])) for layer in windows if layer.conv)
    spec = conv.spec
    border = "exact"
    if spec.inexact or (spec.mapped and rules.border == "approximate"):
        border = "approximate"
    elif spec.mapped:
        border = "bias map"
    return Segment(
        name,
        tuple(module_path(layer.node) for layer in kept if not layer.is_join),
        spec.kernel,
        spec.stride,
        spec.groups,
        spec.in_channels,
        spec.out_channels,
        len(windows),
        before,
        spec.macs(*rules.size(piece.entry)),
        border,
        _units(piece, rules) if len(windows) > 1 else (),
    )


def _units(piece: Piece, rules: Rules) -> tuple[str, ...]:
    """Named units with two layers in the piece, and named activations that went inside it."""
    windows = [module_path(node) for node in piece.nodes if rules.layers[node].is_window]
    idle = {module_path(node) for node in piece.nodes if rules.layers[node].is_identity}
    return tuple(
        unit
        for unit in rules.units or ()
        if unit in idle or sum(f"{path}.".startswith(f"{unit}.") for path in windows) > 1
    )
