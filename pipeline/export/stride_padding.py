"""Symmetric stride-2 padding without a PAD operator.

PyTorch's MobileNetV2 pads a 3x3 stride-2 convolution by one pixel on each side. On an even input TensorFlow's SAME
pads (0, 1) instead, so a converter writes PAD and a convolution without padding. A 4x4 kernel whose last row and
column are zero computes the same, and its SAME padding on an even input is (1, 1): the PAD is gone, for 16/9 of this
one layer's multiplications. XNNPACK fuses the PAD and is faster with it; other delegates may not be, so it is a choice.
"""

__all__ = ["expected_pads", "same_padding", "without_pads"]

import copy

import torch
from torch import Tensor, fx, nn

from pipeline.export.layers import weighted_layers


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after) of one axis, in pixels; the odd pixel goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def expected_pads(network: fx.GraphModule, example: Tensor) -> int:
    """How many PAD operators a TFLite file of a lowered network needs: paddings that are neither SAME nor zero.

    Args:
        network: A lowered network.
        example: An input of shape [N, C, H, W].
    """
    sizes = _input_sizes(network, example)
    return sum(
        not _is_expressible(layer, sizes[name])
        for name, layer in weighted_layers(network).items()
        if isinstance(layer, nn.Conv2d)
    )


def without_pads(network: fx.GraphModule, example: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """Enlarges kernels with zeros where that turns symmetric padding into SAME.

    Args:
        network: A lowered network; it is not changed.
        example: An input of shape [N, C, H, W]; the result is right for its resolution only.

    Returns:
        A copy that computes the same, and the names of the layers that were enlarged.
    """
    result = copy.deepcopy(network)
    sizes = _input_sizes(network, example)
    changed = []
    for name, layer in weighted_layers(result).items():
        if not isinstance(layer, nn.Conv2d) or _is_expressible(layer, sizes[name]):
            continue
        kernel = [_enlarged(layer, sizes[name], axis) for axis in (0, 1)]
        if None in kernel:
            continue
        enlarged = torch.zeros(*layer.weight.shape[:2], *(size for size in kernel if size is not None))
        enlarged[:, :, : layer.kernel_size[0], : layer.kernel_size[1]] = layer.weight.detach()
        layer.weight = nn.Parameter(enlarged)
        layer.kernel_size = (int(enlarged.shape[2]), int(enlarged.shape[3]))
        changed.append(name)
    return result, changed


def _is_expressible(layer: nn.Conv2d, size: tuple[int, int]) -> bool:
    """Whether TFLite's SAME or VALID is this layer's padding."""
    if isinstance(layer.padding, str):
        return True
    if not any(layer.padding):
        return True
    return all(
        same_padding(size[axis], _reach(layer, axis), layer.stride[axis]) == (layer.padding[axis],) * 2
        for axis in (0, 1)
    )


def _reach(layer: nn.Conv2d, axis: int) -> int:
    return layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1


def _enlarged(layer: nn.Conv2d, size: tuple[int, int], axis: int) -> int | None:
    """The smallest kernel with zeros behind whose SAME padding starts with this layer's, or None."""
    kernel, stride, padding = layer.kernel_size[axis], layer.stride[axis], int(layer.padding[axis])
    outputs = (size[axis] + 2 * padding - _reach(layer, axis)) // stride + 1
    if layer.dilation[axis] != 1 or outputs != -(-size[axis] // stride):
        return None
    for wider in range(kernel, kernel + stride + 1):
        # PyTorch pads both sides alike, so a padding that is wider behind cannot be written in the layer.
        if same_padding(size[axis], wider, stride) == (padding, padding):
            return wider
    return None


def _input_sizes(network: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of every convolution's input."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = []
    for name, layer in weighted_layers(network).items():
        if isinstance(layer, nn.Conv2d):

            def see(_module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                sizes[name] = (int(inputs[0].shape[2]), int(inputs[0].shape[3]))

            handles.append(layer.register_forward_pre_hook(see))
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
