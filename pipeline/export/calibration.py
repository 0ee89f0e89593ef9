"""The images that static quantisation looks at: chosen by seed and count, never from the evaluation split."""

__all__ = ["Calibration", "collect", "open_images"]

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data import datasets, splits
from pipeline.data.files import FileSource, Sample
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.data.sources import ImageSource

_FORBIDDEN = ("eval", "labelled", "select")
_EVALUATION_FOLDERS = ("eval", "evaluation", "val", "valid", "validation", "test")
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Fewer than this share of the images asked for is another calibration than the recipe's.
_LEAST_SHARE = 0.9


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
        DataError: The split is one that verification or model selection uses, or fewer than nine tenths of the
            images asked for (or of those the split has) can be read.
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
    if count < _LEAST_SHARE * wanted:
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
        DataError: It is a folder that is named as an evaluation set is, it holds no images, or the set is unknown.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        judging = {part.lower() for part in folder.resolve().parts[-2:]} & set(_EVALUATION_FOLDERS)
        if judging:
            raise DataError(
                f"calibration on '{where}' is refused: '{judging.pop()}' names images that judge the result",
                hint="give a folder of training images",
            )
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not files:
            raise DataError(
                f"calibration folder {where} holds no images", hint=f"expected {', '.join(sorted(_SUFFIXES))}"
            )
        chosen = splits.subset(np.arange(len(files), dtype=np.int64), "calibration", limit, seed)
        samples = [Sample(files[index], -1) for index in chosen]
        return FileSource(f"{folder.name}/calibration", samples, preprocessing, num_classes=None, workers=0)
    name, _, split = where.partition("/")
    if split and name not in datasets.NAMES:
        raise DataError(f"no calibration folder {where}", hint="give a folder of images, or a data set's name")
    found = datasets.resolve(name, None, None)
    return datasets.open_split(found, split or "calibration", preprocessing, limit=limit, seed=seed)
