"""Fully connected networks for small images, as in Ben Dror et al., "Layer Folding", BMVC 2022 (MNIST)."""

__all__ = ["NAMES", "build"]

from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

from pipeline.errors import ModelError

_DEPTHS = {f"mlp_{depth}": depth for depth in range(2, 11)}
NAMES = tuple(_DEPTHS)


def build(
    name: str, *, num_classes: int, in_chans: int = 3, input_px: int = 28, args: Mapping[str, object] | None = None
) -> nn.Module:
    """Builds `mlp_<depth>` with random weights (He initialisation): depth − 1 hidden layers with ReLU, a classifier.

    Layers are called `fc1`, `act1`, …, and `classifier`.

    Args:
        name: `mlp_2` to `mlp_10`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the image.
        input_px: Side of the square image: the first layer has in_chans·input_px² inputs.
        args: `width` of the hidden layers, 256 unless given.

    Raises:
        ModelError: An argument is unknown, or the width is no positive integer.
    """
    given = dict(args or {})
    width = given.pop("width", 256)
    if given:
        raise ModelError(f"model '{name}' takes no argument '{next(iter(given))}'", hint="it takes width")
    if not isinstance(width, int) or width < 1:
        raise ModelError(f"model '{name}': width is {width!r}", hint="give a positive integer, such as 256")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = in_chans * input_px**2
    for index in range(1, _DEPTHS[name]):
        layers[f"fc{index}"] = hidden = nn.Linear(features, width)
        # PyTorch's own start shrinks what passes a ReLU layer, and ten such layers in a row do not learn.
        nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
        nn.init.zeros_(hidden.bias)
        layers[f"act{index}"] = nn.ReLU()
        features = width
    layers["classifier"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)
