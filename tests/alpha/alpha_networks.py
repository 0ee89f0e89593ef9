"""Small networks whose BatchNorms have lived: statistics, scales and shifts far from their start."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def season(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm random statistics and affine values, in place; returns the model in float64, eval."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
                module.weight.copy_(draw(module.weight, 0.5, 1.5))
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
    return model.double().eval()


def calm(model: nn.Module, x: Tensor) -> nn.Module:
    """Sets every BatchNorm's statistics to those of `x`, in place, so that no deep map explodes and saturates."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def chain(*layers: Sequence[object] | nn.Module, channels: int = 3) -> nn.Sequential:
    """A Sequential of ("conv", out, k, stride, padding, groups) tuples and modules; "bn" adds a norm."""
    built: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            built.append(layer)
        elif layer == "bn":
            built.append(nn.BatchNorm2d(channels))
        else:
            _, out, k, stride, padding, groups = layer
            built.append(nn.Conv2d(channels, out, k, stride, padding, groups=groups))
            channels = int(out)
    return nn.Sequential(*built)


class BasicBlock(nn.Module):
    """A residual block with its own activation objects, the last one after the add."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride > 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.act2(x)


def composed(linear: nn.Module, x: Tensor, stride: int, margin: int = 16) -> Tensor:
    """What plain composition of the kernels of a linear network gives, border included, without composing any.

    The network runs on `x` laid into zeros so wide that no padding of any layer comes near; the middle of the
    result is then the infinite-plane convolution of zero-extended x, which is what one composed kernel computes.
    """
    height, width = linear(x).shape[-2:]
    start = margin // stride
    canvas = nn.functional.pad(x, (margin,) * 4)
    return linear(canvas)[:, :, start : start + height, start : start + width]
