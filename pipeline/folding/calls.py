"""What calls of functions and methods compute: sums of values, and affine convolutions of one value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pipeline.folding.algebra import AffineConv
from pipeline.folding.reading import average_of
from pipeline.folding.trace import shape_of

__all__ = ["Call", "is_constant", "is_pooling", "is_sum", "looks_affine", "read_call"]

Call = tuple[tuple[fx.Node, ...], AffineConv | None, tuple[float, ...]]
"""The values read; what is computed of one, or None for a sum; the factor of each in a sum."""

_ADDS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTIONS: tuple[object, ...] = (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_")
_PRODUCTS: tuple[object, ...] = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_QUOTIENTS: tuple[object, ...] = (operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_")
_NOTHINGS: tuple[object, ...] = ("contiguous", "clone", torch.clone)
_NEGATIONS: tuple[object, ...] = (operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative")
_DROPOUTS: tuple[object, ...] = (F.dropout, F.dropout1d, F.dropout2d)
_ALPHA_DROPOUTS: tuple[object, ...] = (F.alpha_dropout, F.feature_alpha_dropout)
# Calls that only rearrange: of a parameter they make a constant, and they change none.
_VIEWS: tuple[object, ...] = (
    operator.getitem, torch.reshape, torch.unsqueeze, torch.squeeze,
    "view", "reshape", "unsqueeze", "squeeze", "contiguous", "detach",
)  # fmt: skip


def read_call(node: fx.Node, traced: fx.GraphModule, kind: str, channels: int) -> Call | None:
    """What a call of a function or method computes, or None where it is not known to be affine.

    Args:
        node: The call, in a graph whose nodes know their shapes.
        traced: The graph.
        kind: "map" for Tensor[N, C, H, W]; "vector" where channels are last.
        channels: Channels of its result.
    """
    if is_constant(node):
        return None
    if (single := _of_one(node, channels, kind)) is not None:
        source = node.all_input_nodes[0]
        before = shape_of(source)
        return None if before is None or len(before) != len(shape_of(node) or ()) else ((source,), single, (1,))
    bound = _bound(node, ("input", "other"), ("alpha",))
    if bound is None or not {"input", "other"} <= bound.keys():
        return None
    left, right, alpha = bound["input"], bound["other"], bound.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return None
    if all(isinstance(x, fx.Node) and not is_constant(x) and shape_of(x) == shape_of(node) for x in (left, right)):
        if node.target not in _ADDS + _SUBTRACTIONS:
            return None
        return (left, right), None, (1, -alpha if node.target in _SUBTRACTIONS else alpha)
    for x, other, constant_first in ((left, right, False), (right, left, True)):
        constant = _constant(other, traced, kind, channels)
        if isinstance(x, fx.Node) and constant is not None and shape_of(x) == shape_of(node):
            if constant_first and alpha != 1:
                return None
            conv = _with_constant(node.target, constant * alpha, constant_first=constant_first)
            return None if conv is None else ((x,), conv, (1,))
    return None


def looks_affine(node: fx.Node) -> bool:
    """Whether a call looks affine by its operation alone, without knowing shapes."""
    if node.target in _ADDS + _SUBTRACTIONS or is_constant(node) or _of_one(node, 1, "map") is not None:
        return True
    operands = [source for source in node.all_input_nodes if not is_constant(source)]
    return node.target in _PRODUCTS + _QUOTIENTS and len(operands) == 1


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two different values of one shape, and nothing else."""
    sources = node.all_input_nodes
    plain = node.target in _ADDS and not node.kwargs and len(node.args) == 2
    if any(is_constant(source) for source in sources):
        return False
    return plain and len(sources) == 2 and shape_of(sources[0]) == shape_of(sources[1]) == shape_of(node)


def is_pooling(node: fx.Node) -> bool:
    """Whether a node is a call of average pooling."""
    return node.op == "call_function" and node.target is F.avg_pool2d


def is_constant(node: fx.Node) -> bool:
    """Whether a value is a parameter or buffer, or one rearranged: the same for every input."""
    if node.op == "get_attr":
        return True
    sources = node.all_input_nodes
    return node.target in _VIEWS and bool(sources) and all(is_constant(source) for source in sources)


def _of_one(node: fx.Node, channels: int, kind: str) -> AffineConv | None:
    """What a call with one value and otherwise plain numbers computes of it."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    if node.target in _NOTHINGS:
        return AffineConv.identity(channels)
    if node.target in _NEGATIONS:
        return AffineConv.identity(channels).scaled(-1.0)
    if node.target in _DROPOUTS + _ALPHA_DROPOUTS:
        bound = _bound(node, ("input", "p", "training", "inplace"))
        # Traced in evaluation mode, `training=self.training` is False; where it is left away, torch's default holds.
        idle = bound is not None and bound.get("training", node.target in _DROPOUTS) is False
        return AffineConv.identity(channels) if idle else None
    if node.target is F.pad and kind == "map":
        return _pad(_bound(node, ("input", "pad", "mode", "value")), channels)
    if is_pooling(node) and kind == "map":
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        bound = _bound(node, ("input", *names))
        return None if bound is None else average_of(channels, **{k: v for k, v in bound.items() if k != "input"})
    return None


def _pad(bound: dict[str, Any] | None, channels: int) -> AffineConv | None:
    """Padding with zeros of the last two dimensions, or of the last."""
    if bound is None or bound.get("mode", "constant") != "constant" or bound.get("value") not in (None, 0):
        return None
    pads = bound.get("pad", ())
    if not isinstance(pads, Sequence) or len(pads) not in (2, 4):
        return None
    if not all(isinstance(pad, int) and pad >= 0 for pad in pads):
        return None
    left, right, top, bottom = (*pads, 0, 0)[:4]
    return AffineConv.pad(channels, (top, bottom), (left, right))


def _bound(node: fx.Node, names: Sequence[str], only_named: Sequence[str] = ()) -> dict[str, Any] | None:
    """Arguments of a call by name, or None where one is none of the names."""
    if len(node.args) > len(names) or not set(node.kwargs) <= {*names, *only_named}:
        return None
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


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
    if not isinstance(argument, fx.Node) or not is_constant(argument):
        return None
    held = _held(argument, traced)
    if not isinstance(held, Tensor) or held.numel() not in (1, channels):
        return None
    tail = (channels, 1, 1) if kind == "map" else (channels,)
    if held.numel() == channels and tuple(held.shape)[-len(tail) :] != tail:
        return None
    return held.detach().double().reshape(-1).expand(channels)


def _held(node: fx.Node, traced: fx.GraphModule) -> Any:
    """Value of a constant node."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(traced)
    args = cast(tuple[Any, ...], fx.map_arg(node.args, lambda source: _held(source, traced)))
    kwargs = cast(dict[str, Any], fx.map_arg(node.kwargs, lambda source: _held(source, traced)))
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
