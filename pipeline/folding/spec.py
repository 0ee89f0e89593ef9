"""The shape of an affine convolution without its weights, and what composing it would do at the border."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from pipeline.errors import FoldError
from pipeline.folding.geometry import Axis

__all__ = ["ConvSpec"]

_TRUNCATED = (
    "a padded window follows a layer that already looks beyond one pixel, so the zero padding between them cuts "
    "values that one convolution cannot cut"
)
_REPADDED = "a bias reaches into the padding of one layer and is cut by the padding of the next"


@dataclass(frozen=True)
class ConvSpec:
    """What an affine convolution looks like from outside.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        groups: Block-diagonal blocks of the kernel.
        rows: Geometry along the height.
        cols: Geometry along the width.
        constant: Whether the constant part may differ from zero.
        ring: Whether a layer before it supplies the values around the border (`pipeline.alpha`'s ring
            padding) where a plain convolution reads zeros.
        mapped: Whether the constant part near the border differs from the one inside, because a padded window
            reads zeros where the layer before it would have given its bias. A bias map repairs this exactly.
        inexact: Why no single convolution equals the layers at the border; empty where one does.
    """

    in_channels: int
    out_channels: int
    groups: int
    rows: Axis
    cols: Axis
    constant: bool = True
    ring: bool = False
    mapped: bool = False
    inexact: str = ""

    @cached_property
    def is_diagonal(self) -> bool:
        """Whether it only scales and shifts each channel (BatchNorm, scale, identity)."""
        pointwise = self.rows.is_pointwise and self.cols.is_pointwise
        return pointwise and self.stride == (1, 1) and self.groups == self.in_channels == self.out_channels

    @property
    def mixes(self) -> bool:
        """Whether an output depends on several channels or pixels, or pixels are skipped."""
        alone = self.groups == self.in_channels == self.out_channels
        return not (alone and self.kernel == (1, 1) and self.stride == (1, 1))

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether an output pixel sees one input pixel and no padding."""
        return self.rows.is_pointwise and self.cols.is_pointwise

    @cached_property
    def is_padded(self) -> bool:
        """Whether zeros are read around the input."""
        return self.rows.is_padded or self.cols.is_padded

    @property
    def stride(self) -> tuple[int, int]:
        """Input pixels between two outputs, (rows, cols)."""
        return self.rows.stride, self.cols.stride

    @property
    def kernel(self) -> tuple[int, int]:
        """Taps, (rows, cols)."""
        return self.rows.kernel, self.cols.kernel

    @property
    def parameters(self) -> int:
        """Weights and biases of the convolution."""
        taps = self.rows.kernel * self.cols.kernel
        return self.out_channels * (self.in_channels // self.groups * taps + 1)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one input of `height` × `width` pixels (bias not counted)."""
        taps = self.rows.kernel * self.cols.kernel
        positions = self.rows.output(height) * self.cols.output(width)
        return self.out_channels * (self.in_channels // self.groups) * taps * positions

    def then(self, after: ConvSpec) -> ConvSpec:
        """The convolution that equals this one followed by `after`, inside; the border is noted.

        Raises:
            FoldError: The channel counts do not meet.
        """
        if self.out_channels != after.in_channels:
            raise FoldError(f"{self.out_channels} channels leave one layer, {after.in_channels} enter the next")
        inexact, mapped = self.inexact or after.inexact, self.mapped or after.mapped
        one_tap = self.kernel == (1, 1)
        if after.is_padded and not after.ring:
            if not one_tap:
                inexact = inexact or _TRUNCATED
            elif self.constant and self.is_padded:
                inexact = inexact or _REPADDED
            elif self.constant:
                mapped = True
        if after.mapped and not self.is_pointwise:
            inexact = inexact or _REPADDED
        return ConvSpec(
            self.in_channels,
            after.out_channels,
            gcd(self.groups, after.groups),
            self.rows.then(after.rows),
            self.cols.then(after.cols),
            constant=self.constant or after.constant,
            ring=self.ring if self.is_padded else after.ring,
            mapped=mapped,
            inexact=inexact,
        )

    @staticmethod
    def union(branches: list[ConvSpec]) -> ConvSpec:
        """The convolution that equals the sum of parallel branches on one input.

        Raises:
            FoldError: The branches cannot be aligned, or their channels differ.
        """
        first = branches[0]
        channels = {(branch.in_channels, branch.out_channels) for branch in branches}
        if len(channels) > 1:
            raise FoldError(f"parallel branches have channels (in, out) {sorted(channels)}")
        padded = [branch for branch in branches if branch.is_padded]
        return replace(
            first,
            groups=gcd(*(branch.groups for branch in branches)),
            rows=Axis.union([branch.rows for branch in branches])[0],
            cols=Axis.union([branch.cols for branch in branches])[0],
            constant=any(branch.constant for branch in branches),
            ring=bool(padded) and all(branch.ring for branch in padded),
            mapped=any(branch.mapped for branch in branches),
            inexact=next((branch.inexact for branch in branches if branch.inexact), ""),
        )
