"""Stage 7: every exported file, run by its real runtime, against the torch model it came from."""

__all__ = ["run"]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.data.sources import ImageSource
from pipeline.errors import ExportError, VerifyError
from pipeline.export import runtimes
from pipeline.export.conversion import file_name
from pipeline.export.verify import FileReport, Labelled, Thresholds, judge, names_of, second_opinion
from pipeline.recipe import Recipe
from pipeline.results.schema import FileKind, OpinionRow, VerifyRow, WorstImageRow
from pipeline.stages import StageContext, workbench
from pipeline.stages.export import MODELS

Logits = NDArray[np.float32]
_Batches = Callable[[], Iterable[NDArray[np.float32]]]
_LARGEST_CACHE_BYTES = 1 << 30
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Predictions:
    """Logits of one model on the evaluation images and, if there are some, on the labelled ones."""

    evaluated: Logits
    labelled: Logits


@dataclass
class _Images:
    """The images that every model is shown, and how far the stage has come with all of them."""

    recipe: Recipe
    source: ImageSource
    labelled: ImageSource | None
    report: Callable[[float, float, str], None]
    models: int
    done: int = 0

    def __post_init__(self) -> None:
        self.evaluation = _batches(self.source, self.recipe)
        self.separate = None if self.labelled in (None, self.source) else _batches(self.labelled, self.recipe)
        self.total = self.models * len(self.source)

    def predict(self, predict: Callable[[NDArray[np.float32]], Logits], label: str) -> _Predictions:
        """Runs a model over all of them, batch by batch."""
        evaluated = []
        for images in self.evaluation():
            self.report(self.done, self.total, f"{label} on {len(self.source)} images")
            evaluated.append(predict(images))
            self.done += len(images)
        if not evaluated:
            raise VerifyError(f"{self.source.name} holds no readable images", hint="point the eval split at images")
        logits = np.concatenate(evaluated)
        if self.separate is not None:
            return _Predictions(logits, np.concatenate([predict(images) for images in self.separate()]))
        return _Predictions(logits, logits if self.labelled is not None else logits[:0])

    def skip(self, models: int) -> None:
        """Leaves out what is left of models that cannot be run."""
        whole = len(self.source)
        self.done = min((self.done // whole + models) * whole, self.total)


def run(context: StageContext) -> dict[str, Any]:
    """Predicts the evaluation images with every file and judges it by the recipe's thresholds.

    A file that fails, or that its runtime cannot open or run, becomes a failed row: the stage ends well, the files
    stay, and the run exits with 1.

    Raises:
        VerifyError: There are no images, or a torch model itself predicts something that is not finite.
    """
    recipe = context.recipe
    evaluation = workbench.split(recipe, "eval")
    labelled = evaluation if evaluation.labelled else workbench.labelled(recipe)
    labels = np.empty(0, dtype=np.int64) if labelled is None else _labels(labelled, recipe.verify.batch_size)
    kinds = _kinds(recipe)
    twice = [kind for kind in kinds if recipe.verify.tensorflow and _form(kind) == "tflite"]
    runs = len(MODELS) * (1 + len(kinds) + len(twice))
    images = _Images(recipe, evaluation, labelled, context.report.progress, runs)
    rows: list[VerifyRow] = []
    opinions: list[OpinionRow] = []
    accuracy: dict[str, dict[str, float]] = {which: {} for which in MODELS}
    agreement: dict[str, dict[str, float]] = {which: {} for which in MODELS}
    original: Logits | None = None
    for which in MODELS:
        stage = "baseline" if which == "baseline" else "postfold"
        module = workbench.load_model(context, stage, f"models/{which}.pt")
        reference = images.predict(partial(_torch_predict, module), f"{which} torch")
        if not np.isfinite(reference.evaluated).all():
            raise VerifyError(f"the {which} network itself predicts NaN or infinity", hint="lower the learning rate")
        original = reference.evaluated if original is None else original
        predicted: dict[FileKind, _Predictions] = {}
        by_tensorflow: dict[FileKind, _Predictions] = {}
        for kind in kinds:
            path = _file(context, which, kind)
            try:
                predicted[kind] = images.predict(runtimes.open_model(path).predict, f"{which} {kind}")
            except ExportError as error:
                if isinstance(error.__cause__, ImportError):  # the fault of the installation, not of the file
                    raise
                rows.append(_broken_row(which, kind, error.what))
                images.skip(2 if kind in twice else 1)
                continue
            if kind in twice:
                again = runtimes.open_model(path, tensorflow=True)
                by_tensorflow[kind] = images.predict(again.predict, f"{which} {kind} by TensorFlow")
        names = names_of(evaluation, len(reference.evaluated))
        for kind, logits in predicted.items():
            truth = Labelled(logits.labelled, reference.labelled, labels)
            limits = _limits(recipe, _precision(kind))
            found = judge(
                file_name(which, _precision(kind), _form(kind)),
                logits.evaluated,
                reference.evaluated,
                truth,
                names=names,
                limits=limits,
                worst=recipe.verify.worst_images,
            )
            rows.append(_row(which, kind, found))
        opinions += _opinions(recipe, which, predicted, by_tensorflow)
        for name, some in (("torch", reference), *predicted.items()):
            agreement[which][name] = float((some.evaluated.argmax(1) == original.argmax(1)).mean())
            if len(labels):
                accuracy[which][name] = float((some.labelled.argmax(1) == labels).mean())
    failed = [row.passed for row in rows].count(False) + [row.passed for row in opinions].count(False)
    return {
        "eval_images": len(evaluation),
        "labelled_images": len(labels),
        "accuracy": accuracy,
        "agreement": agreement,
        "files": [row.model_dump() for row in rows],
        "opinions": [row.model_dump() for row in opinions],
        "summary": f"{len(rows)} files against their torch models, {len(opinions)} against each other: "
        + (f"{failed} checks failed" if failed else "all passed"),
    }


def _kinds(recipe: Recipe) -> list[FileKind]:
    precisions = ("fp32", "int8", *recipe.export.precisions)
    kinds: tuple[FileKind, ...] = get_args(FileKind)
    return [kind for kind in kinds if _form(kind) in recipe.export.formats and _precision(kind) in precisions]


def _file(context: StageContext, which: str, kind: FileKind) -> Path:
    parent = context.inputs["quantize" if _precision(kind) == "int8" else "export"]
    return parent.file(f"models/{file_name(which, _precision(kind), _form(kind))}")


def _form(kind: FileKind) -> str:
    return kind.split("_")[0]


def _precision(kind: FileKind) -> str:
    return kind.split("_")[1]


def _limits(recipe: Recipe, precision: str) -> Thresholds:
    section = recipe.verify
    if precision == "fp32":
        return Thresholds(section.fp32_min_agreement, None, section.fp32_max_relative_error)
    if precision == "fp16":
        return Thresholds(section.fp16_min_agreement)
    return Thresholds(section.int8_min_agreement, section.int8_max_drop_points)


def _row(which: str, kind: FileKind, found: FileReport) -> VerifyRow:
    return VerifyRow.model_validate(
        {
            "model": which,
            "kind": kind,
            "images": found.images,
            "accuracy": found.top1,
            "top5": found.top5,
            "agreement": found.agreement,
            "max_abs_logit_error": found.max_abs_error,
            "mean_abs_logit_error": found.mean_abs_error,
            "relative_error": min(found.relative_error, _LARGEST),
            "worst": [WorstImageRow.model_validate(asdict(image)) for image in found.worst],
            "passed": found.passed,
            "reason": "; ".join(found.reasons),
        }
    )


def _broken_row(which: str, kind: FileKind, reason: str) -> VerifyRow:
    """The row of a file that answers nothing: it agrees on no image, and its logits are as far away as can be."""
    return VerifyRow.model_validate(
        {
            "model": which,
            "kind": kind,
            "images": 0,
            "accuracy": None,
            "agreement": 0.0,
            "max_abs_logit_error": _LARGEST,
            "mean_abs_logit_error": _LARGEST,
            "relative_error": _LARGEST,
            "passed": False,
            "reason": f"cannot be run: {reason}",
        }
    )


def _opinions(
    recipe: Recipe, which: str, predicted: dict[FileKind, _Predictions], by_tensorflow: dict[FileKind, _Predictions]
) -> list[OpinionRow]:
    """What files of two formats and one precision think of each other, and two interpreters of one file."""
    pairs = [(a, b, predicted[b]) for a, b in combinations(predicted, 2) if _precision(a) == _precision(b)]
    seconds = [(kind, "tensorflow", logits) for kind, logits in by_tensorflow.items()]
    least = recipe.verify.second_opinion_min_agreement
    rows = []
    for one, other, logits in (*pairs, *seconds):
        found = second_opinion(one, predicted[one].evaluated, other, logits.evaluated)
        passed = found.agreement >= least
        asked = f"they agree on {100 * found.agreement:.2f}% of the images, {100 * least:.2f}% asked"
        row = {"model": which, "first": one, "second": other, "agreement": found.agreement, "passed": passed,
               "max_abs_logit_difference": found.max_abs_error, "reason": "" if passed else asked}  # fmt: skip
        rows.append(OpinionRow.model_validate(row))
    return rows


def _batches(source: ImageSource | None, recipe: Recipe) -> _Batches:
    """Network inputs in order, as often as asked; a set that fits in memory is decoded once for all models."""
    assert source is not None
    batch_size = recipe.verify.batch_size

    def fresh() -> Iterator[NDArray[np.float32]]:
        return (images.numpy() for images, _ in source.batches(batch_size))

    if len(source) * 3 * recipe.model.input_px**2 * 4 > _LARGEST_CACHE_BYTES:
        return fresh
    kept = list(fresh())
    return lambda: kept


def _torch_predict(module: nn.Module, images: NDArray[np.float32]) -> Logits:
    with torch.inference_mode():
        logits: Logits = module(torch.from_numpy(images)).numpy()
    return logits


def _labels(source: ImageSource, batch_size: int) -> NDArray[np.int64]:
    return np.concatenate([labels.numpy() for _, labels in source.batches(batch_size)])
