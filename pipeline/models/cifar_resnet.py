"""The residual networks for 32-px images of He et al., "Deep Residual Learning", CVPR 2016, section 4.2.

Depth 6n+2: a 3×3 stem, three stages of n basic blocks with 16, 32 and 64 channels, pooling, one classifier.
"""

__all__ = ["NAMES", "BasicBlock", "CifarResNet", "build"]

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError

_BLOCKS_PER_STAGE = {"cifar_resnet20": 3, "cifar_resnet32": 5, "cifar_resnet44": 7, "cifar_resnet56": 9}
NAMES = tuple(_BLOCKS_PER_STAGE)
_CHANNELS = (16, 32, 64)


def _fixed_shortcut(channels: int, out: int, stride: int) -> nn.Conv2d:
    """Option A of the paper, subsampling and zero channels, as a 1×1 convolution that does not train.

    Written so, a fold reads it like any other layer; indexing and padding of channels it could not.
    """
    conv = nn.Conv2d(channels, out, 1, stride, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        before = (out - channels) // 2
        conv.weight[before : before + channels, :, 0, 0] = torch.eye(channels)
    conv.weight.requires_grad_(False)
    return conv


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, with an activation between them and one after the sum.

    Args:
        channels: Channels that enter.
        out: Channels that leave.
        stride: Of the first convolution.
        projection: Shortcut across a change of shape: a trained 1×1 convolution (option B), else option A.
    """

    def __init__(self, channels: int, out: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = (
                nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                if projection
                else _fixed_shortcut(channels, out, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, channels, H, W] to Tensor[N, out, ⌈H/stride⌉, ⌈W/stride⌉]."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.act2(y + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """A residual network of 6n+2 layers for small images.

    Args:
        blocks: n, basic blocks per stage.
        num_classes: Outputs.
        in_chans: Channels of the image.
        width: Factor on the channels.
        projection: See BasicBlock.
    """

    def __init__(
        self, blocks: int, *, num_classes: int, in_chans: int = 3, width: float = 1.0, projection: bool = False
    ) -> None:
        super().__init__()
        widths = [max(1, round(width * channels)) for channels in _CHANNELS]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        channels = widths[0]
        stages = []
        for stage, out in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(BasicBlock(channels, out, 2 if stage > 0 and block == 0 else 1, projection))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images Tensor[N, in_chans, H, W] to logits Tensor[N, num_classes]."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


def build(
    name: str, *, num_classes: int, in_chans: int = 3, input_px: int = 32, args: Mapping[str, object] | None = None
) -> nn.Module:
    """Builds one of `NAMES` with random weights (He initialisation).

    Args:
        name: Such as `cifar_resnet20`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the image.
        input_px: Not read: any size of 4 px or more works.
        args: `width`, a factor on the channels, and `shortcut`: "A" (fixed, the paper's for CIFAR) or "B" (trained).

    Raises:
        ModelError: An argument is unknown or has a value that makes no network.
    """
    given = dict(args or {})
    width, shortcut = given.pop("width", 1.0), given.pop("shortcut", "A")
    if given:
        raise ModelError(f"model '{name}' takes no argument '{next(iter(given))}'", hint="it takes width and shortcut")
    if not isinstance(width, int | float) or not width > 0:
        raise ModelError(f"model '{name}': width is {width!r}", hint="give a factor above 0, such as 1.0")
    if shortcut not in ("A", "B"):
        raise ModelError(f"model '{name}': shortcut is {shortcut!r}", hint="give 'A' (fixed) or 'B' (trained 1×1)")
    return CifarResNet(
        _BLOCKS_PER_STAGE[name],
        num_classes=num_classes,
        in_chans=in_chans,
        width=float(width),
        projection=shortcut == "B",
    )
