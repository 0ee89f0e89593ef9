"""Where batches come from: the protocol, and the source that holds its images in memory."""

__all__ = ["ArraySource", "ImageSource", "check_batch_size", "steps_of"]

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from pipeline.data import chance
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

# Names of the streams of chance: what a draw is for.
ORDER, CROP = 1, 2


@runtime_checkable
class ImageSource(Protocol):
    """A split of a data set.

    Attributes:
        name: Names set and split in reports, e.g. `fashion_mnist/train`.
        labelled: Whether every sample has a class.
        num_classes: How many classes there are; None where there are no labels.
        class_names: Their names in index order; empty where unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def labelled(self) -> bool: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, train: bool = False, seed: int = 0, epoch: int = 0, start_step: int = 0
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """Batches of one pass over the split.

        Args:
            batch_size: Images in a batch.
            train: Whether to shuffle and augment, by (seed, epoch, index) alone, and to drop the last partial
                batch. Otherwise samples come in order, as they are, and the last batch may be short.
            seed: Chooses the shuffle and the augmentation, with `epoch`.
            epoch: Which pass.
            start_step: Batches to skip, at no cost: the pass goes on as if it had never stopped.

        Yields:
            images Tensor[N, 3, H, W] float32, normalised, and labels Tensor[N] int64 (−1 where there is none).
        """
        ...

    def steps(self, batch_size: int, train: bool = False) -> int:
        """How many batches a whole pass has."""
        ...

    def describe(self, i: int) -> str:
        """Names sample i for a reader: its path, or its place in the set."""
        ...

    def paths(self, i: int) -> str | None:
        """The file of sample i; None where samples are not files."""
        ...


class ArraySource:
    """Images that fit in memory, at their final size.

    Training augments by a random crop from the zero-padded image and, where the set allows, a mirror image.
    """

    def __init__(
        self,
        name: str,
        pixels: Pixels,
        labels: Labels | None,
        preprocessing: Preprocessing,
        *,
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
        positions: Labels | None = None,
        crop_pad: int = 2,
        flip: bool = False,
    ) -> None:
        """Takes the arrays as they are, without a copy.

        Args:
            name: Names set and split in reports.
            pixels: uint8 array[n, channels, input_px, input_px] with 1 or 3 channels.
            labels: int64 array[n]; None for a set without labels.
            preprocessing: Normalises the pixels; its `input_px` must be theirs.
            class_names: Names of the classes in index order.
            num_classes: How many classes; the number of names unless given.
            positions: int64 array[n], the place of each sample in the whole set, for `describe`.
            crop_pad: Zero pixels added on each side before the random crop.
            flip: Whether training mirrors half of the images.

        Raises:
            DataError: The arrays do not fit together.
        """
        side = preprocessing.input_px
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise DataError(f"{name}: pixels are {pixels.dtype}{list(pixels.shape)}, expected uint8[n, 1 or 3, H, W]")
        if pixels.shape[2:] != (side, side):
            raise DataError(f"{name}: images are {pixels.shape[2]}×{pixels.shape[3]} px, preprocessing says {side} px")
        if labels is not None and labels.shape != (len(pixels),):
            raise DataError(f"{name}: {len(pixels)} images but labels of shape {list(labels.shape)}")
        self.name = name
        self.labelled = labels is not None
        self.class_names = tuple(class_names)
        self.num_classes = (num_classes or len(self.class_names) or None) if self.labelled else None
        self.preprocessing = preprocessing
        self._pixels = pixels
        self._labels = labels if labels is not None else np.full(len(pixels), -1, dtype=np.int64)
        self._positions = positions
        self._pad = crop_pad
        self._flip = flip
        self._windows: Pixels | None = None

    def __len__(self) -> int:
        return len(self._pixels)

    def steps(self, batch_size: int, train: bool = False) -> int:
        return steps_of(len(self), batch_size, train)

    def describe(self, i: int) -> str:
        return f"{self.name}[{i if self._positions is None else self._positions[i]}]"

    def paths(self, i: int) -> str | None:
        return None

    def batches(
        self, batch_size: int, *, train: bool = False, seed: int = 0, epoch: int = 0, start_step: int = 0
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        import torch

        check_batch_size(self, batch_size, train)
        count = len(self)
        indices = chance.order(count, seed, epoch, ORDER) if train else np.arange(count, dtype=np.int64)
        for step in range(start_step, self.steps(batch_size, train)):
            chosen = indices[step * batch_size : (step + 1) * batch_size]
            pixels = self._augmented(chosen, seed, epoch) if train else self._pixels[chosen]
            images = self.preprocessing.normalise(torch.from_numpy(pixels))
            yield images, torch.from_numpy(self._labels[chosen])

    def _augmented(self, chosen: Labels, seed: int, epoch: int) -> Pixels:
        if self._windows is None:
            pad = ((0, 0), (0, 0), (self._pad, self._pad), (self._pad, self._pad))
            side = self.preprocessing.input_px
            self._windows = np.lib.stride_tricks.sliding_window_view(
                np.pad(self._pixels, pad), (side, side), axis=(2, 3)
            )
        draw = chance.words(chosen, seed, epoch, CROP)
        offsets = np.uint64(2 * self._pad + 1)
        top = (draw >> np.uint64(32)) % offsets
        left = ((draw >> np.uint64(8)) & np.uint64(0xFFFFFF)) % offsets
        # Reversing a view copies nothing; the assignment below copies each image once.
        crops = self._windows[chosen, :, top, left]
        if self._flip:
            mirrored = (draw & np.uint64(1)).astype(bool)
            crops[mirrored] = crops[mirrored][..., ::-1]
        return np.ascontiguousarray(crops)


def steps_of(count: int, batch_size: int, train: bool) -> int:
    """How many batches of the size a pass over `count` samples has; training drops a partial last one."""
    return count // batch_size if train else math.ceil(count / batch_size)


def check_batch_size(source: ImageSource, batch_size: int, train: bool) -> None:
    """Refuses a batch size that leaves no batch.

    Raises:
        DataError: It is below 1, the split is empty, or training would drop its only, partial batch.
    """
    if batch_size < 1:
        raise DataError(f"batch size is {batch_size}, expected at least 1")
    if source.steps(batch_size, train) == 0:
        raise DataError(
            f"{source.name} has {len(source)} images, too few for one batch of {batch_size}",
            hint="take a smaller batch_size or more images",
        )
