"""Affine convolutions in float64: compose, add, and read from modules.

An affine convolution maps x to W∗x + b, plus, near the border, what a bias map repairs (see `AffineConv.inner`).
BatchNorm in evaluation is a 1×1 diagonal one, average pooling a depthwise one, the identity a Dirac kernel; so any
linear region with one entry and one exit is one affine convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import FoldError
from pipeline.folding.geometry import Axis
from pipeline.folding.spec import ConvSpec

__all__ = ["AffineConv"]


@dataclass(frozen=True)
class AffineConv:
    """x ↦ W∗x + b on maps Tensor[N, C, H, W], all in float64.

    Args:
        weight: Tensor[out, in / groups, kernel rows, kernel cols].
        bias: Tensor[out].
        spec: Channels, groups, geometry, and what is known about the border.
        inner: Tensor[out, kernel rows, kernel cols] or None: weights of an extra input channel that holds one
            inside the image and, being padded with zeros, zero outside. It carries a bias that comes *before* a
            padded window. Its sum over the taps is the bias that it amounts to away from the border.
    """

    weight: Tensor
    bias: Tensor
    spec: ConvSpec
    inner: Tensor | None = None

    @classmethod
    def conv(cls, weight: Tensor, bias: Tensor | None, rows: Axis, cols: Axis, *, groups: int = 1) -> AffineConv:
        """A convolution as `torch.nn.functional.conv2d` takes it, with any padding.

        Args:
            weight: Tensor[out, in / groups, kernel rows, kernel cols] of any floating dtype.
            bias: Tensor[out], or None for zeros.
            rows: Geometry along the height.
            cols: Geometry along the width.
            groups: Blocks of the kernel.
        """
        weight = weight.detach().to("cpu", torch.float64)
        shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().to("cpu", torch.float64)
        constant = bool(shift.any())
        spec = ConvSpec(weight.shape[1] * groups, weight.shape[0], groups, rows, cols, constant=constant)
        return cls(weight, shift, spec)

    @classmethod
    def diagonal(cls, scale: Tensor, shift: Tensor | None = None) -> AffineConv:
        """y_c = scale_c·x_c + shift_c, both Tensor[channels]."""
        point = Axis.fixed(1)
        return cls.conv(scale.reshape(-1, 1, 1, 1), shift, point, point, groups=scale.numel())

    @classmethod
    def identity(cls, channels: int) -> AffineConv:
        """The Dirac kernel on `channels` channels."""
        return cls.diagonal(torch.ones(channels, dtype=torch.float64))

    @classmethod
    def average(cls, channels: int, rows: Axis, cols: Axis) -> AffineConv:
        """Average pooling whose divisor counts the padding."""
        taps = rows.kernel * cols.kernel
        weight = torch.full((channels, 1, rows.kernel, cols.kernel), 1.0 / taps, dtype=torch.float64)
        return cls.conv(weight, None, rows, cols, groups=channels)

    @classmethod
    def pad(cls, channels: int, rows: tuple[int, int], cols: tuple[int, int]) -> AffineConv:
        """Zero padding of (before, after) pixels."""
        weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
        row, col = (Axis.fixed(1, low=low, high=high) for low, high in (rows, cols))
        return cls.conv(weight, None, row, col, groups=channels)

    @classmethod
    def from_module(cls, module: nn.Module, channels: int | None = None) -> AffineConv:
        """What a layer computes in evaluation.

        Args:
            module: Conv2d (timm's SAME convolutions too), Linear, BatchNorm, Identity, AvgPool2d, zero padding,
                dropout.
            channels: Channels that enter; needed where the module does not say.

        Raises:
            FoldError: The layer is not affine, or does not say how many channels it takes.
        """
        from pipeline.folding.reading import conv_of  # which is built on this class

        told = (getattr(module, name, None) for name in ("in_channels", "num_features", "in_features"))
        channels = channels or next((count for count in told if isinstance(count, int)), None)
        if channels is None:
            raise FoldError(f"{type(module).__name__} does not say how many channels it takes", hint="give channels=…")
        conv = conv_of(module, channels)
        if conv is None:
            raise FoldError(f"{type(module).__name__} is no affine convolution")
        return conv

    @staticmethod
    def compose(*layers: AffineConv) -> AffineConv:
        """The layers one after the other, the first one first; see `then`.

        Raises:
            FoldError: There is none, or channel counts do not meet.
        """
        if not layers:
            raise FoldError("nothing to compose", hint="AffineConv.identity(channels) changes nothing")
        return reduce(AffineConv.then, layers)

    @property
    def total_bias(self) -> Tensor:
        """The constant away from the border, Tensor[out]."""
        return self.bias if self.inner is None else self.bias + self.inner.sum(dim=(1, 2))

    def scaled(self, factor: float) -> AffineConv:
        """`factor` times this map."""
        inner = None if self.inner is None else self.inner * factor
        return replace(self, weight=self.weight * factor, bias=self.bias * factor, inner=inner)

    def ringed(self) -> AffineConv:
        """The same convolution where the layer before it supplies the values around the border."""
        return replace(self, spec=replace(self.spec, ring=True))

    def then(self, after: AffineConv) -> AffineConv:
        """This map followed by `after`; equal to the two away from the border.

        W[o,i,u] = Σ_{m,v} W₂[o,m,v]·W₁[m,i,u−s₁v] and B = b₂ + Σ_{m,v} W₂[o,m,v]·b₁[m]. Where `after` is padded
        the second sum is kept apart in `inner`, since outside the image there is no b₁.

        Raises:
            FoldError: The channel counts do not meet.
        """
        spec = self.spec.then(after.spec)
        weight = _kernel_product(self, after, self.weight, self.spec.groups)
        bias, inner = after.bias, None
        keep_apart = after.spec.is_padded and not after.spec.ring and self.spec.is_pointwise
        if keep_apart:
            if self.spec.constant:
                inner = _kernel_product(self, after, self.bias.reshape(-1, 1, 1, 1), 1)[:, 0]
            if after.inner is not None:
                inner = after.inner if inner is None else inner + after.inner
            return AffineConv(weight, bias, spec, inner)
        if after.inner is not None:
            bias = after.total_bias
        if self.inner is not None:
            inner = _kernel_product(self, after, self.inner[:, None], 1)[:, 0]
        if self.spec.constant:
            bias = bias + _tap_sum(after, self.bias)
        return AffineConv(weight, bias, spec, inner)

    @staticmethod
    def add(branches: list[AffineConv]) -> AffineConv:
        """The sum of parallel branches on one input.

        Raises:
            FoldError: Strides, channels or alignment of the branches differ.
        """
        spec = ConvSpec.union([branch.spec for branch in branches])
        row_places = Axis.union([branch.spec.rows for branch in branches])[1]
        col_places = Axis.union([branch.spec.cols for branch in branches])[1]
        out, taps = spec.out_channels, (spec.rows.kernel, spec.cols.kernel)
        weight = torch.zeros(out, spec.in_channels // spec.groups, *taps, dtype=torch.float64)
        bias = torch.zeros(out, dtype=torch.float64)
        inner = torch.zeros(out, *taps, dtype=torch.float64)
        for branch, (row, row_step), (col, col_step) in zip(branches, row_places, col_places, strict=True):
            rows = slice(row, row + (branch.spec.rows.kernel - 1) * row_step + 1, row_step)
            cols = slice(col, col + (branch.spec.cols.kernel - 1) * col_step + 1, col_step)
            weight[:, :, rows, cols] += _regroup(branch.weight, branch.spec.groups, spec.groups)
            bias += branch.bias
            if branch.inner is not None:
                inner[:, rows, cols] += branch.inner
        return AffineConv(weight, bias, spec, inner if any(b.inner is not None for b in branches) else None)

    def __call__(self, x: Tensor, *, border: bool = True) -> Tensor:
        """Evaluates the map on Tensor[N, in, H, W] float64; `border=False` leaves the bias map's repair out."""
        spec = self.spec
        padding = (*spec.cols.pads(x.shape[3]), *spec.rows.pads(x.shape[2]))
        dilation = (spec.rows.dilation, spec.cols.dilation)
        if self.inner is None or not border:
            return F.conv2d(F.pad(x, padding), self.weight, self.total_bias, spec.stride, 0, dilation, spec.groups)
        out = F.conv2d(F.pad(x, padding), self.weight, self.bias, spec.stride, 0, dilation, spec.groups)
        inside = F.pad(torch.ones_like(x[:1, :1]), padding)
        return out + F.conv2d(inside, self.inner[:, None], None, spec.stride, 0, dilation)


def _regroup(weight: Tensor, groups: int, coarser: int) -> Tensor:
    """Rewrites a kernel of `groups` blocks as one of `coarser` blocks (a divisor), zeros between the blocks."""
    if groups == coarser:
        return weight
    out, block_in = weight.shape[:2]
    ratio = groups // coarser
    wide = weight.new_zeros(coarser, ratio, out // groups, ratio, block_in, *weight.shape[2:])
    blocks = weight.reshape(coarser, ratio, out // groups, block_in, *weight.shape[2:])
    for index in range(ratio):
        wide[:, index, :, index] = blocks[:, index]
    return wide.reshape(out, ratio * block_in, *weight.shape[2:])


def _kernel_product(before: AffineConv, after: AffineConv, weight: Tensor, groups: int) -> Tensor:
    """Kernel of `weight` (on `before`'s geometry, `groups` blocks) followed by `after`'s kernel.

    One batched matrix product per tap of the second kernel. Only the kernel with the fewer blocks is widened, so
    no product with a block of zeros is formed in chains such as 1×1∘depthwise∘1×1.
    """
    second, second_groups = after.weight, after.spec.groups
    common = gcd(groups, second_groups)
    out, middle = second.shape[0], weight.shape[0]
    taps = weight.shape[2:]
    if groups >= second_groups:
        # [block, outputs, middle] for each fine block of the first kernel inside each common block.
        wide = _regroup(second, second_groups, common)
        fine = groups // common
        left = wide.reshape(common, out // common, fine, middle // groups, *second.shape[2:]).transpose(1, 2)
        right = weight.reshape(common, fine, middle // groups, -1)
    else:
        left = second.reshape(second_groups, 1, out // second_groups, middle // second_groups, *second.shape[2:])
        right = _regroup(weight, groups, common).reshape(second_groups, 1, middle // second_groups, -1)
    blocks, fine, outputs, inner = left.shape[:4]
    row_first, row_second, _ = before.spec.rows.spreads(after.spec.rows)
    col_first, col_second, _ = before.spec.cols.spreads(after.spec.cols)
    rows = (taps[0] - 1) * row_first + (second.shape[2] - 1) * row_second + 1
    cols = (taps[1] - 1) * col_first + (second.shape[3] - 1) * col_second + 1
    total = weight.new_zeros(blocks, fine, outputs, right.shape[3] // taps.numel(), rows, cols)
    for row in range(second.shape[2]):
        for col in range(second.shape[3]):
            tap = left[..., row, col]
            product = tap * right if inner == 1 else tap @ right
            top, side = row * row_second, col * col_second
            down, across = (taps[0] - 1) * row_first + 1, (taps[1] - 1) * col_first + 1
            window = total[..., top : top + down : row_first, side : side + across : col_first]
            window += product.reshape(*window.shape)
    return total.transpose(1, 2).reshape(out, -1, rows, cols)


def _tap_sum(after: AffineConv, constant: Tensor) -> Tensor:
    """Σ_{m,v} W₂[o,m,v]·constant[m], Tensor[out]."""
    groups = after.spec.groups
    summed = after.weight.sum(dim=(2, 3)).reshape(groups, -1, after.weight.shape[1])
    return (summed @ constant.reshape(groups, -1, 1)).reshape(-1)
