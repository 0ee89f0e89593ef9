"""Static int8 for ExecuTorch: PyTorch's own quantisation (PT2E) in the form that the XNNPACK delegate computes.

XNNPACK's quantiser knows ReLU behind a layer but not the clamp of ReLU6, and would observe the layer before the clamp:
the 256 steps would then span values that the clamp cuts off. It also rounds a padded image anew, which keeps the
padding in float. So the weighted layers are annotated here, the rest by XNNPACK's quantiser; ranges are chosen as for
the other formats.
"""

__all__ = ["export_int8"]

import time
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from pipeline.errors import ExportError
from pipeline.export.executorch import HINT, converter, describe, traceable, write_program
from pipeline.export.input_format import PixelInput
from pipeline.export.layers import is_inside, weighted_layers
from pipeline.export.observe import Observation, Observer
from pipeline.export.pte_files import load_executorch
from pipeline.export.quantize import rounding_notes
from pipeline.export.quiet import quietly
from pipeline.export.ranges import Range, activation_ranges
from pipeline.export.tflite import ExportInfo
from pipeline.export.writing import replacing

aten = torch.ops.aten
_ACTIVATIONS = {aten.hardtanh.default, aten.hardtanh_.default, aten.relu.default, aten.relu_.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_WEIGHTED = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
_LEVELS, _STEPS = 127, 255
# Half of what 32 bits hold: the other half is room for the sum of products.
_LARGEST_BIAS = 2.0**30
# XNNPACK's own floor of 2^-12 would round folded kernels, whose weights are small, with a few levels only.
_LEAST_SCALE = 1e-8
_Calibration = Iterable[npt.NDArray[np.float32]]


def export_int8(
    network: fx.GraphModule,
    example: Tensor,
    path: Path | str,
    calibration: _Calibration,
    *,
    ranges: str = "minmax",
    percentile: float = 99.99,
    per_channel: bool = True,
    float_layers: Iterable[str] = (),
    pixels: PixelInput | None = None,
) -> ExportInfo:
    """Quantises a lowered network and writes it as a `.pte` file; input and output stay as in the float file.

    Args:
        network: A lowered network, after the surgery for int8 (`pipeline.export.int8.operate`).
        example: Its input, shape [N, C, H, W].
        path: Where to write; an existing file is replaced only by a whole one.
        calibration: Normalised images, batches [N, C, H, W] of any N.
        ranges: ``minmax``, ``percentile`` or ``mse`` (`pipeline.export.ranges`).
        percentile: The share of values kept by ``percentile``, in per cent.
        per_channel: One weight scale per output channel; one per tensor otherwise.
        float_layers: Names of layers or units that stay float32.
        pixels: The file takes uint8 pixels and normalises them so.

    Raises:
        ExportError: The `executorch` extra is missing, the calibration images are unfit, a float layer does not exist,
            or the quantiser fails; no file is left.
    """
    target, kept = Path(path), tuple(float_layers)
    started = time.perf_counter()
    _require_layers(network, kept)
    source, image = traceable(network, example, pixels)
    tools = load_executorch("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = _Quantizer(per_channel, kept)
    doing = f"quantise {target.name} to int8"
    with quietly(doing, hint=HINT), torch.no_grad():
        prepared = tools.prepare_pt2e(torch.export.export(source, (image,)).module(check_guards=False), quantizer)
    observer = _observer(prepared, image, pixels)
    _set_ranges(prepared, activation_ranges(observer, calibration, method=ranges, percentile=percentile))
    with replacing(target) as temporary:
        with quietly(doing, hint=HINT), torch.no_grad():
            program = torch.export.export(tools.convert_pt2e(prepared), (image,))
        write_program(program, temporary, doing)
        describe(temporary, network, pixels)
    notes = rounding_notes(ranges, per_channel, kept)
    return ExportInfo.of(target, converter=f"{converter()} PT2E", since=started, notes=notes)


def _require_layers(network: fx.GraphModule, kept: tuple[str, ...]) -> None:
    for name in kept:
        if not any(is_inside(layer, (name,)) for layer in weighted_layers(network)):
            raise ExportError(
                f"no layer of the file is called '{name}' or lies inside it",
                hint="name a layer or a unit of the model, such as blocks.3.2",
            )


class _Quantizer:
    """XNNPACK's quantiser, after the weighted layers have been annotated."""

    def __init__(self, per_channel: bool, float_layers: tuple[str, ...]) -> None:
        module = load_executorch("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
        observers = load_executorch("torchao.quantization.pt2e")
        self._types = load_executorch("torchao.quantization.pt2e.quantizer")
        self._float_layers = float_layers
        weight_observer = observers.PerChannelMinMaxObserver if per_channel else observers.MinMaxObserver
        self._activation = self._types.QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=observers.MinMaxObserver.with_args(eps=_LEAST_SCALE),
        )
        self._weight = self._types.QuantizationSpec(
            dtype=torch.int8,
            quant_min=-_LEVELS,
            quant_max=_LEVELS,
            qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
            ch_axis=0 if per_channel else None,
            observer_or_fake_quant_ctr=weight_observer.with_args(eps=_LEAST_SCALE),
        )
        config = self._types.QuantizationConfig(self._activation, self._activation, self._weight, None)
        self._others = module.XNNPACKQuantizer().set_global(config).set_filter_function(self._is_wanted)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        found: fx.GraphModule = self._others.transform_for_annotation(model)
        return found

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if node.target in _WEIGHTED and self._is_wanted(node):
                self._annotate_weighted(node)
        annotated: fx.GraphModule = self._others.annotate(model)
        return annotated

    def validate(self, model: fx.GraphModule) -> None:
        self._others.validate(model)

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, observers: dict[Any, Any]) -> None:
        self._others.prepare_obs_or_fq_callback(model, observers)

    def _annotate_weighted(self, layer: fx.Node) -> None:
        annotation = self._types.QuantizationAnnotation
        source, weight, *_ = layer.all_input_nodes
        inputs = {weight: self._weight}
        if source.target in _PADS and len(source.users) == 1:
            # Rounded before the padding: XNNPACK then pads integers.
            outside = {source.all_input_nodes[0]: self._activation}
            source.meta["quantization_annotation"] = annotation(input_qspec_map=outside, _annotated=True)
        else:
            inputs[source] = self._activation
        layer.meta["quantization_annotation"] = annotation(input_qspec_map=inputs, _annotated=True)
        last, users = layer, list(layer.users)
        if len(users) == 1 and users[0].target in _ACTIVATIONS:
            last = users[0]
            last.meta["quantization_annotation"] = annotation(_annotated=True)
        last.meta["quantization_annotation"].output_qspec = self._activation

    def _is_wanted(self, node: fx.Node) -> bool:
        return not is_inside(_layer_name(node), self._float_layers)


def _layer_name(node: fx.Node) -> str:
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return str(stack[-1]) if stack else ""


def _observers(prepared: fx.GraphModule) -> dict[str, nn.Module]:
    """The observers of activations, by the name of the first node that runs each."""
    found: dict[int, str] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            module = prepared.get_submodule(str(node.target))
            if getattr(module, "qscheme", None) == torch.per_tensor_affine:
                found.setdefault(id(module), str(node.target))
    return {name: prepared.get_submodule(name) for name in found.values()}


def _observer(prepared: fx.GraphModule, image: Tensor, pixels: PixelInput | None) -> Observer:
    """Opens a prepared graph for watching, as a float file is opened."""
    seen: dict[str, list[npt.NDArray[np.float32]]] = {}
    watched = _observers(prepared)
    for name, module in watched.items():
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: seen[name].append(inputs[0].detach().numpy().reshape(-1))
        )

    def watch(images: npt.NDArray[np.float32]) -> Observation:
        seen.update({name: [] for name in watched})
        batch = images if pixels is None else pixels.from_normalised(images)
        with torch.no_grad():
            prepared(torch.from_numpy(np.ascontiguousarray(batch)))
        return {name: np.concatenate(values) for name, values in seen.items()}

    names = list(watched)
    return Observer(watch, int(image.shape[0]), (names[0], names[-1]))


def _set_ranges(prepared: fx.GraphModule, spans: dict[str, Range]) -> None:
    """Gives every activation its range, and every weight one that leaves room for its bias in 32 bits."""
    for name, module in _observers(prepared).items():
        module.min_val = torch.tensor(spans[name].low)
        module.max_val = torch.tensor(spans[name].high)
    for node in prepared.graph.nodes:
        if node.target in _WEIGHTED and len(node.all_input_nodes) == 3:
            _leave_room(prepared, *node.all_input_nodes)


def _leave_room(prepared: fx.GraphModule, source: fx.Node, weight: fx.Node, bias: fx.Node) -> None:
    """Widens the weight range of dead channels (see `pipeline.export.dead_channels`)."""
    if source.target in _PADS:
        source = source.all_input_nodes[0]
    if source.op != "call_module" or weight.op != "call_module":
        return
    entrance: Any = prepared.get_submodule(str(source.target))
    step = max(float(entrance.max_val - entrance.min_val) / _STEPS, _LEAST_SCALE)
    value: object = reduce(getattr, str(bias.target).split("."), prepared)
    assert isinstance(value, Tensor)
    least = (_LEVELS * value.detach().double().abs() / (step * _LARGEST_BIAS)).float()
    observer: Any = prepared.get_submodule(str(weight.target))
    observer.max_val = torch.maximum(observer.max_val, least if observer.max_val.ndim else least.max())
