"""Files that take camera pixels: uint8 input, with the normalisation inside.

With x = (p/255 − mean)/std the first convolution becomes one over raw pixels: its weights take the factor 1/(255·std),
its bias the mean. What needs care is the border: padding with zeros after normalisation means padding with the colour
255·mean before it, which no runtime does cheaply. So where the first convolution pads, the mean is subtracted from the
pixels before the padding, and only the factor moves into the weights. Both forms compute what the network computes.
"""

__all__ = ["ENTRY", "PixelInput", "is_channels_last", "read_pixel_input", "with_pixel_input"]

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ExportError
from pipeline.export import metadata

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, fx, nn

ENTRY = "layerfold_input"
_WHITE = 255.0


@dataclass(frozen=True)
class PixelInput:
    """How pixels 0..255 are normalised: (p/255 − mean)/std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> "PixelInput":
        """Checks the numbers.

        Raises:
            ExportError: They are of different lengths, or a divisor is not positive.
        """
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ExportError(
                f"mean {tuple(mean)} and std {tuple(std)} do not describe a normalisation",
                hint="give one mean and one positive std a channel",
            )
        return cls(tuple(map(float, mean)), tuple(map(float, std)))

    def from_normalised(
        self, images: "npt.NDArray[np.float32]", *, channels_last: bool = False
    ) -> "npt.NDArray[np.uint8]":
        """The pixels that normalised images [N, C, H, W] (or [N, H, W, C]) came from."""
        import numpy as np

        shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
        mean = np.asarray(self.mean, dtype=np.float32).reshape(shape)
        std = np.asarray(self.std, dtype=np.float32).reshape(shape)
        levels: npt.NDArray[np.float32] = np.rint((images * std + mean) * np.float32(_WHITE))
        return levels.clip(0, 255).astype(np.uint8)

    def as_dict(self) -> dict[str, Any]:
        """What is written into the file."""
        return {"values": "pixels", "dtype": "uint8", **asdict(self)}


def read_pixel_input(path: Path | str) -> PixelInput | None:
    """The normalisation inside a file; None for a file that takes normalised images."""
    spec = metadata.read_entry(path, ENTRY)
    return PixelInput.of(spec["mean"], spec["std"]) if spec.get("values") == "pixels" else None


def is_channels_last(path: Path | str) -> bool:
    """Whether a file's own record says that its input is [N, H, W, C]."""
    return metadata.read_entry(path, ENTRY).get("layout") == "NHWC"


def with_pixel_input(network: "fx.GraphModule", pixels: PixelInput) -> "fx.GraphModule":
    """Moves the normalisation into a lowered network.

    Args:
        network: A lowered network over normalised images [N, C, H, W]; it is not changed.
        pixels: The normalisation.

    Returns:
        A lowered network over uint8 pixels [N, C, H, W].

    Raises:
        ExportError: The network does not start with a convolution of as many channels.
    """
    import torch
    from torch import nn

    aten = torch.ops.aten
    result = copy.deepcopy(network)
    image = next(node for node in result.graph.nodes if node.op == "placeholder")
    pad, first = _start(result, image)
    layer = result.get_submodule(str(first.target)) if first is not None else None
    if first is None or not isinstance(layer, nn.Conv2d) or layer.in_channels != len(pixels.mean):
        raise ExportError(
            f"the normalisation of {len(pixels.mean)} channels cannot move into a network that does not start with "
            "a convolution over them",
            hint="export with float input",
        )
    mean = torch.tensor(pixels.mean, dtype=torch.float64)
    std = torch.tensor(pixels.std, dtype=torch.float64)
    with result.graph.inserting_after(image):
        source = result.graph.call_function(aten.to.dtype, (image, torch.float32))
    padded = pad is not None or layer.padding not in {(0, 0), "valid"}
    if padded:
        result.register_buffer("mean_pixel", (_WHITE * mean).float().reshape(1, -1, 1, 1))
        with result.graph.inserting_after(source):
            constant = result.graph.get_attr("mean_pixel")
        with result.graph.inserting_after(constant):
            source = result.graph.call_function(aten.sub.Tensor, (source, constant))
    (pad or first).replace_input_with(image, source)
    _fold(layer, mean, std, with_mean=not padded)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def _start(network: "fx.GraphModule", image: "fx.Node") -> "tuple[fx.Node | None, fx.Node | None]":
    """The constant padding before the first layer, if there is one, and the first layer."""
    users = list(image.users)
    pad = users[0] if len(users) == 1 and str(users[0].target) == "aten.pad.default" else None
    after = list(pad.users) if pad is not None else users
    first = after[0] if len(after) == 1 and after[0].op == "call_module" else None
    return pad, first


def _fold(layer: "nn.Conv2d", mean: "Tensor", std: "Tensor", *, with_mean: bool) -> None:
    import torch
    from torch import nn

    weight = layer.weight.detach().double() / (_WHITE * std).reshape(1, -1, 1, 1)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    if with_mean:
        bias = bias - (weight * (_WHITE * mean).reshape(1, -1, 1, 1)).sum((1, 2, 3))
    layer.weight = nn.Parameter(weight.float())
    layer.bias = nn.Parameter(bias.float())
