"""Streaming least squares: the convolution that best maps given inputs to given outputs.

The inputs are never stored. Of every batch only XᵀX, XᵀY and a few sums are kept, in float64, so that memory depends
on the number of channels and taps and not on the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import FoldError
from pipeline.folding.algebra import AffineConv
from pipeline.folding.geometry import Axis

__all__ = ["NormalEquations", "Window"]


@dataclass(frozen=True)
class Window:
    """Shape of the convolution to fit.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        rows: Geometry along the height.
        cols: Geometry along the width.
    """

    in_channels: int
    out_channels: int
    rows: Axis
    cols: Axis

    @property
    def unknowns(self) -> int:
        """Weights of one output channel."""
        return self.in_channels * self.rows.kernel * self.cols.kernel

    def gather(self, inputs: Tensor, place: Tensor) -> Tensor:
        """Windows around chosen output pixels.

        Args:
            inputs: Tensor[N, in, H, W].
            place: Tensor[P], indices of output pixels, row · W' + column.

        Returns:
            Tensor[N · P, unknowns].
        """
        padded = F.pad(inputs, (*self.cols.pads(inputs.shape[3]), *self.rows.pads(inputs.shape[2])))
        across = self.cols.output(inputs.shape[3])
        row, col = place // across * self.rows.stride, place % across * self.cols.stride
        flat = padded.flatten(2)
        taps = [
            flat[:, :, (row + u * self.rows.dilation) * padded.shape[3] + col + v * self.cols.dilation]
            for u in range(self.rows.kernel)
            for v in range(self.cols.kernel)
        ]
        # [N, in, taps, P] -> [N, P, in · taps]
        return torch.stack(taps, dim=2).flatten(1, 2).transpose(1, 2).reshape(-1, self.unknowns)

    def taps_within(self, other: Window) -> Tensor:
        """Which unknowns of this window those of `other` are, a smaller window around the same output pixel.

        Returns:
            Tensor[other.unknowns] of indices.

        Raises:
            FoldError: The other window is not inside this one.
        """
        grid = torch.arange(self.unknowns).reshape(self.in_channels, self.rows.kernel, self.cols.kernel)
        slices = []
        for own, inner in ((self.rows, other.rows), (self.cols, other.cols)):
            first, between = divmod(own.pads(64)[0] - inner.pads(64)[0], own.dilation)
            alike = own.stride == inner.stride and (inner.kernel == 1 or own.dilation == inner.dilation)
            if between or not alike or first < 0 or first + inner.kernel > own.kernel:
                raise FoldError(f"a window of {inner.kernel} taps is not inside one of {own.kernel}")
            slices.append(slice(first, first + inner.kernel))
        return grid[:, slices[0], slices[1]].reshape(-1)


class NormalEquations:
    """Sums over pixels of XXᵀ, XYᵀ, X, Y and Y², for ridge regression of Y on the windows X around each pixel.

    Args:
        window: The convolution to fit.
        positions: At most so many output pixels are used of each image, drawn at random; all where None.
        seed: Chooses them.
    """

    def __init__(self, window: Window, *, positions: int | None = None, seed: int = 0) -> None:
        self.window = window
        self.positions = positions
        size, out = window.unknowns, window.out_channels
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.cross = torch.zeros(size, out, dtype=torch.float64)
        self.sum_x = torch.zeros(size, dtype=torch.float64)
        self.sum_y = torch.zeros(out, dtype=torch.float64)
        self.sum_yy = torch.zeros(out, dtype=torch.float64)
        self.count = 0.0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, inputs: Tensor, outputs: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            inputs: Tensor[N, in, H, W].
            outputs: Tensor[N, out, H', W'], what the convolution should give.
            weight: Tensor[N, H', W'] of non-negative importances, or None for ones.
        """
        window = self.window
        size = window.rows.output(inputs.shape[2]), window.cols.output(inputs.shape[3])
        if size != tuple(outputs.shape[2:]):
            raise FoldError(f"windows for {size} output pixels, targets for {tuple(outputs.shape[2:])}")
        place = self._draw(size)
        flat_x = window.gather(inputs, place).double()
        flat_y = outputs.flatten(2)[:, :, place].transpose(1, 2).reshape(-1, window.out_channels).double()
        w = None if weight is None else weight.flatten(1)[:, place].reshape(-1, 1).double()
        weighted, weighted_y = (flat_x, flat_y) if w is None else (flat_x * w, flat_y * w)
        self.gram.addmm_(weighted.T, flat_x)
        self.cross.addmm_(weighted.T, flat_y)
        self.sum_x += weighted.sum(0)
        self.sum_y += weighted_y.sum(0)
        self.sum_yy += (weighted_y * flat_y).sum(0)
        self.count += float(flat_x.shape[0] if w is None else w.sum())

    def _draw(self, size: tuple[int, int]) -> Tensor:
        """Indices of the output pixels to use, of height × width."""
        total = size[0] * size[1]
        if self.positions is None or self.positions >= total:
            return torch.arange(total)
        return torch.randperm(total, generator=self._generator)[: self.positions]

    def merged(self, other: NormalEquations) -> NormalEquations:
        """The sums over the pixels of both."""
        both = NormalEquations(self.window, positions=self.positions)
        for name in ("gram", "cross", "sum_x", "sum_y", "sum_yy", "count"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def solve(self, ridge: float, *, prior: AffineConv | None = None, window: Window | None = None) -> AffineConv:
        """The ridge solution: least squared error plus λ‖W − prior‖², the bias unpenalised.

        Args:
            ridge: λ in units of the mean diagonal of the centred XᵀX.
            prior: Kernel that the solution is drawn to; zero where None.
            window: A smaller window to solve for instead, out of the same sums.

        Raises:
            FoldError: No pixel was added, or the sums are not finite.
        """
        window = window or self.window
        gram, cross, mean_x, mean_y = self._centred(window)
        scale = float(gram.diagonal().mean())
        if not self.count or not torch.isfinite(gram).all():
            raise FoldError("least squares without finite data: no image was given, or activations overflowed")
        start = torch.zeros_like(cross) if prior is None else _written_in(window, prior)
        # A constant input has no variance; the floor keeps the system solvable without moving the others.
        damping = max(ridge * scale, 1e-12 * scale, 1e-30)
        system = gram + damping * torch.eye(gram.shape[0], dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise FoldError(
                "least squares without a unique solution: the inputs of a unit depend on each other",
                hint="a larger ridge, such as 1e-3, or more images",
            )
        weight = start + torch.cholesky_solve(cross - gram @ start, factor)
        bias = mean_y - mean_x @ weight
        shape = (window.out_channels, window.in_channels, window.rows.kernel, window.cols.kernel)
        return AffineConv.conv(weight.T.reshape(shape), bias, window.rows, window.cols)

    def residual(self, conv: AffineConv) -> float:
        """Mean squared error of `conv` on the pixels added, over the variance of the outputs."""
        window = Window(conv.spec.in_channels, conv.spec.out_channels, conv.spec.rows, conv.spec.cols)
        gram, cross, mean_x, mean_y = self._centred(window)
        weight = conv.weight.reshape(window.out_channels, -1).T
        offset = conv.bias + mean_x @ weight - mean_y
        variance = self.sum_yy / self.count - mean_y.square()
        error = variance + offset.square()
        error += (weight * (gram @ weight)).sum(0) - 2 * (weight * cross).sum(0)
        return max(float(error.sum() / variance.sum()), 0.0)

    def _centred(self, window: Window) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariances per pixel XᵀX and XᵀY, and means of X and Y, for a window inside this one."""
        index = slice(None) if window == self.window else self.window.taps_within(window)
        mean_x, mean_y = self.sum_x[index] / max(self.count, 1e-30), self.sum_y / max(self.count, 1e-30)
        gram = self.gram if isinstance(index, slice) else self.gram[index][:, index]
        gram = gram / max(self.count, 1e-30) - torch.outer(mean_x, mean_x)
        cross = self.cross[index] / max(self.count, 1e-30) - torch.outer(mean_x, mean_y)
        return gram, cross, mean_x, mean_y


def _written_in(window: Window, conv: AffineConv) -> Tensor:
    """The kernel of `conv` as Tensor[unknowns, out] of a window around it."""
    zero = AffineConv.conv(
        torch.zeros(window.out_channels, window.in_channels, window.rows.kernel, window.cols.kernel),
        None,
        window.rows,
        window.cols,
    )
    return AffineConv.add([zero, conv]).weight.reshape(window.out_channels, -1).T
