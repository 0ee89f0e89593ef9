"""The images that static quantisation looks at: chosen by seed and count, never from the evaluation split."""

__all__ = ["Calibration", "collect"]

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.sources import ImageSource

_FORBIDDEN = ("eval", "labelled", "select")
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
