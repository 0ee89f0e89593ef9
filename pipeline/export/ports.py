"""The ends of a file: what its input and output tensors hold, and how float images and logits become that and back."""

__all__ = ["Port", "encoder", "lay_out"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.input_format import read_pixel_input

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Port:
    """One input or output of a file.

    Attributes:
        shape: Its shape, batch first.
        dtype: Its element type.
        scale, zero_point: The real value of an integer q is (q − zero_point)·scale.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float = 0.0
    zero_point: int = 0

    @classmethod
    def of_tflite(cls, details: Mapping[str, Any]) -> "Port":
        """Reads what LiteRT says about a tensor."""
        scale, zero_point = details["quantization"]
        shape = tuple(int(size) for size in details["shape"])
        return cls(shape, np.dtype(details["dtype"]), float(scale), int(zero_point))

    def encode(self, values: Floats) -> npt.NDArray[Any]:
        """Real values as the port's own type, rounded and clipped."""
        if not np.issubdtype(self.dtype, np.integer):
            return values.astype(self.dtype)
        limits = np.iinfo(self.dtype)
        steps: Floats = np.rint(values / np.float32(self.scale)) + np.float32(self.zero_point)
        return steps.clip(limits.min, limits.max).astype(self.dtype)

    def decode(self, values: npt.NDArray[Any]) -> Floats:
        """The port's values as real numbers, float32."""
        if not np.issubdtype(self.dtype, np.integer):
            return values.astype(np.float32)
        return (values.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


def lay_out(images: Floats, source: Port, *, channels_last: bool, file: str) -> Floats:
    """Images [N, C, H, W] in the layout of a file's input.

    Raises:
        ExportError: They are not images, or of another size than the file takes.
    """
    if images.ndim != 4:
        raise ExportError(f"{file} was given shape {images.shape}", hint="pass images as [N, C, H, W]")
    arranged = images.transpose(0, 2, 3, 1) if channels_last else images
    if arranged.shape[1:] != source.shape[1:]:
        layout = "[H, W, C]" if channels_last else "[C, H, W]"
        raise ExportError(
            f"{file} takes images of {layout} {source.shape[1:]}, was given {arranged.shape[1:]}",
            hint="use the resolution and channels that the file was exported with",
        )
    return arranged


def encoder(path: Path, source: Port, channels_last: bool) -> Callable[[Floats], npt.NDArray[Any]]:
    """How normalised images, already in the file's layout, become what its input takes.

    A file that normalises by itself is given the pixels that the images came from.
    """
    pixels = read_pixel_input(path) if source.dtype == np.uint8 else None
    if pixels is None:
        return source.encode
    return partial(pixels.from_normalised, channels_last=channels_last)
