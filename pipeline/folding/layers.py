"""Which nodes of a traced model are affine, and what each of them computes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis
from pipeline.folding.modules import BorderConv2d, PaddedConv2d
from pipeline.folding.trace import is_activation, shape_of

__all__ = ["Layer", "as_passing", "conv_of", "is_affine", "is_sum", "is_window", "read_layers", "ring_entries"]

_ADDS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTIONS: tuple[object, ...] = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_PRODUCTS: tuple[object, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS: tuple[object, ...] = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_NOTHINGS: tuple[object, ...] = ("contiguous", "clone", torch.clone)
_IDLE_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


@dataclass(frozen=True)
class Layer:
    """An affine node of a graph.

    Args:
        node: The node.
        inputs: The values it reads: one, or two or more where it adds them.
        conv: What it computes of its one input; None for a sum.
        signs: ±1 for every input of a sum.
        kind: "map" for Tensor[N, C, H, W]; "vector" where channels are last.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    conv: AffineConv | None
    signs: tuple[int, ...]
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
            layer = _function_layer(node, traced, kind, channels)
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
    operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
    if node.target in _ADDS + _SUBTRACTIONS:
        return True
    return node.target in _NOTHINGS + _PRODUCTS + _QUOTIENTS and len(operands) == 1


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two different values of one shape, and nothing else."""
    sources = node.all_input_nodes
    plain = node.target in _ADDS and not node.kwargs and len(node.args) == 2
    if any(source.op == "get_attr" for source in sources):
        return False
    return plain and len(sources) == 2 and shape_of(sources[0]) == shape_of(sources[1]) == shape_of(node)


def as_passing(node: fx.Node) -> Layer:
    """A stand-in for an affine node of a graph without shapes: enough to find regions, not to fold them."""
    inputs = tuple(arg for arg in node.all_input_nodes if arg.op != "get_attr")
    conv = AffineConv.identity(1) if len(inputs) == 1 else None
    return Layer(node, inputs, conv, (1,) * len(inputs), "map")


def is_window(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a node is a convolution, an average pooling or a fully connected layer."""
    if node.op != "call_module":
        return False
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
    fits = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.AvgPool2d | nn.ZeroPad2d) or hasattr(module, "ring_exact")
    flat = isinstance(module, nn.Linear | nn.BatchNorm1d)
    if conv is None or (fits and kind != "map") or (flat and kind != "vector"):
        return None
    return Layer(node, (source,), conv, (1,), kind)


def conv_of(module: nn.Module, channels: int) -> AffineConv | None:
    """The affine convolution that a module computes in evaluation, or None where it computes something else.

    Args:
        module: A layer.
        channels: Channels of its input.
    """
    if is_activation(module):
        return AffineConv.identity(channels) if getattr(module, "frozen", None) == 1.0 else None
    if getattr(module, "ring_exact", False):
        inner = conv_of(cast(nn.Module, module.conv), channels)
        return None if inner is None else inner.ringed()
    if isinstance(module, nn.Conv2d):
        return _read_conv(module)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return _read_norm(module)
    if isinstance(module, nn.Linear) and type(module).__name__ == "Linear":  # torch's, or timm's that casts
        point = Axis.fixed(1)
        return AffineConv.conv(module.weight[:, :, None, None], module.bias, point, point)
    if isinstance(module, nn.AvgPool2d):
        return _read_average(module, channels)
    if isinstance(module, nn.ZeroPad2d) and min(module.padding) >= 0:
        left, right, top, bottom = module.padding
        return AffineConv.pad(channels, (top, bottom), (left, right))
    if isinstance(module, _IDLE_MODULES) or type(module).__name__ == "DropPath":
        return AffineConv.identity(channels)
    return None


def _read_conv(module: nn.Conv2d) -> AffineConv | None:
    """Reads exact convolution types only: a subclass may compute its weight (weight standardisation)."""
    name = type(module).__name__
    if isinstance(module, BorderConv2d):
        return None
    if isinstance(module, PaddedConv2d):
        rows, cols = module.rows, module.cols
    elif name in ("Conv2dSame", "Conv2dSameExport"):
        rows, cols = (
            Axis.same(module.kernel_size[axis], stride=module.stride[axis], dilation=module.dilation[axis])
            for axis in (0, 1)
        )
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
        # torch keeps the padding as it applies it, (left, right, top, bottom): "same" may be asymmetric.
        left, right, top, bottom = module._reversed_padding_repeated_twice
        rows, cols = (
            Axis.fixed(
                module.kernel_size[axis],
                stride=module.stride[axis],
                dilation=module.dilation[axis],
                low=pads[0],
                high=pads[1],
            )
            for axis, pads in ((0, (top, bottom)), (1, (left, right)))
        )
    else:
        return None
    return AffineConv.conv(module.weight, module.bias, rows, cols, groups=module.groups)


def _read_norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> AffineConv | None:
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or module.running_var is None:
        return None
    mean, var = cast(Tensor, module.running_mean).double(), module.running_var.double()
    scale = torch.rsqrt(var + module.eps)
    shift = torch.zeros_like(scale)
    if module.affine:
        scale, shift = scale * module.weight.detach().double(), module.bias.detach().double()
    return AffineConv.diagonal(scale, shift - mean * scale)


def _read_average(module: nn.AvgPool2d, channels: int) -> AffineConv | None:
    """Pooling whose divisor is the same at every pixel; one that skips the padding is no convolution."""
    kernel, stride, padding = (_pair(value) for value in (module.kernel_size, module.stride, module.padding))
    padded = padding != (0, 0)
    if type(module) is not nn.AvgPool2d or module.ceil_mode or module.divisor_override is not None:
        return None
    if padded and not module.count_include_pad:
        return None
    rows, cols = (
        Axis.fixed(kernel[axis], stride=stride[axis], low=padding[axis], high=padding[axis]) for axis in (0, 1)
    )
    return AffineConv.average(channels, rows, cols)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _function_layer(node: fx.Node, traced: fx.GraphModule, kind: str, channels: int) -> Layer | None:
    """Sums of maps of equal shape; sums, products and quotients with a number or a value per channel."""
    if node.target in _NOTHINGS and isinstance(node.args[0], fx.Node):
        return Layer(node, (node.args[0],), AffineConv.identity(channels), (1,), kind)
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    operands = [arg for arg in (left, right) if isinstance(arg, fx.Node) and shape_of(arg) == shape_of(node)]
    if len(operands) == 2 and node.target in _ADDS + _SUBTRACTIONS:
        return Layer(node, tuple(operands), None, (1, -1 if node.target in _SUBTRACTIONS else 1), kind)
    for x, other, constant_first in ((left, right, False), (right, left, True)):
        constant = _constant(other, traced, kind, channels)
        if isinstance(x, fx.Node) and constant is not None and shape_of(x) == shape_of(node):
            conv = _with_constant(node.target, constant, constant_first=constant_first)
            return None if conv is None else Layer(node, (x,), conv, (1,), kind)
    return None


def _with_constant(target: object, constant: Tensor, *, constant_first: bool) -> AffineConv | None:
    """x ∘ constant, or constant ∘ x, for Tensor[channels] float64; None for another operation."""
    one = torch.ones_like(constant)
    if target in _ADDS:
        return AffineConv.diagonal(one, constant)
    if target in _SUBTRACTIONS:
        return AffineConv.diagonal(-one, constant) if constant_first else AffineConv.diagonal(one, -constant)
    if target in _PRODUCTS:
        return AffineConv.diagonal(constant)
    if target in _QUOTIENTS and not constant_first:
        return AffineConv.diagonal(1.0 / constant)
    return None


def _constant(argument: object, traced: fx.GraphModule, kind: str, channels: int) -> Tensor | None:
    """The constant as Tensor[channels] float64, or None where it is no such constant."""
    if isinstance(argument, int | float):
        return torch.full((channels,), float(argument), dtype=torch.float64)
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    held = operator.attrgetter(str(argument.target))(traced)
    if not isinstance(held, Tensor) or held.numel() not in (1, channels):
        return None
    tail = (channels, 1, 1) if kind == "map" else (channels,)
    if held.numel() == channels and tuple(held.shape)[-len(tail) :] != tail:
        return None
    return held.detach().double().reshape(-1).expand(channels)
