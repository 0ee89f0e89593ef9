"""A model as a graph of layers: copied, put in evaluation mode, its fused modules taken apart."""

from __future__ import annotations

import copy
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError as FxTraceError

from pipeline.errors import TraceError

__all__ = ["is_activation", "module_path", "shape_of", "trace"]

_NOT_POINTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
_TORCH = Path(torch.__file__).parent
_TRACING_FAILURES = (
    FxTraceError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is a pointwise non-linearity: torch's, timm's, or one blended by an α (`pipeline.alpha`)."""
    if isinstance(module, _NOT_POINTWISE):
        return False
    home = type(module).__module__
    known = home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")
    return known or type(module).__name__ == "AlphaActivation"


class _LayerTracer(fx.Tracer):
    """Stops at layers: torch's own modules, every activation, convolution and norm, and ring padding.

    Args:
        opaque: Dotted names of modules to stop at as well.
    """

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See torch.fx.Tracer; remembers the innermost module whose forward failed."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except _TRACING_FAILURES:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See torch.fx.Tracer."""
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        if isinstance(m, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm) or hasattr(m, "ring_exact"):
            return True
        if module_qualified_name in self.opaque:
            return True
        return is_activation(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example_input: Tensor | None = None) -> fx.GraphModule:
    """Traces a copy of `model` in evaluation mode.

    A BatchNorm that carries its activation (timm's BatchNormAct2d) becomes `<name>.bn` and `<name>.act`. A small
    module that cannot be traced is left whole, and `meta["opaque"]` of the result maps its name to the reason.

    Args:
        model: Any traceable module; not changed.
        example_input: Tensor[N, C, H, W] (or what the model takes) of the model's dtype; when given, every node
            of the graph knows its shape.

    Raises:
        TraceError: The model's control flow depends on its input, outside any module that holds less than half
            of its layers, or the model fails on the example; the message names the line.
    """
    root = _taken_apart(copy.deepcopy(model).eval())
    opaque: dict[str, str] = {}
    while True:
        tracer = _LayerTracer(opaque)
        try:
            graph = tracer.trace(root)
            break
        except _TRACING_FAILURES as error:
            reason = f"{_summary(error)} at {_line_of(error)}"
            if tracer.failed is None or tracer.failed in opaque or _is_most(root, tracer.failed):
                raise TraceError(
                    f"{type(model).__name__} cannot be traced: {reason}",
                    hint="make that line independent of the input's values, or wrap it in a small module of its own",
                ) from error
            opaque[tracer.failed] = reason
    graph._tracer_cls = None  # else a pickled model would ask for the tracer when it is loaded
    traced = fx.GraphModule(root, graph, type(model).__name__).eval()
    traced.meta["opaque"] = opaque
    traced.graph.eliminate_dead_code()
    traced.recompile()
    if example_input is not None:
        shapes = _Shapes(traced)
        try:
            with torch.no_grad():
                shapes.run(example_input)
        except _TRACING_FAILURES as error:
            kind = f"shape {tuple(example_input.shape)} and {example_input.dtype}"
            where = f" in {shapes.at}" if shapes.at else ""
            raise TraceError(
                f"{type(model).__name__} fails on an example of {kind}{where}: {_summary(error)}",
                hint="pass an example input of the size and dtype that the model takes",
            ) from error
    return traced


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every value. (torch's own ShapeProp prints a traceback where that fails.)

    Args:
        traced: The graph.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.at = ""

    def run_node(self, n: fx.Node) -> Any:
        """See torch.fx.Interpreter; remembers the layer that runs."""
        self.at = module_path(n)
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value on the example input, or None where it is no tensor or no example was given."""
    return cast(tuple[int, ...] | None, node.meta.get("shape"))


def module_path(node: fx.Node) -> str:
    """Dotted name of the module in which a node was recorded; of the layer itself for a module call."""
    if node.op == "call_module":
        return str(node.target)
    stack = cast(dict[str, Any] | None, node.meta.get("nn_module_stack"))
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return path if isinstance(path, str) else ""


def _taken_apart(model: nn.Module) -> nn.Module:
    """Splits norms that carry their activation, and activations registered under several names, in place."""
    places: dict[int, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        # Without parameters there is nothing that two places share: each name is a layer of its own.
        own = is_activation(module) and not any(True for _ in module.parameters())
        if own and places.setdefault(id(module), name) != name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.copy(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and isinstance(getattr(module, "act", None), nn.Module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _norm_then_act(module))
    return model


def _norm_then_act(fused: nn.BatchNorm2d) -> nn.Sequential:
    norm = nn.BatchNorm2d(
        fused.num_features, fused.eps, fused.momentum, fused.affine, fused.track_running_stats, device="meta"
    )
    norm._parameters = fused._parameters
    norm._buffers = fused._buffers
    parts = OrderedDict[str, nn.Module](bn=norm)
    if isinstance(drop := getattr(fused, "drop", None), nn.Module):
        parts["drop"] = drop
    parts["act"] = cast(nn.Module, fused.act)
    return nn.Sequential(parts).eval()


def _is_most(root: nn.Module, name: str) -> bool:
    """Whether a module holds half of the model's weighted layers or more."""
    inside, total = (
        sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())
        for module in (root.get_submodule(name), root)
    )
    return 2 * inside >= total


def _summary(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _line_of(error: BaseException) -> str:
    """File and line of the innermost frame that is not torch's own and not this module's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not Path(frame.filename).is_relative_to(_TORCH) and Path(frame.filename) != Path(__file__)
    ]
    if not own:
        return "an unknown line"
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({(own[-1].line or '').strip()})"
