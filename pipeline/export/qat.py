"""Quantisation-aware training after the fold: fine-tunes a lowered network with int8 rounding in the forward pass.

Rounding and clipping are simulated where an int8 file has them (every weight per output channel, every activation once,
after its fused ReLU6), with torchao's fake-quantise modules and straight-through gradients (Jacob et al., "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). What comes out is a float
network whose weights round well; it is exported and quantised like any other.
"""

__all__ = ["distil", "finish", "freeze_ranges", "prepare"]

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from pipeline.errors import TrainingError
from pipeline.export.extras import require
from pipeline.export.layers import is_inside, weighted_layers
from pipeline.export.quiet import quietly

_MARK = "rounding_"
# Operations that hand on the numbers they were given, so that their output needs no rounding of its own.
_PASSING = ("flatten", "view", "reshape", "pad", "permute", "contiguous", "to.dtype")


class _Rounding(nn.Module):
    """A fake-quantise module; one for activations learns its range in training mode only."""

    def __init__(self, fake: Any, *, weights: bool) -> None:
        super().__init__()
        self.fake = fake
        self.weights = weights
        self.frozen = False

    def forward(self, values: Tensor) -> Tensor:
        observing = self.weights or (self.training and not self.frozen)
        (self.fake.enable_observer if observing else self.fake.disable_observer)()
        rounded: Tensor = self.fake(values)
        return rounded


def prepare(network: fx.GraphModule, *, per_channel: bool = True, float_layers: Iterable[str] = ()) -> fx.GraphModule:
    """Inserts the rounding of int8 into a lowered network.

    Args:
        network: A lowered network; it is not changed.
        per_channel: One weight scale per output channel; one per tensor otherwise.
        float_layers: Names of layers or units whose weights will stay float32 and are not rounded.

    Returns:
        A trainable copy. In training mode activation ranges follow a moving average; in eval mode they stay. Show it
        one batch in training mode before evaluating it.

    Raises:
        ExportError: The `tflite` extra, which brings torchao, is not installed.
    """
    prepared = copy.deepcopy(network)
    prepared.meta.pop("lowered", None)
    kept = tuple(float_layers)
    for name, layer in weighted_layers(prepared).items():
        if not is_inside(name, kept):
            rounding = _Rounding(_weight_rounding(per_channel), weights=True)
            parametrize.register_parametrization(layer, "weight", rounding)
    for number, node in enumerate(_rounded_nodes(prepared)):
        name = f"{_MARK}{number}"
        prepared.add_submodule(name, _Rounding(_activation_rounding(), weights=False))
        with prepared.graph.inserting_after(node):
            rounded = prepared.graph.call_module(name, (node,))
        node.replace_all_uses_with(rounded)
        rounded.args = (node,)
    prepared.recompile()
    return prepared


def freeze_ranges(prepared: nn.Module) -> None:
    """Stops the ranges from moving, so that the last steps train against the rounding that will ship."""
    for module in prepared.modules():
        if isinstance(module, _Rounding):
            module.frozen = True


def finish(prepared: fx.GraphModule) -> fx.GraphModule:
    """The float network with the trained weights: lowered, in eval mode, without any rounding.

    Args:
        prepared: What `prepare` returned, trained; it is not changed.
    """
    result = copy.deepcopy(prepared).cpu()
    for layer in weighted_layers(result).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    for node in list(result.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(_MARK):
            node.replace_all_uses_with(node.all_input_nodes[0])
            result.graph.erase_node(node)
    result.delete_all_unused_submodules()
    result.recompile()
    result.meta["lowered"] = True
    return result.eval().requires_grad_(False)


def distil(
    prepared: fx.GraphModule,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    frozen_share: float = 0.25,
    on_step: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Trains a prepared network towards a float teacher's logits; needs images, but no labels.

    Args:
        prepared: What `prepare` returned; trained in place.
        teacher: The float network, most often the one that was prepared.
        batches: Normalised images [N, C, H, W]; at least `steps` batches.
        steps: Optimiser steps.
        learning_rate: Of Adam at the start; it falls to zero along a cosine.
        frozen_share: The share of steps, at the end, with frozen ranges.
        on_step: Told (steps done, steps in all).

    Returns:
        The loss of every step: the Kullback-Leibler divergence from the teacher's class probabilities.

    Raises:
        TrainingError: The batches run out, or the loss is not finite.
    """
    weights = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    teacher.eval()
    prepared.train()
    losses: list[float] = []
    for step, images in zip(range(steps), batches, strict=False):
        if step == math.floor(steps * (1 - frozen_share)):
            freeze_ranges(prepared)
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(images), dim=1)
        found = functional.log_softmax(prepared(images), dim=1)
        loss = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(f"the loss is {float(loss.detach())} at step {step}", hint="lower the learning rate")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, steps)
    prepared.eval()
    if len(losses) < steps:
        raise TrainingError(f"the images ran out after {len(losses)} of {steps} steps", hint="repeat the images")
    return losses


def _rounded_nodes(network: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose output an int8 file stores as integers."""
    rounded = []
    for node in network.graph.nodes:
        following = list(node.users)
        fused = len(following) == 1 and _is_activation(network, following[0]) and node.op == "call_module"
        passing = node.op == "call_function" and any(name in str(node.target) for name in _PASSING)
        if node.op in {"placeholder", "call_module", "call_function"} and not fused and not passing:
            rounded.append(node)
    return rounded


def _is_activation(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), nn.ReLU | nn.ReLU6)


def _torchao() -> tuple[Any, Any]:
    with quietly("import torchao"):
        return (
            require("torchao.quantization.pt2e.fake_quantize", extra="tflite"),
            require("torchao.quantization.pt2e.observer", extra="tflite"),
        )


def _weight_rounding(per_channel: bool) -> Any:
    fake, observers = _torchao()
    kinds: dict[str, Any] = (
        {
            "observer": observers.MovingAveragePerChannelMinMaxObserver,
            "qscheme": torch.per_channel_symmetric,
            "ch_axis": 0,
        }
        if per_channel
        else {"observer": observers.MovingAverageMinMaxObserver, "qscheme": torch.per_tensor_symmetric}
    )
    # A weight's range is known, not estimated: the average forgets at once. The observers' usual floor of 2^-12 under
    # the scale would be coarse for the small weights of folded BatchNorms.
    return fake.FakeQuantize(
        dtype=torch.int8, quant_min=-127, quant_max=127, averaging_constant=1.0, eps=1e-10, **kinds
    )


def _activation_rounding() -> Any:
    fake, observers = _torchao()
    return fake.FakeQuantize(
        observer=observers.MovingAverageMinMaxObserver,
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        averaging_constant=0.05,
        eps=1e-10,
    )
