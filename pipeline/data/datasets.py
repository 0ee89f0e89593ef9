"""Data sets by the name that recipes use: which one is there, where, and its splits.

`resolve` finds or fetches a data set and says where it came from; `open_split` opens a split of what was found. Nothing
is imported from torch until a split yields its first batch.
"""

__all__ = ["NAMES", "Resolved", "open_split", "resolve", "resolve_once"]

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.data import arrays, cache, folders, locate, splits
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.errors import DataError, nearest

NAMES = (*arrays.SETS, "imagefolder", "photos", "imagenet_samples")
"""What `data.name`, `data.fallback` and `data.labelled` may be."""

_ALIASES = {"imagenet": "imagefolder"}
_RESOLVED: "dict[tuple[str, Path | None, str | None, Path], Resolved]" = {}


@dataclass(frozen=True)
class Resolved:
    """A data set that is there.

    Attributes:
        name: Which one: the asked one, or the fallback.
        location: Its folder or file.
        note: Where it came from, and why the fallback was taken if it was, for reports.
    """

    name: str
    location: str
    note: str


def resolve(
    name: str,
    root: str | Path | None = None,
    fallback: str | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Resolved:
    """Finds a data set, fetching it where it is missing and can be had.

    Args:
        name: One of `NAMES` (`imagenet` means `imagefolder`; hyphens count as underscores).
        root: Where it lies; it is then looked for nowhere else, and there is no fallback.
        fallback: The data set to take where the asked one is not to be had.
        say: Is told before something is downloaded.

    Raises:
        DataError: The name is unknown, or neither data set is there.
    """
    chosen = _canonical(name)
    if fallback is not None:
        fallback = _canonical(fallback)
    try:
        location, note = locate.find(chosen, None if root is None else Path(root).expanduser(), say or _silent)
        return Resolved(chosen, str(location), note)
    except DataError as error:
        if fallback is None or root is not None:
            raise
        try:
            location, note = locate.find(fallback, None, say or _silent)
        except DataError as second:
            raise DataError(
                f"{error.what}; nor its fallback: {second.what}", hint=error.hint or second.hint
            ) from second
        return Resolved(fallback, str(location), f"{note}; taken in place of {chosen}: {error.what}")


def resolve_once(
    name: str,
    root: str | Path | None = None,
    fallback: str | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Resolved:
    """`resolve`, asked once in a process: later calls give the first answer, however the network is by then.

    All stages of a run so read one data set, and what cannot be fetched is not asked for at every split.

    Args:
        name: As for `resolve`.
        root: As for `resolve`.
        fallback: As for `resolve`.
        say: Is told before something is downloaded.

    Raises:
        DataError: As for `resolve`; the next call tries again.
    """
    place = None if root is None else Path(root).expanduser().absolute()
    key = (name, place, fallback, cache.folder())
    known = _RESOLVED.get(key)
    if known is None or not Path(known.location).exists():
        known = _RESOLVED[key] = resolve(name, root, fallback, say=say)
    return known


def open_split(
    resolved: Resolved,
    split: str,
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    seed: int = 0,
    holdout: float = 0.0,
    workers: int | None = None,
) -> ImageSource:
    """Opens a split of a data set.

    Args:
        resolved: What `resolve` found.
        split: `train`, `select` (held out of train), `calibration` (from train), `eval`, or `labelled` (the labelled
            companion of an unlabelled set: 20 ImageNet photos for `photos`; else the same as `eval`).
        preprocessing: From picture to network input.
        limit: At most so many images.
        seed: Chooses which images of `train` and `calibration` a limit keeps; `eval` and `select` ignore it.
        holdout: Share of the training images, 0 to 1, that `train` and `calibration` leave to `select`.
        workers: Processes that decode image files; by the size of the set unless given. Images never depend on it.

    Raises:
        DataError: The split is unknown, empty or unreadable.
    """
    if split not in splits.SPLITS:
        raise DataError(
            f"unknown split '{split}' {nearest(split, splits.SPLITS)}".rstrip(),
            hint=f"splits are {', '.join(splits.SPLITS)}",
        )
    if not 0 <= holdout < 1:
        raise DataError(f"holdout is {holdout}, expected 0 <= x < 1")
    if limit is not None and limit < 1:
        raise DataError(f"{resolved.name}/{split}: a limit of {limit} images leaves none")
    if resolved.name == "photos" and split == "labelled":
        return open_split(resolve("imagenet_samples"), split, preprocessing, limit=limit, workers=workers)
    if split == "labelled" and resolved.name != "imagenet_samples":
        split = "eval"
    place = Path(resolved.location)
    if resolved.name in arrays.SETS:
        return arrays.open_source(resolved.name, place, split, preprocessing, limit=limit, seed=seed, holdout=holdout)
    return folders.open_source(
        resolved.name, place, split, preprocessing, limit=limit, seed=seed, holdout=holdout, workers=workers
    )


def _canonical(name: str) -> str:
    plain = name.strip().lower().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if plain not in NAMES:
        raise DataError(
            "; ".join(filter(None, [f"unknown data set '{name}'", nearest(plain, NAMES)])),
            hint=f"data sets are {', '.join(NAMES)}",
        )
    return plain


def _silent(text: str) -> None:
    """Says nothing."""
