"""The images that static quantisation looks at: chosen by seed and count, never from the evaluation split."""

__all__ = ["Calibration", "collect", "open_images"]

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data import datasets, splits
from pipeline.data.files import FileSource, Sample
from pipeline.errors import DataError, nearest

if TYPE_CHECKING:
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.data.sources import ImageSource

_FORBIDDEN = ("eval", "labelled", "select")
_JUDGING = {"eval", "evaluation", "test", "testing", "testset", "val", "valid", "validation", "valset"}
_TRAINING = {"train", "training", "trainset", "trainval"}
# Words that say nothing beside "val": val_images, test-set, validation-data.
_FILLING = {"data", "dataset", "folder", "image", "images", "img", "imgs", "photos", "pictures", "px", "set", "split"}
# How ImageNet and COCO name the pictures of their evaluation sets, whatever the folder: ILSVRC2012_val_00000293.
_JUDGING_FILE = re.compile(r"(?:^|_)(?:val|test)\d*_\d{6,}$")
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# More missing than this, and it is another calibration than the recipe's.
_MISSING_COUNT, _MISSING_SHARE = 2, 0.1


@dataclass(frozen=True)
class Calibration:
    """Calibration images and what the manifest says about them.

    Attributes:
        batches: Normalised images, arrays [n, C, H, W].
        source: The split they came from.
        seed: What chose them.
        asked: How many were asked for.
        count: How many there are.
        sha256: Digest of the normalised pixels in order: two runs used the same images if and only if it agrees.
        skipped: Reason by file, of those that could not be decoded.
    """

    batches: tuple[npt.NDArray[np.float32], ...]
    source: str
    seed: int
    asked: int
    count: int
    sha256: str
    skipped: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The record for the manifest: everything but the pixels."""
        return {
            "source": self.source,
            "seed": self.seed,
            "asked": self.asked,
            "count": self.count,
            "sha256": self.sha256,
            "skipped": dict(self.skipped),
        }


def collect(source: "ImageSource", *, asked: int, seed: int, batch_size: int = 16) -> Calibration:
    """Reads the calibration images into memory.

    Args:
        source: A `calibration` or `train` split, opened with ``limit=asked`` and `seed`.
        asked: How many images the recipe asks for.
        seed: The seed with which the split was opened, for the record.
        batch_size: Images decoded at a time.

    Raises:
        DataError: The split is one that verification or model selection uses, or too many of the images asked for (or
            of those the split has) cannot be read: more than two and more than a tenth, or more than half.
    """
    split = source.name.rsplit("/", 1)[-1]
    if split in _FORBIDDEN:
        raise DataError(
            f"calibration on '{source.name}' is refused: its images judge the result",
            hint="take the 'calibration' split",
        )
    wanted = min(asked, len(source))
    batches: list[npt.NDArray[np.float32]] = []
    digest = hashlib.sha256()
    count = 0
    for images, _ in source.batches(batch_size):
        batch = images.numpy()[: wanted - count].astype(np.float32)
        batches.append(batch)
        digest.update(np.ascontiguousarray(batch).tobytes())
        count += len(batch)
        if count >= wanted:
            break
    skipped = dict(getattr(source, "unreadable", {}))
    missing = wanted - count
    if missing > max(_MISSING_COUNT, _MISSING_SHARE * wanted) or 2 * missing > wanted:
        named = ", ".join(list(skipped)[:3])
        raise DataError(
            f"{source.name}: only {count} of {wanted} calibration images can be read, {len(skipped)} are damaged: "
            f"{named}",
            hint="mend or remove the files",
        )
    return Calibration(tuple(batches), source.name, seed, asked, count, digest.hexdigest(), skipped)


def open_images(where: str, preprocessing: "Preprocessing", *, limit: int, seed: int) -> "ImageSource":
    """Opens calibration images outside a recipe.

    Args:
        where: A folder of images, however deep; or a data set of `pipeline.data.datasets.NAMES`, whose calibration
            split is taken, or ``name/split``.
        preprocessing: From picture to network input.
        limit: At most so many images.
        seed: Chooses them.

    Raises:
        DataError: It is a folder that is named as an evaluation set is, or holds one; it holds no images; or it is
            neither a folder nor a set that is known.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not files:
            raise DataError(
                f"calibration folder {where} holds no images", hint=f"expected {', '.join(sorted(_SUFFIXES))}"
            )
        _require_training(where, folder.resolve(), [path.relative_to(folder) for path in files])
        chosen = splits.subset(np.arange(len(files), dtype=np.int64), "calibration", limit, seed)
        samples = [Sample(files[index], -1) for index in chosen]
        return FileSource(f"{folder.name}/calibration", samples, preprocessing, num_classes=None, workers=0)
    name, _, split = where.partition("/")
    if split and (name not in datasets.NAMES or split not in splits.SPLITS):
        lacking = f"the data set '{name}' has no split '{split}'"
        raise DataError(
            f"there is no folder {where}" + (f", and {lacking}" if name in datasets.NAMES else ""),
            hint=nearest(split, splits.SPLITS) or "give a folder of images, or a data set's name",
        )
    found = datasets.resolve(name, None, None)
    return datasets.open_split(found, split or "calibration", preprocessing, limit=limit, seed=seed)


def _require_training(where: str, folder: Path, files: Iterable[Path]) -> None:
    """Refuses a folder that is an evaluation set, lies in one, or holds one.

    What lies above the folder says nothing about it (a home called `test`), except a parent named as an evaluation set
    with a training set beside it. Below a folder of training images, names are classes.
    """
    around = folder.parent
    if _is_judging(around.name) and any(_words(path.name) & _TRAINING for path in around.parent.iterdir()):
        _refuse(where, folder.parent.name, "give a folder of training images")
    if _words(folder.name) & _TRAINING:
        return
    if _is_judging(folder.name):
        _refuse(where, folder.name, "give a folder of training images")
    for path in files:
        for part in path.parent.parts:
            if _words(part) & _TRAINING:
                break
            if _is_judging(part):
                training = next((child for child in folder.iterdir() if _words(child.name) & _TRAINING), None)
                hint = f"give {training}" if training is not None else "give a folder of training images alone"
                _refuse(where, str(path.parent), hint)
        else:
            if _JUDGING_FILE.search(path.stem):
                _refuse(where, path.name, "give a folder of training images")


def _refuse(where: str, name: str, hint: str) -> None:
    raise DataError(f"calibration on '{where}' is refused: '{name}' names images that judge the result", hint=hint)


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def _is_judging(name: str) -> bool:
    """Whether a folder's name is that of an evaluation set: `val2017`, `ILSVRC2012_img_val`, `test-images`."""
    words = re.findall("[a-z]+", name.lower())
    return bool(words) and (
        words[-1] in _JUDGING or (words[0] in _JUDGING and all(word in _FILLING for word in words[1:]))
    )
