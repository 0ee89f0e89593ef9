"""Stage 7: every exported file, run by its real runtime, against the torch model it came from."""

__all__ = ["run"]

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.data.sources import ImageSource
from pipeline.export import runtimes
from pipeline.recipe import Recipe
from pipeline.results.collect import FILE_SUFFIXES
from pipeline.results.schema import FileKind, VerifyRow
from pipeline.stages import StageContext, workbench
from pipeline.stages.export import MODELS

Logits = NDArray[np.float32]
_Batches = Callable[[], Iterable[NDArray[np.float32]]]
_LARGEST_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class _Predictions:
    """Logits of one model on the evaluation images and, if there are some, on the labelled ones."""

    evaluated: Logits
    labelled: Logits


def run(context: StageContext) -> dict[str, Any]:
    """Predicts the evaluation images with every file and judges agreement and accuracy by the recipe's thresholds."""
    recipe = context.recipe
    evaluation = workbench.split(recipe, "eval")
    labelled = evaluation if evaluation.labelled else workbench.labelled(recipe)
    labels = np.empty(0, dtype=np.int64) if labelled is None else _labels(labelled, recipe.verify.batch_size)
    evaluated_images = _batches(evaluation, recipe)
    labelled_images: _Batches | None = evaluated_images
    if labelled is not evaluation:
        labelled_images = None if labelled is None else _batches(labelled, recipe)
    kinds = [kind for kind in get_args(FileKind) if kind.split("_")[0] in recipe.export.formats]
    total = len(MODELS) * (1 + len(kinds))
    done = 0
    rows: list[VerifyRow] = []
    accuracy: dict[str, dict[str, float]] = {which: {} for which in MODELS}
    agreement: dict[str, dict[str, float]] = {which: {} for which in MODELS}
    original: Logits | None = None
    for which in MODELS:
        torch_logits: _Predictions | None = None
        for kind in ("torch", *kinds):
            context.report.progress(done, total, f"{which} {kind} on {len(evaluation)} images")
            logits = _predict(context, which, kind, evaluated_images, labelled_images)
            if torch_logits is None:
                torch_logits = logits
            if original is None:
                original = logits.evaluated
            agreement[which][kind] = _same(logits.evaluated, original)
            if len(labels):
                accuracy[which][kind] = float((logits.labelled.argmax(1) == labels).mean())
            if kind != "torch":
                rows.append(_judge(recipe, which, kind, logits, torch_logits, accuracy[which]))
            done += 1
    failed = [row for row in rows if not row.passed]
    return {
        "eval_images": len(evaluation),
        "labelled_images": len(labels),
        "accuracy": accuracy,
        "agreement": agreement,
        "files": [row.model_dump() for row in rows],
        "summary": f"{len(rows) - len(failed)} of {len(rows)} files predict as their torch model does",
    }


def _batches(source: ImageSource, recipe: Recipe) -> _Batches:
    """Network inputs in order, as often as asked; a set that fits in memory is decoded once for all ten models."""
    batch_size = recipe.verify.batch_size

    def fresh() -> Iterator[NDArray[np.float32]]:
        return (images.numpy() for images, _ in source.batches(batch_size))

    if len(source) * 3 * recipe.model.input_px**2 * 4 > _LARGEST_CACHE_BYTES:
        return fresh
    kept = list(fresh())
    return lambda: kept


def _predict(
    context: StageContext, which: str, kind: str, evaluation: _Batches, labelled: _Batches | None
) -> _Predictions:
    if kind == "torch":
        stage = "baseline" if which == "baseline" else "postfold"
        module = workbench.load_model(context, stage, f"models/{which}.pt")

        predict: Callable[[NDArray[np.float32]], Logits] = partial(_torch_predict, module)
    else:
        stage = "quantize" if kind.endswith("int8") else "export"
        file: FileKind = kind  # type: ignore[assignment]  # one of the four kinds by construction
        predict = runtimes.open_model(context.inputs[stage].file(f"models/{which}{FILE_SUFFIXES[file]}")).predict

    def over(batches: Iterable[NDArray[np.float32]]) -> Logits:
        return np.concatenate([predict(images) for images in batches])

    evaluated = over(evaluation())
    if labelled is None:
        return _Predictions(evaluated, evaluated[:0])
    return _Predictions(evaluated, evaluated if labelled is evaluation else over(labelled()))


def _torch_predict(module: nn.Module, images: NDArray[np.float32]) -> Logits:
    with torch.inference_mode():
        logits: Logits = module(torch.from_numpy(images)).numpy()
    return logits


def _judge(
    recipe: Recipe, which: str, kind: str, logits: _Predictions, reference: _Predictions, accuracy: Mapping[str, float]
) -> VerifyRow:
    section = recipe.verify
    difference = np.abs(logits.evaluated - reference.evaluated)
    same = _same(logits.evaluated, reference.evaluated)
    quantised = kind.endswith("int8")
    least = section.int8_min_agreement if quantised else section.fp32_min_agreement
    reasons = []
    if not np.isfinite(logits.evaluated).all():
        reasons.append("predicts NaN or infinity")
    if same < least:
        reasons.append(f"agrees with its torch model on {100 * same:.2f}% of the images, {100 * least:.2f}% asked")
    if quantised and accuracy:
        drop = 100 * (accuracy["torch"] - accuracy[kind])
        if drop > section.int8_max_drop_points:
            reasons.append(f"loses {drop:.2f} points against its torch model, {section.int8_max_drop_points:g} allowed")
    return VerifyRow.model_validate(
        {
            "model": which,
            "kind": kind,
            "images": len(logits.evaluated),
            "accuracy": accuracy.get(kind),
            "agreement": same,
            "max_abs_logit_error": float(np.nan_to_num(difference.max(), nan=float(np.finfo(np.float32).max))),
            "mean_abs_logit_error": float(np.nan_to_num(difference.mean(), nan=float(np.finfo(np.float32).max))),
            "passed": not reasons,
            "reason": "; ".join(reasons),
        }
    )


def _labels(source: ImageSource, batch_size: int) -> NDArray[np.int64]:
    return np.concatenate([labels.numpy() for _, labels in source.batches(batch_size)])


def _same(one: Logits, other: Logits) -> float:
    return float((one.argmax(1) == other.argmax(1)).mean())
