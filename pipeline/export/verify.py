"""Runs exported files over a data set with their real runtimes and judges them against the network they came from."""

__all__ = [
    "FileReport",
    "Labelled",
    "Opinion",
    "Thresholds",
    "Verification",
    "WorstImage",
    "judge",
    "names_of",
    "second_opinion",
    "verify",
]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.errors import VerifyError
from pipeline.export.runtimes import Predictor, open_model

if TYPE_CHECKING:
    from pipeline.data.sources import ImageSource

Logits = npt.NDArray[np.float32]
# JSON has no NaN: a difference that is not a number counts as the largest there is.
_NOT_A_NUMBER = float(np.finfo(np.float32).max)
Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Thresholds:
    """What a file must keep.

    Attributes:
        min_agreement: Least share of images, 0 to 1, for which file and network name the same class.
        max_drop_points: Largest loss of top-1 accuracy against the network, in percentage points; not judged
            where there are no labels.
        max_relative_error: Largest logit difference over the largest logit; not judged when None.
    """

    min_agreement: float = 0.995
    max_drop_points: float | None = None
    max_relative_error: float | None = None

    @classmethod
    def float32(cls) -> "Thresholds":
        """For float32 files: rounding only."""
        return cls(min_agreement=0.995, max_drop_points=0.5, max_relative_error=1e-4)


@dataclass(frozen=True)
class Labelled:
    """Predictions on images whose classes are known.

    Attributes:
        logits, reference: Of the file and of the network, [n, classes].
        labels: Classes, [n]; those of -1 are left out.
    """

    logits: Logits
    reference: Logits
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class WorstImage:
    """An image on which file and network differ most."""

    index: int
    name: str
    max_abs_error: float
    network_class: int
    file_class: int


@dataclass(frozen=True)
class FileReport:
    """How one file did.

    Attributes:
        file: Its name.
        images: Images compared.
        top1, top5: Its accuracy, 0 to 1; None without labels (top5 also with fewer than six classes).
        network_top1: The network's accuracy on the same images.
        agreement: Share of images for which both name the same class.
        max_abs_error, mean_abs_error: Over all logits.
        relative_error: `max_abs_error` over the network's largest absolute logit.
        worst: The images with the largest logit errors, worst first.
        reasons: Which thresholds it breaks; empty when it passes.
    """

    file: str
    images: int
    top1: float | None
    top5: float | None
    network_top1: float | None
    agreement: float
    max_abs_error: float
    mean_abs_error: float
    relative_error: float
    worst: tuple[WorstImage, ...]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the file keeps what it must."""
        return not self.reasons


@dataclass(frozen=True)
class Opinion:
    """Two files of one network, compared with each other."""

    first: str
    second: str
    agreement: float
    max_abs_error: float


@dataclass(frozen=True)
class Verification:
    """The verdict on a set of files."""

    reports: tuple[FileReport, ...]
    opinions: tuple[Opinion, ...]

    @property
    def passed(self) -> bool:
        """Whether every file passed."""
        return all(report.passed for report in self.reports)

    def require(self) -> None:
        """Raises VerifyError with every broken threshold; the files stay where they are, for inspection."""
        broken = [f"{report.file}: {reason}" for report in self.reports for reason in report.reasons]
        if broken:
            raise VerifyError(
                "; ".join(broken), hint="inspect the file, or loosen verify's thresholds if the loss is meant"
            )

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON-ready values."""
        return {**asdict(self), "passed": self.passed}


def verify(
    files: Sequence[Path | str],
    network: nn.Module,
    source: "ImageSource",
    *,
    thresholds: Mapping[str, Thresholds] | None = None,
    batch_size: int = 64,
    threads: int = 2,
    worst: int = 5,
    say: Say | None = None,
) -> Verification:
    """Compares every file with the network, and the files with each other, over a whole split.

    Args:
        files: `.tflite` and `.onnx` files of one network.
        network: That network, float32; run on the CPU in eval mode.
        source: The evaluation split; labels are used where it has them.
        thresholds: By file name; files left out get `Thresholds.float32()`, or, with ``int8``, ``dynamic`` or
            ``fp16`` in their name, an agreement of 0.9 alone.
        batch_size: Images read at a time.
        threads: Threads of each runtime.
        worst: How many worst images to name.
        say: Told (images done, images in all, what is running).

    Raises:
        VerifyError: There are no images, or the network itself predicts something that is not finite.
        ExportError: A file cannot be opened.
    """
    paths = [Path(file) for file in files]
    predictors = [open_model(path, threads=threads) for path in paths]
    torch_logits, file_logits, labels = _predict_all(network, predictors, source, batch_size, say)
    if not np.isfinite(torch_logits).all():
        raise VerifyError("the network itself predicts NaN or infinity", hint="its weights are damaged")
    names = names_of(source, len(torch_logits))
    given = thresholds or {}
    reports = tuple(
        judge(
            path.name,
            logits,
            torch_logits,
            Labelled(logits, torch_logits, labels),
            names=names,
            limits=given.get(path.name) or _usual(path),
            worst=worst,
        )
        for path, logits in zip(paths, file_logits, strict=True)
    )
    opinions = tuple(
        second_opinion(paths[i].name, file_logits[i], paths[j].name, file_logits[j])
        for i in range(len(paths))
        for j in range(i + 1, len(paths))
        if paths[i].suffix != paths[j].suffix and _precision(paths[i]) == _precision(paths[j])
    )
    return Verification(reports, opinions)


def _predict_all(
    network: nn.Module, predictors: list[Predictor], source: "ImageSource", batch_size: int, say: Say | None
) -> tuple[Logits, list[Logits], npt.NDArray[np.int64]]:
    was_training = network.training
    network.eval()
    theirs: list[Logits] = []
    ours: list[list[Logits]] = [[] for _ in predictors]
    labels: list[npt.NDArray[np.int64]] = []
    done = 0
    try:
        for images, truth in source.batches(batch_size):
            with torch.inference_mode():
                theirs.append(network(images).numpy())
            batch = images.numpy()
            for logits, predictor in zip(ours, predictors, strict=True):
                logits.append(predictor.predict(batch))
            labels.append(truth.numpy())
            done += len(batch)
            if say:
                say(done, len(source), source.name)
    finally:
        network.train(was_training)
    if not theirs:
        raise VerifyError(f"{source.name} holds no images", hint="point the recipe's eval split at images")
    return np.concatenate(theirs), [np.concatenate(logits) for logits in ours], np.concatenate(labels)


def names_of(source: "ImageSource", count: int) -> list[str]:
    """The name of every image that was predicted, of `count`: those that could not be decoded were left out."""
    unreadable = getattr(source, "unreadable", {})
    read = [i for i in range(len(source)) if source.paths(i) is None or source.paths(i) not in unreadable]
    return [source.describe(i) for i in read[:count]]


def second_opinion(first: str, first_logits: Logits, second: str, second_logits: Logits) -> Opinion:
    """Compares the predictions of two files of one network on the same images."""
    error = _largest(np.abs(first_logits - second_logits))
    return Opinion(first, second, _agreement(first_logits, second_logits), error)


def judge(
    file: str,
    logits: Logits,
    reference: Logits,
    labelled: Labelled,
    *,
    names: Sequence[str],
    limits: Thresholds,
    worst: int = 5,
) -> FileReport:
    """Holds a file's predictions against its network's.

    Args:
        file: The file's name.
        logits: The file's predictions of the evaluation images, [N, classes].
        reference: The network's predictions of the same images.
        labelled: Predictions that accuracy is taken from; the same images, or a labelled set of its own.
        names: The evaluation images' names.
        limits: What the file must keep.
        worst: How many worst images to name.
    """
    error = np.abs(logits - reference)
    per_image = np.nan_to_num(error.max(axis=1), nan=_NOT_A_NUMBER)
    known = labelled.labels >= 0
    top1 = _accuracy(labelled.logits[known], labelled.labels[known], 1)
    network_top1 = _accuracy(labelled.reference[known], labelled.labels[known], 1)
    agreement = _agreement(logits, reference)
    relative = _largest(error) / max(float(np.abs(reference).max()), 1e-12)
    reasons = []
    if not np.isfinite(logits).all():
        reasons.append("predicts NaN or infinity")
    if agreement < limits.min_agreement:
        asked = f"{100 * limits.min_agreement:.2f}% asked"
        reasons.append(f"names the network's class on {100 * agreement:.2f}% of the images, {asked}")
    if limits.max_relative_error is not None and not relative <= limits.max_relative_error:
        reasons.append(f"logits differ by {relative:.2g} of the largest, {limits.max_relative_error:g} allowed")
    if limits.max_drop_points is not None and top1 is not None and network_top1 is not None:
        drop = 100 * (network_top1 - top1)
        if drop > limits.max_drop_points:
            reasons.append(f"loses {drop:.2f} points of top-1, {limits.max_drop_points:g} allowed")
    order = np.argsort(-per_image, kind="stable")[:worst]
    return FileReport(
        file,
        len(logits),
        top1,
        _accuracy(labelled.logits[known], labelled.labels[known], 5) if logits.shape[1] > 5 else None,
        network_top1,
        agreement,
        _largest(error),
        float(np.nan_to_num(error, nan=_NOT_A_NUMBER).mean(dtype=np.float64)),
        relative,
        tuple(
            WorstImage(int(i), names[i], float(per_image[i]), int(reference[i].argmax()), int(logits[i].argmax()))
            for i in order
        ),
        tuple(reasons),
    )


def _usual(path: Path) -> Thresholds:
    return Thresholds.float32() if _precision(path) == "fp32" else Thresholds(min_agreement=0.9)


def _precision(path: Path) -> str:
    return next((name for name in ("int8", "dynamic", "fp16") if name in path.name.split(".")), "fp32")


def _accuracy(logits: Logits, labels: npt.NDArray[np.int64], k: int) -> float | None:
    if not len(labels):
        return None
    # Int8 logits tie often: the first class wins, as argmax decides it wherever a class is named.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k] if k > 1 else logits.argmax(axis=1)[:, None]
    return float((best == labels[:, None]).any(axis=1).mean())


def _agreement(one: Logits, other: Logits) -> float:
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def _largest(error: Logits) -> float:
    return float(np.nan_to_num(error, nan=_NOT_A_NUMBER).max())
