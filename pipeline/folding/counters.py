"""Parameters, multiply-accumulates and depth of a model, read from its graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.folding.trace import is_activation, shape_of, trace

__all__ = ["Counts", "count"]

_FUNCTIONS: frozenset[object] = frozenset(
    {
        torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.prelu, F.elu, F.selu, F.celu, F.gelu,
        F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.logsigmoid, F.sigmoid, F.tanh,
        "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardsigmoid",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Size of a model.

    Args:
        params: Parameters (not buffers).
        macs: Multiply-accumulates of convolutions and fully connected layers for one sample.
        depth: Number of non-linear layers left: calls of an activation (pooling and gating products excluded).
    """

    params: int
    macs: int
    depth: int


def count(model: nn.Module, example_input: Tensor) -> Counts:
    """Counts a model on an input of the example's size.

    Args:
        model: A traceable model; not changed.
        example_input: Tensor[N, C, H, W] or what the model takes; MACs are given for one of its N samples.

    Raises:
        TraceError: The model cannot be traced, or fails on the example.
    """
    traced = trace(model, example_input)
    macs = depth = 0
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(str(node.target))
            whole = str(node.target) in traced.meta["opaque"]
            macs += _opaque_macs(module, node) if whole else _macs(module, node)
            parts = module.modules() if whole else [module]
            depth += sum(is_activation(part) and getattr(part, "frozen", None) != 1.0 for part in parts)
        elif node.op in ("call_function", "call_method"):
            depth += node.target in _FUNCTIONS
            macs += _function_macs(node)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Counts(params, macs // example_input.shape[0], depth)


def _function_macs(node: fx.Node) -> int:
    """MACs of a convolution or product with a weight that is written as a function call."""
    if node.target not in (F.conv1d, F.conv2d, F.conv3d, F.linear):
        return 0
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    shapes = shape_of(node), shape_of(weight) if isinstance(weight, fx.Node) else None
    return math.prod(shapes[0]) * math.prod(shapes[1][1:]) if shapes[0] and shapes[1] else 0


def _opaque_macs(module: nn.Module, node: fx.Node) -> int:
    """MACs of a module that the graph holds as a whole, counted while it runs."""
    like = next(module.parameters(), torch.empty(0))
    inputs = [torch.zeros(shape_of(source) or (), dtype=like.dtype) for source in node.all_input_nodes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(value.to(like.device) for value in inputs))
    return int(counter.get_total_flops()) // 2


def _macs(module: nn.Module, node: fx.Node) -> int:
    if hasattr(module, "ring_exact"):
        module = cast(nn.Module, module.conv)
    shape = shape_of(node)
    if shape is None:
        return 0
    if isinstance(module, nn.ConvTranspose2d):
        source = shape_of(node.all_input_nodes[0]) or ()
        return math.prod(source) * module.weight[0].numel()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return math.prod(shape) * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return math.prod(shape) * module.in_features
    return 0
