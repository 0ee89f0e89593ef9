"""Which nodes of a traced model are affine, and what each of them computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.calls import is_constant, is_pooling, looks_affine, read_call
from pipeline.folding.reading import conv_of
from pipeline.folding.trace import shape_of

__all__ = ["Layer", "as_passing", "is_affine", "is_window", "read_layers", "ring_entries"]


@dataclass(frozen=True)
class Layer:
    """An affine node of a graph.

    Args:
        node: The node.
        inputs: The values it reads: one, or two or more where it adds them.
        conv: What it computes of its one input; None for a sum.
        signs: Factor of every input of a sum: ±1, or torch's `alpha`.
        kind: "map" for Tensor[N, C, H, W]; "vector" where channels are last.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    conv: AffineConv | None
    signs: tuple[float, ...]
    kind: str

    @property
    def is_join(self) -> bool:
        """Whether it adds branches."""
        return self.conv is None

    @cached_property
    def is_identity(self) -> bool:
        """Whether it hands its input on unchanged."""
        conv = self.conv
        return (
            conv is not None and conv.spec.is_diagonal and not conv.spec.constant and bool(torch.all(conv.weight == 1))
        )

    @cached_property
    def is_window(self) -> bool:
        """Whether it mixes channels or pixels: a convolution, a pooling or a fully connected layer."""
        return self.conv is not None and self.conv.spec.mixes


def read_layers(traced: fx.GraphModule) -> dict[fx.Node, Layer]:
    """Finds the affine nodes of a graph whose nodes know their shapes.

    Args:
        traced: What `trace(model, example_input)` returns.
    """
    modules = dict(traced.named_modules())
    layers: dict[fx.Node, Layer] = {}
    for node in traced.graph.nodes:
        shape = shape_of(node)
        if shape is None or len(shape) not in (2, 3, 4):
            continue
        kind = "map" if len(shape) == 4 else "vector"
        channels = shape[1] if kind == "map" else shape[-1]
        if node.op == "call_module":
            module = modules[str(node.target)]
            layer = _module_layer(node, module, kind)
        elif node.op in ("call_function", "call_method"):
            call = read_call(node, traced, kind, channels)
            layer = None if call is None else Layer(node, *call, kind)
        else:
            layer = None
        if layer is not None:
            layers[node] = layer
    return layers


def ring_entries(traced: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """For every ring-padded convolution the values at which its padding ends: beyond them it takes zeros for granted.

    Plain composition of the layers from these values on is exact at the border; of a layer before them it is not.
    """
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    modules = {node: traced.get_submodule(str(node.target)) for node in nodes}
    tapped = {id(hook): node.args[0] for node in nodes for hook in modules[node]._forward_pre_hooks.values()}
    entries: dict[fx.Node, frozenset[fx.Node]] = {}
    for node, module in modules.items():
        if getattr(module, "ring_exact", False):
            field = cast(Any, module).field
            entries[node] = frozenset(tapped[id(tap)] for tap in field.taps() if id(tap) in tapped)
    return entries


def is_affine(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a node looks affine by its operation alone, without knowing shapes."""
    if node.op == "call_module":
        return conv_of(traced.get_submodule(str(node.target)), 1) is not None
    if node.op not in ("call_function", "call_method"):
        return False
    return looks_affine(node)


def as_passing(node: fx.Node) -> Layer:
    """A stand-in for an affine node of a graph without shapes: enough to find regions, not to fold them."""
    inputs = tuple(arg for arg in node.all_input_nodes if not is_constant(arg))
    conv = AffineConv.identity(1) if len(inputs) == 1 else None
    return Layer(node, inputs, conv, (1,) * len(inputs), "map")


def is_window(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a node is a convolution, an average pooling or a fully connected layer."""
    if node.op != "call_module":
        return is_pooling(node)
    module = traced.get_submodule(str(node.target))
    return isinstance(module, nn.Conv2d | nn.Linear | nn.AvgPool2d) or hasattr(module, "ring_exact")


def _module_layer(node: fx.Node, module: nn.Module, kind: str) -> Layer | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    before = shape_of(source)
    if before is None:
        return None
    channels = before[1] if kind == "map" else before[-1]
    if kind == "vector" and isinstance(module, nn.BatchNorm1d) and len(before) != 2:
        return None
    conv = conv_of(module, channels)
    fits = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.AvgPool2d | nn.ConstantPad2d) or hasattr(
        module, "ring_exact"
    )
    flat = isinstance(module, nn.Linear | nn.BatchNorm1d)
    if conv is None or (fits and kind != "map") or (flat and kind != "vector"):
        return None
    return Layer(node, (source,), conv, (1,), kind)
