"""Maps continued beyond their border: what a linear region's intermediate values would be outside the image.

A folded convolution sees the values that the first convolution takes *outside* its output map, where the
original network pads with zeros. A field evaluates an intermediate map on any rectangle of rows and columns,
inside or outside, given the region's input continued by zeros. Ring padding reads the outside values from it.
Rows and columns are counted from the map's own first pixel, so negative ones lie outside.
"""

__all__ = ["ActivationField", "AffineField", "ConvField", "EntryField", "Field", "SumField", "Tap", "zero_pads"]

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.alpha.activation import AlphaActivation

Span = tuple[int, int]


def _is_tf_same(conv: nn.Conv2d) -> bool:
    """timm's TensorFlow-like convolutions pad by the input's size; told by name, so timm stays unimported."""
    return any(base.__name__ in ("Conv2dSame", "Conv2dSameExport") for base in type(conv).__mro__)


def zero_pads(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Zeros that `conv` puts around a map of `height` by `width` pixels: (left, right, top, bottom).

    Understands symmetric padding, torch's ``padding="same"`` and TensorFlow's SAME (asymmetric, by size).
    """
    sides: list[int] = []
    for axis, size in ((1, width), (0, height)):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if _is_tf_same(conv):
            stride = conv.stride[axis]
            total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        elif isinstance(conv.padding, str):
            total = reach if conv.padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [conv.padding[axis], conv.padding[axis]]
    return sides[0], sides[1], sides[2], sides[3]


class Tap:
    """A forward pre-hook that remembers a module's input until its last reader took it.

    Args:
        readers: How many ring convolutions read the tensor in one forward pass.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._left = 0
        self._seen: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remembers the first positional input."""
        self._seen = inputs[0]
        self._left = self.readers

    def peek(self) -> Tensor:
        """The tensor of this forward pass.

        Raises:
            RuntimeError: The tapped module did not run before the reader did.
        """
        if self._seen is None:
            raise RuntimeError(
                "ring padding has not seen its unit's input in this forward pass: the unit's first convolution "
                "was replaced or skipped; settle the student before rewriting its modules"
            )
        return self._seen

    def release(self) -> None:
        """Forgets the tensor once every reader is done, so that it does not outlive its step."""
        self._left -= 1
        if self._left <= 0:
            self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not drag along (or fail on) a tensor of an unfinished forward pass.
        return {"readers": self.readers, "_left": 0, "_seen": None}


class Field(Protocol):
    """An intermediate map that can be read outside its border."""

    def size(self) -> tuple[int, int]:
        """Height and width of the map's interior in this forward pass."""

    def at(self, rows: Span, cols: Span) -> Tensor:
        """Values on the half-open rectangle, Tensor[N, C, rows, cols]."""

    def outside(self) -> Tensor | None:
        """The value, Tensor[C], if the map is constant everywhere outside; else None."""

    def taps(self) -> list[Tap]:
        """The taps that the field reads."""


class EntryField:
    """The region's input, continued by zeros.

    Args:
        tap: Sees the input during the forward pass.
        channels: Number of channels C.
        module: Any module of the region with parameters: gives dtype and device.
    """

    def __init__(self, tap: Tap, channels: int, module: nn.Module) -> None:
        self.tap = tap
        self.channels = channels
        self._module = (module,)

    def size(self) -> tuple[int, int]:
        """See Field."""
        height, width = self.tap.peek().shape[-2:]
        return height, width

    def at(self, rows: Span, cols: Span) -> Tensor:
        """See Field."""
        x = self.tap.peek()
        spans = []
        for (start, stop), size in ((cols, x.shape[3]), (rows, x.shape[2])):
            first, last = min(max(start, 0), size), min(max(stop, 0), size)
            zeros = stop - start - (last - first)
            before = min(max(first - start, 0), zeros)
            spans.append((first, last, before, zeros - before))
        (left, right, *pad_cols), (top, bottom, *pad_rows) = spans
        return F.pad(x[:, :, top:bottom, left:right], [*pad_cols, *pad_rows])

    def outside(self) -> Tensor | None:
        """See Field."""
        return next(self._module[0].parameters()).new_zeros(self.channels)

    def taps(self) -> list[Tap]:
        """See Field."""
        return [self.tap]


class ConvField:
    """A convolution's output, continued: the same kernel slid beyond the border over the continued input."""

    def __init__(self, conv: nn.Conv2d, source: Field) -> None:
        self._conv = (conv,)
        self.source = source

    def _pads(self) -> tuple[int, int, int, int]:
        return zero_pads(self._conv[0], *self.source.size())

    def size(self) -> tuple[int, int]:
        """See Field."""
        conv = self._conv[0]
        height, width = self.source.size()
        left, right, top, bottom = self._pads()
        sizes = []
        for axis, padded in ((0, height + top + bottom), (1, width + left + right)):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            sizes.append((padded - reach - 1) // conv.stride[axis] + 1)
        return sizes[0], sizes[1]

    def at(self, rows: Span, cols: Span) -> Tensor:
        """See Field."""
        conv = self._conv[0]
        left, _, top, _ = self._pads()
        spans = []
        for axis, (start, stop), pad in ((0, rows, top), (1, cols, left)):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            first = start * conv.stride[axis] - pad
            spans.append((first, (stop - 1) * conv.stride[axis] - pad + reach + 1))
        x = self.source.at(spans[0], spans[1])
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def outside(self) -> Tensor | None:
        """See Field: constant only for 1×1 kernels, which look at one pixel."""
        conv = self._conv[0]
        if tuple(conv.kernel_size) != (1, 1) or conv.padding not in ((0, 0), "same", "valid"):
            return None
        value = self.source.outside()
        if value is None:
            return None
        if isinstance(self.source, EntryField):  # zeros in, so only the bias comes out
            return value.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        grouped = value.reshape(conv.groups, -1, 1)
        weight = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
        mixed = torch.bmm(weight, grouped).reshape(-1)
        return mixed if conv.bias is None else mixed + conv.bias

    def taps(self) -> list[Tap]:
        """See Field."""
        return self.source.taps()


class AffineField:
    """A BatchNorm's output by its running statistics, which come from interior pixels only.

    Differentiable in the scale γ and the shift β.
    """

    def __init__(self, norm: nn.BatchNorm2d, source: Field) -> None:
        self._norm = (norm,)
        self.source = source

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        norm = self._norm[0]
        mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = torch.rsqrt(var + norm.eps)
        if norm.affine:
            scale = scale * norm.weight
            return scale, norm.bias - mean * scale
        return scale, -mean * scale

    def size(self) -> tuple[int, int]:
        """See Field."""
        return self.source.size()

    def at(self, rows: Span, cols: Span) -> Tensor:
        """See Field."""
        scale, shift = self._scale_and_shift()
        x = self.source.at(rows, cols)
        return x * scale.to(x.dtype).reshape(1, -1, 1, 1) + shift.to(x.dtype).reshape(1, -1, 1, 1)

    def outside(self) -> Tensor | None:
        """See Field."""
        value = self.source.outside()
        if value is None:
            return None
        scale, shift = self._scale_and_shift()
        return torch.addcmul(shift, value, scale)

    def taps(self) -> list[Tap]:
        """See Field."""
        return self.source.taps()


class ActivationField:
    """σ_α of a continued map, its outside multiplied by α: zero padding at α=0, the linear map at α=1.

    Args:
        activation: The α-activation, or None where α has settled at 1 and the activation is gone.
        source: The map before the activation.
    """

    def __init__(self, activation: AlphaActivation | None, source: Field) -> None:
        self._activation = (activation,)
        self.source = source

    def size(self) -> tuple[int, int]:
        """See Field."""
        return self.source.size()

    def at(self, rows: Span, cols: Span) -> Tensor:
        """See Field."""
        x = self.source.at(rows, cols)
        activation = self._activation[0]
        if activation is None:
            return x
        value = cast(Tensor, activation(x))
        alpha = activation.coefficient(value)
        height, width = self.size()
        inside = [
            torch.arange(start, stop, device=x.device).ge(0) & torch.arange(start, stop, device=x.device).lt(size)
            for (start, stop), size in ((rows, height), (cols, width))
        ]
        within = inside[0].reshape(-1, 1) & inside[1].reshape(1, -1)
        return value * torch.where(within, torch.ones_like(alpha), alpha)

    def outside(self) -> Tensor | None:
        """See Field."""
        value = self.source.outside()
        activation = self._activation[0]
        if value is None or activation is None:
            return value
        # PReLU wants the channel in dimension 1.
        blended = cast(Tensor, activation(value.reshape(1, -1, 1, 1))).reshape(-1)
        return blended * activation.coefficient(blended)

    def taps(self) -> list[Tap]:
        """See Field."""
        return self.source.taps()


class SumField:
    """A residual add of two continued maps."""

    def __init__(self, left: Field, right: Field) -> None:
        self.left = left
        self.right = right

    def size(self) -> tuple[int, int]:
        """See Field."""
        return self.left.size()

    def at(self, rows: Span, cols: Span) -> Tensor:
        """See Field."""
        return self.left.at(rows, cols) + self.right.at(rows, cols)

    def outside(self) -> Tensor | None:
        """See Field."""
        left, right = self.left.outside(), self.right.outside()
        return None if left is None or right is None else left + right

    def taps(self) -> list[Tap]:
        """See Field."""
        return [*self.left.taps(), *self.right.taps()]
