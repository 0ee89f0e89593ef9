"""From picture to network input: the one specification that training, calibration, verification and the metadata
of exported files share.

For evaluation: convert to RGB (transparency laid on white, EXIF orientation applied), resize the shorter side to
`round(input_px / crop_fraction)`, crop the centre square of `input_px`, scale to [0, 1], subtract `mean`, divide by
`std`. With `crop_fraction` 1 the whole picture is resized to the square, whatever its shape.
"""

__all__ = ["Preprocessing", "to_rgb"]

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import DataError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ASPECTS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture before the network sees it.

    Attributes:
        input_px: Side of the square input, in pixels.
        mean: Per-channel mean of the [0, 1] image, subtracted.
        std: Per-channel divisor after the subtraction.
        crop_fraction: Side of the centre crop over the resized shorter side; 1 resizes the whole to a square.
        interpolation: `bilinear` or `bicubic`, with antialiasing.
        min_area: Smallest share of the picture that a random training crop covers.
        flip: Whether training mirrors half of the pictures.
    """

    input_px: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    min_area: float = 0.3
    flip: bool = True

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        problems = [
            (self.input_px < 1, f"input_px is {self.input_px}, expected at least 1"),
            (len(self.mean) != 3, f"mean has {len(self.mean)} values, expected 3"),
            (len(self.std) != 3, f"std has {len(self.std)} values, expected 3"),
            (any(v <= 0 for v in self.std), f"std is {self.std}, expected values above 0"),
            (not 0 < self.crop_fraction <= 1, f"crop_fraction is {self.crop_fraction}, expected 0 < x <= 1"),
            (
                self.interpolation not in _RESAMPLING,
                f"interpolation is '{self.interpolation}', expected one of {', '.join(_RESAMPLING)}",
            ),
            (not 0 < self.min_area <= 1, f"min_area is {self.min_area}, expected 0 < x <= 1"),
        ]
        wrong = [text for is_wrong, text in problems if is_wrong]
        if wrong:
            raise DataError(f"preprocessing: {'; '.join(wrong)}", hint="mend the recipe's preprocess section")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> "Preprocessing":
        """Reads what `as_dict` wrote.

        Raises:
            DataError: A key is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        for key in raw:
            if key not in known:
                raise DataError(
                    f"preprocessing: unknown key '{key}' {nearest(key, known)}".rstrip(),
                    hint=f"keys are {', '.join(sorted(known))}",
                )
        if "input_px" not in raw:
            raise DataError("preprocessing: key 'input_px' is missing", hint="add the side of the square input")
        return cls(**raw)  # type: ignore[arg-type]  # values are checked in __post_init__

    def eval_pixels(self, image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Resizes and crops a picture for evaluation.

        Args:
            image: Any PIL image; pictures of mode `L` stay one channel (the caller repeats it).

        Returns:
            uint8 array[input_px, input_px, 3], or [input_px, input_px] for mode `L`.
        """
        picture = image if image.mode == "L" else to_rgb(image)
        size, resample = self.input_px, _RESAMPLING[self.interpolation]
        width, height = picture.size
        if self.crop_fraction == 1:
            if (width, height) != (size, size):
                picture = picture.resize((size, size), resample)
            return np.array(picture)
        # The longer side is cut to whole pixels and the crop's corner rounded as torchvision does it, so that
        # published accuracies can be compared.
        shorter = round(size / self.crop_fraction)
        scaled = (
            (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
        )
        if scaled != (width, height):
            picture = picture.resize(scaled, resample)
        left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        return np.array(picture.crop((left, top, left + size, top + size)))

    def eval_image(self, image: Image.Image) -> "Tensor":
        """The network input for one picture, Tensor[3, input_px, input_px] float32, without augmentation."""
        return self._to_input(self.eval_pixels(image))

    def train_image(self, image: Image.Image, generator: "torch.Generator") -> "Tensor":
        """The network input for one picture, randomly cropped and mirrored.

        The crop covers between `min_area` and all of the picture at an aspect ratio between 3:4 and 4:3
        (Szegedy et al. 2015); where ten draws do not fit, the largest centre square is taken.

        Args:
            image: Any PIL image.
            generator: The only source of chance.

        Returns:
            Tensor[3, input_px, input_px] float32, normalised.
        """
        import torch

        picture = to_rgb(image)
        # All draws are made at once, so that the picture's shape cannot shift what a later draw sees.
        draws = torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist()
        mirrored = self.flip and torch.rand((), generator=generator).item() < 0.5
        box = _crop_box(picture.size, draws, self.min_area)
        side = self.input_px
        picture = picture.resize((side, side), _RESAMPLING[self.interpolation], box=box)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._to_input(np.array(picture))

    def normalise(self, pixels: "Tensor") -> "Tensor":
        """Scales pixels to [0, 1], subtracts the mean and divides by std.

        Args:
            pixels: Tensor[N, 3, H, W] uint8; one channel is repeated.

        Returns:
            Tensor[N, 3, H, W] float32.
        """
        import torch

        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, 3, 1, 1)
        scaled = pixels.to(torch.float32).div_(255)
        if pixels.shape[1] == 1:
            return (scaled - mean).div_(std)
        return scaled.sub_(mean).div_(std)

    def _to_input(self, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> "Tensor":
        import torch

        planes = torch.from_numpy(pixels)
        planes = planes[None] if planes.ndim == 2 else planes.permute(2, 0, 1)
        return self.normalise(planes[None])[0].contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency laid on white, deep greys scaled to 8 bits."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        grey = np.asarray(upright, dtype=np.float64) / 257
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _crop_box(size: tuple[int, int], draws: list[list[float]], min_area: float) -> tuple[float, float, float, float]:
    width, height = size
    for area_draw, aspect_draw, x_draw, y_draw in draws:
        area = width * height * (min_area + (1 - min_area) * area_draw)
        low, high = (math.log(value) for value in _ASPECTS)
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(x_draw * (width - w + 1)), math.floor(y_draw * (height - h + 1))
            return (left, top, left + w, top + h)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return (left, top, left + side, top + side)
