"""The convolutions that a folded model is made of, as ordinary modules.

A folded layer is a plain `torch.nn.Conv2d` wherever its padding is symmetric. The two classes here cover the rest;
both are `Conv2d`s, hold nothing but tensors and frozen dataclasses, and so can be copied, pickled and exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis

__all__ = ["BorderConv2d", "PaddedConv2d", "as_linear", "as_module"]


class PaddedConv2d(nn.Conv2d):
    """A convolution with any padding: asymmetric, or TensorFlow's SAME rule evaluated on the input at hand.

    Under a static-shape export the padding is a constant, which TFLite merges into its SAME convolution.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        rows: Kernel, stride, dilation and padding along the height.
        cols: The same along the width.
        groups: Blocks of the kernel.
        bias: Whether there is a bias.
        dtype: Of weight and bias.
        device: Of weight and bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rows: Axis,
        cols: Axis,
        *,
        groups: int = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (rows.kernel, cols.kernel),
            (rows.stride, cols.stride),
            0,
            (rows.dilation, cols.dilation),
            groups,
            bias,
            dtype=dtype,
            device=device,
        )
        self.rows = rows
        self.cols = cols

    def pads(self, x: Tensor) -> tuple[int, int, int, int]:
        """Zeros around Tensor[N, C, H, W]: (left, right, top, bottom)."""
        return (*self.cols.pads(x.shape[3]), *self.rows.pads(x.shape[2]))

    def _slide(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        left, right, top, bottom = self.pads(x)
        if left == right and top == bottom and top >= 0 and left >= 0:
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, self.stride, 0, self.dilation, groups)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves Tensor[N, in, H, W]."""
        return self._slide(input, self.weight, self.bias, self.groups)

    def extra_repr(self) -> str:
        """Shows the padding rule."""
        sides = [
            "same" if axis.same_rule and not axis.is_fixed else f"{axis.pads(1)}" if axis.is_fixed else "by input size"
            for axis in (self.rows, self.cols)
        ]
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, pads={' × '.join(sides)}"


class BorderConv2d(PaddedConv2d):
    """A convolution with a bias map: the repair that makes a fold exact at the border.

    y = W∗x + b + inner∗1, where 1 is one inside the image and, like x, padded with zeros. Away from the border the
    last term is a constant. It does not depend on x, so in evaluation it is kept for one input size and costs one
    addition of a constant [1, out, H', W']; other sizes compute it on the fly.

    Args:
        in_channels: See PaddedConv2d.
        out_channels: See PaddedConv2d.
        rows: See PaddedConv2d.
        cols: See PaddedConv2d.
        groups: See PaddedConv2d.
        size: Height and width of the input for which the map is kept.
        dtype: See PaddedConv2d.
        device: See PaddedConv2d.
    """

    border: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rows: Axis,
        cols: Axis,
        *,
        groups: int,
        size: tuple[int, int],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, rows, cols, groups=groups, dtype=dtype, device=device)
        self.inner = nn.Parameter(torch.zeros(out_channels, 1, rows.kernel, cols.kernel, dtype=dtype, device=device))
        self.size = size
        self.register_buffer("border", self._border(*size).detach(), persistent=False)

    def _border(self, height: int, width: int) -> Tensor:
        return self._slide(self.inner.new_ones(1, 1, height, width), self.inner, None, 1)

    def refresh(self) -> None:
        """Computes the kept map anew from the weights."""
        self.border = self._border(*self.size).detach()

    def train(self, mode: bool = True) -> BorderConv2d:
        """Sets the mode; going to evaluation refreshes the kept map."""
        if self.training and not mode:
            self.refresh()
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self.refresh()

    def forward(self, input: Tensor) -> Tensor:
        """Convolves Tensor[N, in, H, W] and adds the bias map."""
        kept = not self.training and (input.shape[2], input.shape[3]) == self.size
        border = self.border if kept else self._border(input.shape[2], input.shape[3])
        return super().forward(input) + border


def as_module(
    conv: AffineConv,
    *,
    dtype: torch.dtype,
    device: torch.device,
    bias_map_for: tuple[int, int] | None = None,
) -> nn.Conv2d:
    """The simplest convolution module that computes `conv`.

    Args:
        conv: The affine convolution.
        dtype: Of the module's weights.
        device: Of the module's weights.
        bias_map_for: Input (height, width) for which to keep the bias map of an exact border; None leaves the
            map out, as plain composition does.
    """
    spec, keywords = conv.spec, {"dtype": dtype, "device": device}
    rows, cols = spec.rows, spec.cols
    module: nn.Conv2d
    bias = conv.total_bias
    if bias_map_for is not None and conv.inner is not None:
        bordered = BorderConv2d(
            spec.in_channels,
            spec.out_channels,
            rows,
            cols,
            groups=spec.groups,
            size=bias_map_for,
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            bordered.inner.copy_(conv.inner[:, None])
        module, bias = bordered, conv.bias
        bordered.refresh()
    elif all(axis.is_fixed and axis.pads(1)[0] == axis.pads(1)[1] for axis in (rows, cols)):
        padding = (rows.pads(1)[0], cols.pads(1)[0])
        dilation = (rows.dilation, cols.dilation)
        module = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel,
            spec.stride,
            padding,
            dilation,
            spec.groups,
            **cast(dict[str, Any], keywords),
        )
    else:
        module = PaddedConv2d(
            spec.in_channels,
            spec.out_channels,
            rows,
            cols,
            groups=spec.groups,
            **cast(dict[str, Any], keywords),
        )
    with torch.no_grad():
        module.weight.copy_(conv.weight)
        cast(Tensor, module.bias).copy_(bias)
    return module.eval()


def as_linear(conv: AffineConv, *, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A fully connected layer that computes a 1×1 `conv` on the last dimension."""
    module = nn.Linear(conv.spec.in_channels, conv.spec.out_channels, dtype=dtype, device=device)
    dense = AffineConv.add([conv, _dense_zero(conv)])
    with torch.no_grad():
        module.weight.copy_(dense.weight[:, :, 0, 0])
        module.bias.copy_(conv.total_bias)
    return module.eval()


def _dense_zero(conv: AffineConv) -> AffineConv:
    """A zero kernel in one block: added to a grouped kernel it writes that one in full."""
    weight = torch.zeros(conv.spec.out_channels, conv.spec.in_channels, 1, 1)
    return AffineConv.conv(weight, None, conv.spec.rows, conv.spec.cols)
