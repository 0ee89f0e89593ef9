"""A small network with what exports get wrong: BatchNorm, ReLU6, stride, depthwise, residual, dense folded conv."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.preprocessing import Preprocessing
from pipeline.models import store


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm with trained-looking statistics, and ReLU6 where asked."""

    def __init__(self, wide_in: int, wide_out: int, kernel: int, stride: int, groups: int, act: bool) -> None:
        norm = nn.BatchNorm2d(wide_out, eps=1e-3)
        with torch.no_grad():
            norm.weight.copy_(10 ** torch.empty(wide_out).uniform_(-0.8, 0.5))
            norm.bias.uniform_(-0.5, 1.0)
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.5, 2.0)
        conv = nn.Conv2d(wide_in, wide_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, norm, *([nn.ReLU6(inplace=True)] if act else []))


class Residual(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise 3x3, 1x1 projection, addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = ConvBlock(width, 4 * width, 1, 1, 1, True)
        self.depthwise = ConvBlock(4 * width, 4 * width, 3, 1, 4 * width, True)
        self.project = ConvBlock(4 * width, width, 1, 1, 1, False)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.project(self.depthwise(self.expand(image)))


class TinyNet(nn.Module):
    """A MobileNet in miniature: symmetric stride-2 stem, inverted residual, a folded unit (one dense conv)."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvBlock(channels, 8, 3, 2, 1, True)
        self.blocks = nn.ModuleDict({"first": Residual(8), "folded": nn.Conv2d(8, 8, 3, padding=1)})
        self.head = ConvBlock(8, 32, 1, 1, 1, True)
        self.classifier = nn.Linear(32, classes)
        with torch.no_grad():
            # Wide enough that the classes differ by more than the noise of eight bits.
            self.classifier.weight.uniform_(-1.0, 1.0)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        features = self.blocks["first"](features)
        features = self.blocks["folded"](features)
        return self.classifier(self.head(features).mean((2, 3)))


def tiny_net(channels: int = 3, seed: int = 0) -> TinyNet:
    """The same weights every time, with logits centred so that every class is named for some image."""
    torch.manual_seed(seed)
    model = TinyNet(channels).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(images(256, channels, seed=1000)))
        model.classifier.weight /= logits.std(0).reshape(-1, 1)
        model.classifier.bias.copy_((model.classifier.bias - logits.mean(0)) / logits.std(0))
    return model


def images(count: int, channels: int = 3, px: int = 32, seed: int = 0) -> np.ndarray:
    """Random pictures with a tint, patches and grain, so that neighbouring pixels agree as in photographs."""
    rng = np.random.default_rng(seed)
    tint = 1.5 * rng.standard_normal((count, channels, 1, 1))
    coarse = rng.standard_normal((count, channels, px // 8, px // 8)).repeat(8, axis=2).repeat(8, axis=3)
    return (tint + coarse + 0.3 * rng.standard_normal((count, channels, px, px))).astype(np.float32)


class NoCounterpart(nn.Module):
    """An operation that no mobile format has."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(image.mean(1) @ image.mean(1).mT)


SPEC = Preprocessing(input_px=32, mean=(0.5, 0.4, 0.3), std=(0.3, 0.4, 0.5), crop_fraction=1.0)


def save(folder: Path, module: nn.Module, **meta: object) -> Path:
    """A network as layerfold's own model file `tiny.pt`."""
    path = folder / "tiny.pt"
    content = {"name": "tiny", "num_classes": 10, "input_px": 32, "preprocess": SPEC.as_dict(), "recipe": "none"}
    store.save(path, module, content | meta)
    return path
