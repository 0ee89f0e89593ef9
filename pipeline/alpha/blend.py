"""σ_α of clipped activations (ReLU, ReLU6) as one differentiable function that keeps only its input.

Autograd on the formula would keep three maps of a mobile network's widest layers and pass over memory eight times.
"""

__all__ = ["blend_clipped"]

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements per piece on a CPU: intermediate values of one piece stay in its cache (1 MB in float32).
_PIECE = 1 << 18


def blend_clipped(x: Tensor, alpha: Tensor, high: float) -> Tensor:
    """αx + (1−α)·min(max(x, 0), high), differentiable once in x and α.

    Args:
        x: A map of any shape.
        alpha: Shape (), in [0, 1].
        high: Upper end of the clipping, 6 or infinity.

    Returns:
        A new map of x's shape and dtype.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the formula better than this file does
        return torch.lerp(F.hardtanh(x, 0.0, high), x, alpha.to(x.dtype))
    return cast(Tensor, _BlendClipped.apply(x, alpha, high))  # type: ignore[no-untyped-call]


def _flat(x: Tensor) -> Tensor | None:
    """A dense map's elements in memory order, without a copy; None for a map with gaps."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


class _BlendClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, high: float) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.high = high
        flat = _flat(x) if x.device.type == "cpu" else None
        if flat is None:
            return torch.lerp(F.hardtanh(x, 0.0, high), x, alpha.to(x.dtype))
        out = torch.empty_like(x)
        weight = float(alpha)
        out_flat = _flat(out)
        assert out_flat is not None
        for piece, result in zip(torch.split(flat, _PIECE), torch.split(out_flat, _PIECE), strict=True):
            torch.clamp(piece, 0.0, high, out=result)
            result.lerp_(piece, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, alpha = ctx.saved_tensors
        high, wants_alpha = ctx.high, ctx.needs_input_grad[1]
        flat = _flat(x) if x.device.type == "cpu" else None
        if flat is None:
            kept = torch.ops.aten.hardtanh_backward(grad, x, 0.0, high).lerp_(grad, alpha.to(grad.dtype))
            cut = (x - F.hardtanh(x, 0.0, high)).mul_(grad).sum(dtype=alpha.dtype) if wants_alpha else None
            return kept, cut, None
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = grad.contiguous(memory_format=layout)
        out = torch.empty_like(x)
        grad_flat, out_flat = _flat(grad), _flat(out)
        assert grad_flat is not None and out_flat is not None
        weight = float(alpha)
        scratch = flat.new_empty(min(_PIECE, flat.numel()))
        sums = []
        for piece, given, result in zip(
            torch.split(flat, _PIECE), torch.split(grad_flat, _PIECE), torch.split(out_flat, _PIECE), strict=True
        ):
            if wants_alpha:
                cut = scratch[: piece.numel()]
                torch.clamp(piece, 0.0, high, out=cut)
                torch.sub(piece, cut, out=cut)
                sums.append(torch.dot(cut, given))
            torch.ops.aten.hardtanh_backward.grad_input(given, piece, 0.0, high, grad_input=result)
            result.lerp_(given, weight)
        return out, torch.stack(sums).sum(dtype=alpha.dtype) if wants_alpha else None, None
