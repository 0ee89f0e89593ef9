"""Ring padding: a convolution whose zero padding becomes, as α goes to 1, what the folded network sees there.

The published method folds 1×1∘3×3 and 3×3∘3×3 although the two networks differ at the border, and leaves the
error to fine-tuning. Here the padding of the second convolution is α·σ_α(first convolution evaluated outside),
so the network at α=0 is the original one and the network at α=1 is exactly the composed convolution.
"""

__all__ = ["RingConv2d"]

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.alpha.border import Frame
from pipeline.alpha.field import Field, zero_pads


class RingConv2d(nn.Module):
    """A convolution padded by a field's outside values instead of zeros.

    It shares the parameter dictionary of the convolution it stands for, so its state-dict keys are those of
    the original network, and it refers to the producing modules without registering them.

    Attributes:
        ring_exact: True once its activations have settled at α=1: then plain composition of kernels with the
            convolutions before it, up to the region's entry, is exact at the border too.

    Args:
        conv: The convolution of the original network, zero padded, stride and dilation of any size.
        field: Its input map, readable outside the border.
        ring_exact: See the attribute.
    """

    def __init__(self, conv: nn.Conv2d, field: Field, *, ring_exact: bool = False) -> None:
        super().__init__()
        self._parameters = conv._parameters
        self._held = (conv,)
        self.field = field
        self.ring_exact = ring_exact
        self._frames: dict[tuple[object, ...], Frame] = {}
        for tap in field.taps():
            tap.readers += 1

    @property
    def conv(self) -> nn.Conv2d:
        """The original convolution, with its own zero padding."""
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        """Convolves Tensor[N, C_in, H, W] as the original does, its padding filled from the field."""
        conv = self.conv
        pads = zero_pads(conv, x.shape[2], x.shape[3])
        if not any(pads):
            out = cast(Tensor, conv(x))
        else:
            constant = self.field.outside()
            if constant is None:
                framed = self._framed(x, pads)
                out = F.conv2d(framed, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
            else:
                out = self._frame(x, pads).add(conv(x), conv, constant)
        for tap in self.field.taps():
            tap.release()
        return out

    def _frame(self, x: Tensor, pads: tuple[int, int, int, int]) -> Frame:
        """The ring's geometry for maps of x's size; kept for the next step."""
        key = (x.shape[2], x.shape[3], x.device)
        if key not in self._frames:
            if len(self._frames) > 8:  # many resolutions: keep the recent ones only
                self._frames.clear()
            self._frames[key] = Frame(self.conv, x.shape[2], x.shape[3], pads, x.device)
        return self._frames[key]

    def _framed(self, x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
        """`x` with its four margins read from the field, Tensor[N, C, H+pads, W+pads]."""
        left, right, top, bottom = pads
        height, width = x.shape[2], x.shape[3]
        across = (-left, width + right)
        row = [self.field.at((0, height), (-left, 0)).to(x.dtype)] if left else []
        row.append(x)
        if right:
            row.append(self.field.at((0, height), (width, width + right)).to(x.dtype))
        rows = [self.field.at((-top, 0), across).to(x.dtype)] if top else []
        rows.append(torch.cat(row, dim=3) if len(row) > 1 else x)
        if bottom:
            rows.append(self.field.at((height, height + bottom), across).to(x.dtype))
        return torch.cat(rows, dim=2) if len(rows) > 1 else rows[0]

    def extra_repr(self) -> str:
        """Shows the convolution it stands for in the printed model."""
        return f"{self.conv}, ring_exact={self.ring_exact}"
