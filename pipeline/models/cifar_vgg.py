"""VGG for 32-px images: the convolutions of Simonyan and Zisserman, ICLR 2015, table 1, with BatchNorm.

The three fully connected layers made for 7×7 maps give way to pooling and one classifier.
"""

__all__ = ["NAMES", "build"]

from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

from pipeline.errors import ModelError

# Convolutions per stage of configurations D and E; each stage ends in a 2×2 max pooling.
_STAGES = {"cifar_vgg16": (2, 2, 3, 3, 3), "cifar_vgg19": (2, 2, 4, 4, 4)}
NAMES = tuple(_STAGES)
_CHANNELS = (64, 128, 256, 512, 512)


def build(
    name: str, *, num_classes: int, in_chans: int = 3, input_px: int = 32, args: Mapping[str, object] | None = None
) -> nn.Module:
    """Builds one of `NAMES` with random weights (He initialisation).

    Layers are called `stages.<stage>.conv<i>`, `.bn<i>`, `.act<i>` and `.pool`.

    Args:
        name: `cifar_vgg16` or `cifar_vgg19`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the image.
        input_px: Side of the image; at least 32, which five poolings bring to 1.
        args: `width`, a factor on the channels.

    Raises:
        ModelError: An argument is unknown, or the image is too small.
    """
    given = dict(args or {})
    width = given.pop("width", 1.0)
    if given:
        raise ModelError(f"model '{name}' takes no argument '{next(iter(given))}'", hint="it takes width")
    if not isinstance(width, int | float) or not width > 0:
        raise ModelError(f"model '{name}': width is {width!r}", hint="give a factor above 0, such as 1.0")
    if input_px < 32:
        raise ModelError(f"model '{name}' halves its image five times, too often for {input_px} px", hint="use 32 px")
    channels = in_chans
    stages = []
    for count, full in zip(_STAGES[name], _CHANNELS, strict=True):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(count):
            out = max(1, round(width * full))
            layers[f"conv{index}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers[f"bn{index}"] = nn.BatchNorm2d(out)
            layers[f"act{index}"] = nn.ReLU(inplace=True)
            nn.init.kaiming_normal_(layers[f"conv{index}"].get_parameter("weight"), mode="fan_out")
            channels = out
        layers["pool"] = nn.MaxPool2d(2)
        stages.append(nn.Sequential(layers))
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stages=nn.Sequential(*stages),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, num_classes),
        )
    )
