"""What single modules compute, as affine convolutions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis
from pipeline.folding.modules import BorderConv2d, PaddedConv2d
from pipeline.folding.trace import is_activation

__all__ = ["average_of", "conv_of"]

_IDLE_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
    if isinstance(module, nn.ConstantPad2d) and module.value == 0 and min(module.padding) >= 0:
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
    if type(module) is not nn.AvgPool2d:
        return None
    return average_of(
        channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


def average_of(
    channels: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> AffineConv | None:
    """Average pooling with the arguments of `torch.nn.functional.avg_pool2d`.

    Returns:
        The convolution where the divisor is the same at every pixel; None where pooling skips the padding or the rim.
    """
    kernel, steps, pads = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    if ceil_mode or divisor_override is not None or (pads != (0, 0) and not count_include_pad):
        return None
    rows, cols = (Axis.fixed(kernel[axis], stride=steps[axis], low=pads[axis], high=pads[axis]) for axis in (0, 1))
    return AffineConv.average(channels, rows, cols)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[1]) if len(value) > 1 else (value[0], value[0])
