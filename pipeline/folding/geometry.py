"""Where a convolution's taps lie: kernel, dilation, stride and padding along one axis, and how they combine.

Nothing here touches a weight, so a partition of a large region can be costed before anything is multiplied out.

TensorFlow's SAME padding with a stride depends on the input's size. It is kept as a rule and evaluated on the
size at hand, so that a folded network works at every resolution the unfolded one works at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

from pipeline.errors import FoldError

__all__ = ["Axis", "Step"]


@dataclass(frozen=True)
class Step:
    """Size and padding of one windowed pass over an axis.

    Args:
        reach: Extent of the window in samples, (kernel − 1)·dilation + 1.
        stride: Step between windows in samples.
        low: Zero padding before the first sample; ignored when `same`.
        high: Zero padding after the last sample; ignored when `same`.
        same: Padding follows TensorFlow's SAME rule (output = ⌈input / stride⌉, the odd sample at the end).
    """

    reach: int
    stride: int
    low: int = 0
    high: int = 0
    same: bool = False

    def pads(self, size: int) -> tuple[int, int]:
        """Padding (low, high) on an input of `size` samples."""
        if not self.same:
            return self.low, self.high
        total = max((-(-size // self.stride) - 1) * self.stride + self.reach - size, 0)
        return total // 2, total - total // 2

    def output(self, size: int) -> int:
        """Samples that leave the pass when `size` samples enter it."""
        low, high = self.pads(size)
        return (size + low + high - self.reach) // self.stride + 1


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis.

    Args:
        kernel: Number of taps.
        dilation: Distance between taps in input samples (1 where there is one tap).
        steps: The passes it stands for, in order; more than one only where a SAME rule with a stride is among them.
        extra_low: Zero padding added before that of `steps`, to make room for a wider parallel branch.
        extra_high: The same after the last sample.
    """

    kernel: int
    dilation: int
    steps: tuple[Step, ...]
    extra_low: int = 0
    extra_high: int = 0

    @classmethod
    def fixed(cls, kernel: int, *, stride: int = 1, dilation: int = 1, low: int = 0, high: int = 0) -> Axis:
        """An axis with explicit zero padding `low` and `high`."""
        dilation = dilation if kernel > 1 else 1
        return cls(kernel, dilation, (Step((kernel - 1) * dilation + 1, stride, low, high),))

    @classmethod
    def same(cls, kernel: int, *, stride: int = 1, dilation: int = 1) -> Axis:
        """An axis with TensorFlow's SAME padding; with stride 1 that is a fixed padding."""
        dilation = dilation if kernel > 1 else 1
        step = Step((kernel - 1) * dilation + 1, stride, same=True)
        if stride == 1 or kernel == 1:
            low, high = (step.reach - 1) // 2, step.reach - 1 - (step.reach - 1) // 2
            return cls.fixed(kernel, stride=stride, dilation=dilation, low=low, high=high)
        return cls(kernel, dilation, (step,))

    @cached_property
    def stride(self) -> int:
        """Input samples between two outputs."""
        return prod(step.stride for step in self.steps)

    @property
    def reach(self) -> int:
        """Extent of the taps in input samples."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def is_fixed(self) -> bool:
        """Whether the padding is the same at every input size."""
        return not any(step.same for step in self.steps)

    @cached_property
    def is_padded(self) -> bool:
        """Whether some input size is padded."""
        return not self.is_fixed or self.pads(1) != (0, 0)

    @property
    def is_pointwise(self) -> bool:
        """Whether an output sees one input sample and no padding (a stride is allowed)."""
        return self.kernel == 1 and not self.is_padded

    @property
    def same_rule(self) -> bool:
        """Whether the padding equals TensorFlow's SAME rule for this kernel at every input size."""
        rule = Step(self.reach, self.stride, same=True)
        return all(self.pads(size) == rule.pads(size) for size in _probe_sizes([self]))

    def pads(self, size: int) -> tuple[int, int]:
        """Zero padding (low, high) for an input of `size` samples."""
        low, high, stride = self.extra_low, self.extra_high, 1
        for step in self.steps:
            step_low, step_high = step.pads(size)
            low, high = low + stride * step_low, high + stride * step_high
            size, stride = step.output(size), stride * step.stride
        return low, high

    def output(self, size: int) -> int:
        """Output samples for an input of `size` samples."""
        low, high = self.pads(size)
        return (size + low + high - self.reach) // self.stride + 1

    def then(self, after: Axis) -> Axis:
        """The single pass that equals this one followed by `after`, away from the border.

        K = k₁ + s₁(k₂ − 1), S = s₁s₂, P = p₁ + s₁p₂ for undilated kernels; a dilation survives where both agree.
        """
        spread, after_spread, dilation = self.spreads(after)
        taps = (self.kernel - 1) * spread + (after.kernel - 1) * after_spread + 1
        low = self.extra_low + self.stride * after.extra_low
        high = self.extra_high + self.stride * after.extra_high
        return Axis(taps, dilation if taps > 1 else 1, self.steps + after.steps, low, high)._settled()

    def spreads(self, after: Axis) -> tuple[int, int, int]:
        """Distance between this axis's taps and between those of `after` in taps of the composite; its dilation."""
        own = self.dilation if self.kernel > 1 else 0
        other = self.stride * after.dilation if after.kernel > 1 else 0
        dilation = gcd(own, other) or 1
        return max(own // dilation, 1), max(other // dilation, 1), dilation

    def _settled(self) -> Axis:
        """Merges fixed passes into one, so that equal geometries compare equal."""
        if not self.is_fixed:
            return self
        low, high = self.pads(1)
        return Axis.fixed(self.kernel, stride=self.stride, dilation=self.dilation, low=low, high=high)

    @staticmethod
    def union(axes: list[Axis]) -> tuple[Axis, list[tuple[int, int]]]:
        """The axis that holds the taps of parallel branches, and where each branch's taps go in it.

        Returns:
            The common axis and, for every branch, (first tap, distance between taps) in taps of the common axis.

        Raises:
            FoldError: The strides differ, or the branches' taps move against each other with the input size.
        """
        if len({axis.stride for axis in axes}) > 1:
            raise FoldError(f"parallel branches have strides {[axis.stride for axis in axes]}")
        lows = _steady([[axis.pads(size)[0] for axis in axes] for size in _probe_sizes(axes)])
        low = max(lows)
        ahead = [axis.reach - 1 - own for axis, own in zip(axes, lows, strict=True)]
        reach = low + max(ahead) + 1
        own_dilations = [axis.dilation for axis in axes if axis.kernel > 1]
        dilation = gcd(*own_dilations, *(low - own for own in lows), reach - 1) or 1
        places = [
            ((low - own) // dilation, max(axis.dilation // dilation, 1) if axis.kernel > 1 else 1)
            for axis, own in zip(axes, lows, strict=True)
        ]
        widest = axes[lows.index(low)]
        kernel = (reach - 1) // dilation + 1
        if all(axis.is_fixed for axis in axes):
            slack = min(axis.pads(1)[1] - own for axis, own in zip(axes, ahead, strict=True))
            fixed = Axis.fixed(kernel, stride=widest.stride, dilation=dilation, low=low, high=max(ahead) + slack)
            return fixed, places
        more = reach - widest.reach
        common = Axis(kernel, dilation if kernel > 1 else 1, widest.steps, widest.extra_low, widest.extra_high + more)
        return common, places


def _probe_sizes(axes: list[Axis]) -> range:
    """Input sizes that show every phase of a padding rule: two periods above the widest window."""
    start = max(axis.reach for axis in axes)
    return range(start, start + 2 * max(axis.stride for axis in axes) + 1)


def _steady(lows: list[list[int]]) -> list[int]:
    """Low paddings of the branches, which may change with the size only together."""
    offsets = {tuple(low - row[0] for low in row) for row in lows}
    if len(offsets) > 1:
        raise FoldError(
            "parallel branches are aligned differently at odd and even input sizes (SAME padding with a stride)"
        )
    return lows[0]
