"""Data sets that are folders of image files: ImageNet's layout, unlabelled photos, 20 labelled ImageNet photos."""

__all__ = ["find_imagefolder", "find_imagenet_samples", "open_source"]

import re
from importlib import metadata
from pathlib import Path

import numpy as np

from pipeline.data import splits
from pipeline.data.files import FileSource, Sample
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TRAIN_FOLDERS, _EVAL_FOLDERS = ("train",), ("val", "validation", "valid")
_PHOTO_EVAL_FRACTION = 0.35
_SAMPLE_NAME = re.compile(r"imagenet_(\d+)_(\d+)\.jpg")
_IMAGENET_CLASSES = 1000


def find_imagefolder(root: Path | None) -> tuple[Path, str]:
    """Checks that a folder has ImageNet's layout: `train/<class>/*.jpg` and `val/<class>/*.jpg`.

    Raises:
        DataError: There is no root, or it has another layout; the message names what is there.
    """
    layout = "train/<class>/*.jpg and val/<class>/*.jpg"
    if root is None:
        raise DataError("data.root is not set: an image folder has no other place", hint=f"set data.root to {layout}")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"data.root {root} {what}", hint=f"give the folder that holds {layout}")
    for wanted in (_TRAIN_FOLDERS, _EVAL_FOLDERS):
        if _first_folder(root, wanted) is None:
            there = sorted(child.name + ("/" if child.is_dir() else "") for child in root.iterdir())
            shown = ", ".join(there[:8]) + (", …" if len(there) > 8 else "") if there else "nothing"
            raise DataError(
                f"data.root {root} has no folder '{wanted[0]}'; it holds {shown}", hint=f"expected {layout}"
            )
    return root, f"image folder {root}"


def find_imagenet_samples() -> tuple[Path, str] | None:
    """The folder of the 20 labelled ImageNet photos inside the package foolbox, whose code is not imported."""
    try:
        distribution = metadata.distribution("foolbox")
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file("foolbox/data")))
    if not folder.is_dir() or not any(_SAMPLE_NAME.fullmatch(path.name) for path in folder.iterdir()):
        return None
    return folder, f"20 labelled ImageNet photos of the package foolbox {distribution.version}"


def open_source(
    name: str,
    location: Path,
    split: str,
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    seed: int = 0,
    holdout: float = 0.0,
    workers: int | None = None,
) -> FileSource:
    """Opens a split of a folder of images.

    Args:
        name: `imagefolder`, `photos` or `imagenet_samples`.
        location: The folder.
        split: As for `datasets.open_split`.
        preprocessing: From picture to network input.
        limit: At most so many images.
        seed: Chooses which of `train` and `calibration` a limit keeps.
        holdout: Share of the training images kept for `select`.
        workers: Processes that decode; by the size of the set unless given.

    Raises:
        DataError: The folder has another layout, or the split is empty.
    """
    labels: tuple[str, ...] = ()
    num_classes: int | None = None
    if name == "imagefolder":
        samples, labels = _imagefolder_samples(location, _EVAL_FOLDERS if split == "eval" else _TRAIN_FOLDERS)
        num_classes = len(labels)
        chosen = _training_part(samples, split, holdout) if split != "eval" else np.arange(len(samples))
    elif name == "photos":
        samples = [Sample(path, -1) for path in _image_files(location)]
        chosen = _photo_part(samples, split, holdout)
    else:
        if split not in ("eval", "labelled"):
            raise DataError(f"{name} has no split '{split}': 20 photos are only ever evaluated")
        samples, num_classes = _imagenet_samples(location), _IMAGENET_CLASSES
        chosen = np.arange(len(samples))
    kept = splits.subset(chosen.astype(np.int64), split, limit, seed)
    if not len(kept):
        hint = "hold out a larger share of the training images" if split == "select" else "check data.root"
        raise DataError(f"{name}/{split} in {location} holds no images", hint=hint)
    return FileSource(
        f"{name}/{split}",
        [samples[i] for i in kept],
        preprocessing,
        num_classes=num_classes,
        class_names=labels,
        workers=workers,
    )


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _imagefolder_samples(root: Path, names: tuple[str, ...]) -> tuple[list[Sample], tuple[str, ...]]:
    train, other = _first_folder(root, _TRAIN_FOLDERS), _first_folder(root, names)
    if train is None or other is None:
        find_imagefolder(root)
        raise DataError(f"{root} changed while it was read")
    classes = _class_names(train)
    if not classes:
        raise DataError(f"{train} has no class folders", hint="expected train/<class>/*.jpg")
    if other != train:
        _same_classes(train, classes, other, _class_names(other))
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        files = _image_files(other / name)
        if not files:
            raise DataError(f"{other / name} holds no images", hint="remove the folder on both sides, or fill it")
        samples.extend(Sample(path, label) for path in files)
    return samples, classes


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")))


def _same_classes(train: Path, expected: tuple[str, ...], other: Path, found: tuple[str, ...]) -> None:
    if found == expected:
        return
    if not found:
        raise DataError(
            f"{other} has no class folders but {len(_image_files(other))} images",
            hint=f"sort them into class folders named as in {train}",
        )
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = [f"lacks {', '.join(missing[:3])}" * bool(missing), f"has {', '.join(extra[:3])} besides" * bool(extra)]
    raise DataError(
        f"{train} has {len(expected)} class folders, {other} {len(found)}: it {' and '.join(filter(None, parts))}",
        hint="both must hold the same class folders",
    )


def _training_part(samples: list[Sample], split: str, holdout: float) -> "splits.Indices":
    if holdout == 0:
        return np.arange(0 if split == "select" else len(samples), dtype=np.int64)
    kept, held = splits.hold_out(_keys(samples), holdout)
    return held if split == "select" else kept


def _photo_part(samples: list[Sample], split: str, holdout: float) -> "splits.Indices":
    """Photos have no official split: the held-out part is chosen by content, then `select` from what is left."""
    if not samples:
        return np.arange(0, dtype=np.int64)
    keys = _keys(samples)
    rest, evaluated = splits.hold_out(keys, _PHOTO_EVAL_FRACTION)
    if split == "eval":
        return _first_of_each(evaluated, keys)
    kept, held = splits.hold_out(keys[rest], holdout)
    return _first_of_each(rest[held if split == "select" else kept], keys)


def _first_of_each(indices: "splits.Indices", keys: "splits.Keys") -> "splits.Indices":
    """One index per distinct content."""
    _, first = np.unique(keys[indices], return_index=True)
    return np.asarray(indices[np.sort(first)], dtype=np.int64)


def _keys(samples: list[Sample]) -> "splits.Keys":
    try:
        return splits.content_keys(sample.path.read_bytes() for sample in samples)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}", hint="mend the file's permissions"
        ) from error


def _imagenet_samples(folder: Path) -> list[Sample]:
    found = []
    for path in sorted(folder.iterdir()):
        match = _SAMPLE_NAME.fullmatch(path.name)
        if match:
            found.append(Sample(path, int(match[2])))
    return found
