"""Lowers a model to the plain network that ships: static shapes, convolutions with biases, no BatchNorm.

Both converters, the quantisation surgery (equalisation, bias correction) and quantisation-aware training start from
this one graph, so that a layer has one name and one set of weights everywhere: the name that the user's model gave it.
"""

__all__ = ["lower"]

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.errors import ExportError
from pipeline.export.tracing import only_output, require_finite, trace

aten = torch.ops.aten
# An export is wrong, not merely rounded, beyond this difference relative to the largest logit.
RELATIVE_TOLERANCE = 1e-4
_RESHAPES = {aten.view.default, aten.reshape.default}


def lower(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Copies a model into a flat `GraphModule` of plain layers.

    Convolutions, linear layers, ReLU and ReLU6 become modules under the dotted names they have in `model`; every
    BatchNorm that follows a convolution or a linear layer is folded into it in float64; padding that depends on the
    input size (TensorFlow's SAME) becomes the constant it is for this size. Other operations stay function calls.

    Args:
        model: Any network with one image input and one output; it is not changed. A network that this function
            returned is only copied.
        example: Input of shape [N, C, H, W], float32; its shape becomes the shape of the file.

    Returns:
        The lowered network, in eval mode, on the CPU.

    Raises:
        ExportError: A weight is not finite, the model has data-dependent shapes or several outputs, or the lowered
            network computes something else.
    """
    require_finite(model)
    if isinstance(model, fx.GraphModule) and model.meta.get("lowered"):
        return copy.deepcopy(model)
    if example.ndim != 4:
        raise ExportError(
            f"the example input has shape {tuple(example.shape)}, expected [N, C, H, W]",
            hint="pass one normalised image with its batch dimension",
        )
    source = copy.deepcopy(model).cpu().float().eval()
    example = example.detach().cpu().float()
    lowered = _Lowering(trace(source, example)).run()
    _require_equal(source, lowered, example)
    return lowered


class _Lowering:
    """One pass over an ATen graph that emits the plain network."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._traced = traced
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._names: set[str] = set()

    def run(self) -> fx.GraphModule:
        handlers: dict[Any, Callable[[fx.Node], fx.Node]] = {
            aten.conv2d.default: self._convolution,
            aten.conv2d.padding: self._convolution,
            aten.linear.default: self._linear,
            aten.batch_norm.default: self._batch_norm,
            aten.hardtanh.default: self._hardtanh,
            aten.hardtanh_.default: self._hardtanh,
            aten.relu6.default: lambda node: self._activation(node, nn.ReLU6()),
            aten.relu.default: lambda node: self._activation(node, nn.ReLU()),
            aten.relu_.default: lambda node: self._activation(node, nn.ReLU()),
            aten.mean.dim: self._mean,
            aten.dropout.default: self._pass_through,
            aten.dropout_.default: self._pass_through,
            aten.contiguous.default: self._pass_through,
        }
        for node in self._traced.graph.nodes:
            if node.op == "output":
                self._graph.output(self._made[only_output(node)])
            elif node.op == "call_function" and node.target in handlers:
                self._made[node] = handlers[node.target](node)
            elif node.op == "get_attr":
                self._made[node] = self._constant(node)
            else:
                self._made[node] = self._functional(node)
            if node.op == "call_function" and _is_in_place(node):
                # Whoever reads the overwritten tensor later reads the result.
                self._made[node.all_input_nodes[0]] = self._made[node]
        lowered = fx.GraphModule(self._root, self._graph)
        lowered.graph.eliminate_dead_code()
        lowered.delete_all_unused_submodules()
        # The layers own copies of their weights; ExecuTorch would write those that nothing reads a second time.
        read = {node.target for node in lowered.graph.nodes if node.op == "get_attr"}
        for name, _ in list(lowered.named_buffers(recurse=False)):
            if name not in read:
                delattr(lowered, name)
        # litert-torch knows constants by their address and copies those that are not contiguous (weights trained in
        # channels-last order): a freed copy's address comes back, and one layer silently gets another's weights.
        for tensor in (*lowered.parameters(), *lowered.buffers()):
            tensor.data = tensor.data.contiguous()
        lowered.recompile()
        lowered.meta["lowered"] = True
        return lowered.eval()

    def _convolution(self, node: fx.Node) -> fx.Node:
        source, weight, bias, stride, padding, dilation, groups = _arguments(
            node, (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        )
        kernel = self._tensor(weight)
        layer = nn.Conv2d(
            kernel.shape[1] * groups,
            kernel.shape[0],
            (int(kernel.shape[2]), int(kernel.shape[3])),
            stride=_pair(stride),
            padding=padding if isinstance(padding, str) else _pair(padding),
            dilation=_pair(dilation),
            groups=groups,
            bias=bias is not None,
        )
        return self._weighted(node, layer, source, kernel, bias)

    def _linear(self, node: fx.Node) -> fx.Node:
        source, weight, bias = _arguments(node, (None, None, None))
        kernel = self._tensor(weight)
        layer = nn.Linear(kernel.shape[1], kernel.shape[0], bias=bias is not None)
        return self._weighted(node, layer, source, kernel, bias)

    def _weighted(
        self, node: fx.Node, layer: nn.Conv2d | nn.Linear, source: fx.Node, kernel: Tensor, bias: fx.Node | None
    ) -> fx.Node:
        layer.weight = nn.Parameter(kernel.clone())
        if bias is not None:
            layer.bias = nn.Parameter(self._tensor(bias).clone())
        return self._module(node, layer, self._made[source])

    def _batch_norm(self, node: fx.Node) -> fx.Node:
        source, *rest = _arguments(node, (None,) * 9)
        weight, bias, mean, variance = (self._maybe_tensor(item) for item in rest[:4])
        epsilon = rest[6]
        if mean is None or variance is None:
            raise ExportError(
                f"BatchNorm '{self._wanted_name(node)}' keeps no running statistics: its output depends on the batch",
                hint="train it with track_running_stats=True, or replace it",
            )
        scale = (variance.double() + epsilon).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double()
        layer = self._layer(self._made[source])
        if isinstance(layer, nn.Conv2d | nn.Linear) and len(source.users) == 1:
            _scale_outputs(layer, scale, shift)
            return self._made[source]
        flat = len(source.meta["val"].shape) < 4
        norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(mean.numel(), eps=epsilon)
        norm.load_state_dict(
            {
                "weight": weight if weight is not None else torch.ones_like(mean),
                "bias": bias if bias is not None else torch.zeros_like(mean),
                "running_mean": mean,
                "running_var": variance,
                "num_batches_tracked": torch.tensor(0),
            }
        )
        return self._module(node, norm, self._made[source])

    def _hardtanh(self, node: fx.Node) -> fx.Node:
        source, low, high = _arguments(node, (None, -1.0, 1.0))
        if (low, high) == (0.0, 6.0):
            return self._activation(node, nn.ReLU6())
        return self._graph.call_function(aten.hardtanh.default, (self._made[source], low, high))

    def _mean(self, node: fx.Node) -> fx.Node:
        source, dimensions, keep = _arguments(node, (None, None, False))[:3]
        if len(source.meta["val"].shape) != 4 or {axis % 4 for axis in dimensions or ()} != {2, 3}:
            return self._functional(node)
        # As a mean over the last axes it costs a transpose in channels-last files; as a pooling it costs none.
        pooled = self._graph.call_function(aten.adaptive_avg_pool2d.default, (self._made[source], [1, 1]))
        return pooled if keep else self._graph.call_function(aten.flatten.using_ints, (pooled, 1))

    def _activation(self, node: fx.Node, layer: nn.Module) -> fx.Node:
        return self._module(node, layer, self._made[node.all_input_nodes[0]])

    def _pass_through(self, node: fx.Node) -> fx.Node:
        return self._made[node.all_input_nodes[0]]

    def _functional(self, node: fx.Node) -> fx.Node:
        copied = self._graph.node_copy(node, lambda old: self._made[old])
        if _is_in_place(node):
            packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
            copied.target = getattr(getattr(aten, packet.removesuffix("_")), overload)
        if node.target in _RESHAPES and _keeps_batch(node):
            # Calibration and training run batches of another size than the file's.
            copied.args = (copied.args[0], [-1, *node.meta["val"].shape[1:]])
        return copied

    def _constant(self, node: fx.Node) -> fx.Node:
        name = "constant_" + str(node.target).replace(".", "_")
        self._root.register_buffer(name, self._tensor(node).clone())
        return self._graph.get_attr(name)

    def _module(self, node: fx.Node, layer: nn.Module, source: fx.Node) -> fx.Node:
        name = self._free_name(node)
        parent, _, leaf = name.rpartition(".")
        if parent:
            holder = self._root
            for part in parent.split("."):
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.add_module(leaf, layer)
        else:
            self._root.add_module(leaf, layer)
        return self._graph.create_node("call_module", name, (source,))

    @staticmethod
    def _wanted_name(node: fx.Node) -> str:
        """The name that the user's model gave the layer."""
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        return stack[-1] if stack and stack[-1] else str(node.name)

    def _free_name(self, node: fx.Node) -> str:
        wanted = self._wanted_name(node)
        name, number = wanted, 1
        # A layer that runs twice is two layers here; a layer inside a layer's name gets a name of its own.
        while name in self._names or any(taken.startswith(f"{name}.") for taken in self._names):
            name, number = f"{wanted}_{number}", number + 1
        self._names.add(name)
        return name

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self._root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _tensor(self, node: fx.Node) -> Tensor:
        if node.op != "get_attr":
            raise ExportError(
                f"the weight of '{node.name}' is computed by the network itself ({node.target})",
                hint="only layers with constant weights can be exported",
            )
        value: object = reduce(getattr, str(node.target).split("."), self._traced)
        assert isinstance(value, Tensor)
        return value.detach()

    def _maybe_tensor(self, node: fx.Node | None) -> Tensor | None:
        return None if node is None else self._tensor(node)


def _is_in_place(node: fx.Node) -> bool:
    name = str(node.target)
    return name.startswith("aten.") and name.split(".")[1].endswith("_")


def _keeps_batch(node: fx.Node) -> bool:
    """Whether the first size of what is reshaped is still the first size afterwards."""
    before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    return len(before) > 0 and len(after) > 0 and before[0] == after[0]


def _arguments(node: fx.Node, defaults: tuple[Any, ...]) -> list[Any]:
    return [*node.args, *defaults[len(node.args) :]]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _scale_outputs(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Composes a layer with the per-channel map y -> scale·y + shift, in float64."""
    weight = layer.weight.detach().double()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter((weight * shaped).float())
    layer.bias = nn.Parameter((bias * scale + shift).float())


def _require_equal(source: nn.Module, lowered: fx.GraphModule, example: Tensor) -> None:
    probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source(probe), lowered(probe)
    if not isinstance(expected, Tensor):
        raise ExportError(
            f"the model returns a {type(expected).__name__}, expected a tensor of logits",
            hint="wrap the model so that it returns the logits alone",
        )
    error = float((expected - found).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not error <= RELATIVE_TOLERANCE * scale:
        raise ExportError(
            f"lowering changed the model's output by {error:.3g} (largest logit {scale:.3g})",
            hint="report the model: one of its operations is lowered wrongly",
        )
