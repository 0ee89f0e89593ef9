"""What a ring of one constant a channel adds to a zero-padded convolution, computed once for the whole batch.

By linearity conv(pad_ring(x)) = conv(pad_0(x)) + conv_without_bias(ring alone). The second term is the same for
every image, vanishes inside, and repeats along each side: the ring around a stand-in of a few pixels tells it all.
"""

__all__ = ["Frame"]

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class _Axis:
    """How one axis of the real result follows from the stand-in's.

    Attributes:
        small: Input pixels of the stand-in.
        small_out: Pixels of its result.
        size: Pixels of the real result.
        first: Leading pixels of either result that see the ring; all of them where the map is its own stand-in.
        last: Trailing ones.
    """

    small: int
    small_out: int
    size: int
    first: int
    last: int

    @staticmethod
    def of(size: int, before: int, after: int, reach: int, stride: int) -> "_Axis":
        """Of an axis of `size` pixels padded by `before` and `after`, under a kernel of reach + 1 pixels."""

        def out(pixels: int) -> int:
            return (pixels + before + after - reach - 1) // stride + 1

        def touching_end(pixels: int) -> int:
            begin = max(-(-(pixels - reach + before) // stride), 0)
            return max(out(pixels) - begin, 0)

        first = -(-before // stride)
        # Equal to the real size modulo the stride, so that both ends meet the kernel at the same phase, and
        # large enough for one pixel of the result that sees neither end.
        small = size % stride + stride
        while small < size and out(small) <= first + touching_end(small):
            small += stride
        if small >= size:
            return _Axis(size, out(size), out(size), out(size), 0)
        return _Axis(small, out(small), out(size), first, touching_end(small))

    def source(self, device: torch.device) -> Tensor:
        """For each pixel of the real result, the stand-in's pixel of equal value."""
        index = torch.arange(self.size, device=device)
        index[self.first : self.size - self.last] = self.first
        if self.last:
            index[-self.last :] -= self.size - self.small_out
        return index


class Frame:
    """The geometry of a ring around maps of one size, under one convolution.

    Args:
        conv: The convolution.
        height: Of its input.
        width: Of its input.
        pads: Ring widths (left, right, top, bottom).
        device: Of its input.
    """

    def __init__(
        self, conv: nn.Conv2d, height: int, width: int, pads: tuple[int, int, int, int], device: torch.device
    ) -> None:
        left, right, top, bottom = pads
        reach = [conv.dilation[axis] * (conv.kernel_size[axis] - 1) for axis in (0, 1)]
        self.rows = _Axis.of(height, top, bottom, reach[0], conv.stride[0])
        self.cols = _Axis.of(width, left, right, reach[1], conv.stride[1])
        self.row_source, self.col_source = self.rows.source(device), self.cols.source(device)
        self.mask = F.pad(torch.zeros(1, 1, self.rows.small, self.cols.small, device=device), pads, value=1.0)

    def add(self, out: Tensor, conv: nn.Conv2d, constant: Tensor) -> Tensor:
        """Adds the ring's share to the zero-padded result.

        Args:
            out: What `conv` made of the zero-padded batch, Tensor[N, C_out, H', W']; overwritten.
            conv: The convolution.
            constant: The ring's value, Tensor[C_in].
        """
        ring = self.mask.to(out.dtype) * constant.to(out.dtype).reshape(1, -1, 1, 1)
        small = F.conv2d(ring, conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)
        if torch.compiler.is_compiling():  # a compiler fuses the sum; in-place functions it cannot follow
            return out + small.index_select(2, self.row_source).index_select(3, self.col_source)
        return cast(Tensor, _AddFrame.apply(out, small.to(out.dtype), self))  # type: ignore[no-untyped-call]


class _AddFrame(torch.autograd.Function):
    """Adds a stand-in's border to the border of a batch, in place and both ways touching the border only."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, small: Tensor, frame: Frame) -> Tensor:
        ctx.frame, ctx.small_shape = frame, small.shape
        ctx.mark_dirty(out)
        rows, cols = frame.rows, frame.cols
        out[:, :, : rows.first] += small[:, :, : rows.first].index_select(3, frame.col_source)
        if rows.last:
            out[:, :, -rows.last :] += small[:, :, -rows.last :].index_select(3, frame.col_source)
        if rows.first < rows.size - rows.last:
            between = out[:, :, rows.first : rows.size - rows.last]
            line = small[:, :, rows.first : rows.first + 1]
            between[..., : cols.first] += line[..., : cols.first]
            if cols.last:
                between[..., -cols.last :] += line[..., -cols.last :]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        frame: Frame = ctx.frame
        rows, cols = frame.rows, frame.cols
        small = grad.new_zeros(ctx.small_shape)
        small[:, :, : rows.first].index_add_(3, frame.col_source, grad[:, :, : rows.first].sum(0, keepdim=True))
        if rows.last:
            strip = grad[:, :, -rows.last :].sum(0, keepdim=True)
            small[:, :, -rows.last :].index_add_(3, frame.col_source, strip)
        if rows.first < rows.size - rows.last:
            between = grad[:, :, rows.first : rows.size - rows.last]
            line = small[:, :, rows.first : rows.first + 1]
            line[..., : cols.first] += between[..., : cols.first].sum((0, 2), keepdim=True)
            if cols.last:
                line[..., -cols.last :] += between[..., -cols.last :].sum((0, 2), keepdim=True)
        return grad, small, None
