"""What several stages set up alike from a recipe: preprocessing, data splits, device, models, scores."""

__all__ = [
    "class_names",
    "count",
    "device",
    "example",
    "labelled",
    "load_model",
    "model_meta",
    "preprocessing",
    "provenance",
    "save_model",
    "score",
    "split",
    "summary",
]

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.data import datasets
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.errors import RecipeError
from pipeline.folding import counters
from pipeline.models import store
from pipeline.models.labels import imagenet_labels
from pipeline.recipe import Recipe
from pipeline.stages import StageContext
from pipeline.training.evaluate import Evaluation, evaluate

_IMAGENET_CLASSES = 1000


def preprocessing(recipe: Recipe) -> Preprocessing:
    """The run's one preprocessing spec."""
    section = recipe.preprocess
    return Preprocessing(
        input_px=recipe.model.input_px,
        mean=section.mean,
        std=section.std,
        crop_fraction=section.crop_fraction,
        interpolation=section.interpolation,
    )


def split(recipe: Recipe, name: str, *, limit: int | None = None, holdout: float = 0.0) -> ImageSource:
    """Opens a split of the data set that is there (the recipe's, or its fallback).

    Args:
        recipe: Says which data set, and how many images `train` and `eval` may hold.
        name: `train`, `select` (held out of train), `calibration` or `eval`.
        limit: At most so many images; the recipe's limit unless given.
        holdout: Share of the training images that `train` leaves to `select`.
    """
    limits = {"train": recipe.data.train_images, "eval": recipe.data.eval_images}
    source = datasets.open_split(
        _data(recipe), name, preprocessing(recipe), limit=limit or limits.get(name), seed=recipe.seed, holdout=holdout
    )
    if source.num_classes is not None and source.num_classes != recipe.model.num_classes:
        raise RecipeError(
            f"model.num_classes is {recipe.model.num_classes}, but {source.name} has {source.num_classes} classes",
            hint=f"set model.num_classes to {source.num_classes}, or data.root to the matching folder",
        )
    return source


def _data(recipe: Recipe) -> datasets.Resolved:
    return datasets.resolve_once(recipe.data.name, recipe.data.root, recipe.data.fallback)


def labelled(recipe: Recipe) -> ImageSource | None:
    """The recipe's second, labelled set, or None."""
    name = recipe.data.labelled
    if name is None:
        return None
    return datasets.open_split(datasets.resolve_once(name), "labelled", preprocessing(recipe))


def example(recipe: Recipe) -> torch.Tensor:
    """A network input of zeros, Tensor[1, in_channels, input_px, input_px], for tracing and counting."""
    section = recipe.model
    return torch.zeros(1, section.in_channels, section.input_px, section.input_px)


def device(recipe: Recipe) -> torch.device:
    """The device to train on: `auto` takes CUDA where there is one."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda', but PyTorch sees no CUDA device", hint="set device to auto or cpu")
    wants_cuda = recipe.device in ("auto", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if wants_cuda else "cpu")


def model_meta(recipe: Recipe, **extra: Any) -> dict[str, Any]:
    """What is kept beside a model in its file."""
    return {
        "name": recipe.model.name,
        "num_classes": recipe.model.num_classes,
        "input_px": recipe.model.input_px,
        "preprocess": preprocessing(recipe).as_dict(),
        "recipe": recipe.name,
        **extra,
    }


def class_names(recipe: Recipe, origin: Mapping[str, Any]) -> list[str]:
    """The classes' names in the order of the logits; empty where nobody says them.

    Args:
        recipe: Says which data set and how many classes.
        origin: `WeightsOrigin.as_dict` of the baseline's weights.
    """
    source = split(recipe, "eval")
    if len(source.class_names) == recipe.model.num_classes:
        return list(source.class_names)
    if source.labelled and not source.class_names:  # sets of digits: the numbers are the names
        return [str(index) for index in range(recipe.model.num_classes)]
    published = origin.get("source") in ("packaged", "hub") and recipe.baseline.train is None
    return imagenet_labels() if published and recipe.model.num_classes == _IMAGENET_CLASSES else []


def provenance(context: StageContext, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model comes from, kept in its `.pt` file so that `layerfold export` can pass it on.

    Args:
        context: The stage that writes the model.
        origin: `WeightsOrigin.as_dict` of the baseline's weights.
    """
    recipe = context.recipe
    return {
        "labels": class_names(recipe, origin),
        "weights": dict(origin),
        "licence": origin.get("licence") or "not stated by the source of the weights",
        "seed": recipe.seed,
        "recipe_hash": context.stage.hash,
        # The set that was really there: another one, though asked for, is not what the model knows.
        "data": {"name": _data(recipe).name, "root": recipe.data.root, "fallback": None},
    }


def save_model(context: StageContext, name: str, module: nn.Module, **extra: Any) -> None:
    """Writes a model into the stage's folder."""
    path = context.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    store.save(path, module, model_meta(context.recipe, **extra))


def load_model(context: StageContext, stage: str, name: str) -> nn.Module:
    """Reads a model that a parent stage wrote."""
    return store.load(context.inputs[stage].file(name)).module


def score(context: StageContext, model: nn.Module, *, teacher: nn.Module | None = None) -> Evaluation:
    """Evaluates a model on the evaluation split: accuracy where it has labels, agreement where there is a teacher."""
    recipe = context.recipe
    source = split(recipe, "eval")
    context.report.progress(0, 1, f"evaluating on {len(source)} images")
    return evaluate(model, source, batch_size=recipe.verify.batch_size, teacher=teacher, device=device(recipe))


def summary(evaluation: Evaluation) -> str:
    """One line for the terminal."""
    parts = []
    if evaluation.top1 is not None:
        parts.append(f"top-1 {100 * evaluation.top1:.2f}%")
    if evaluation.agreement is not None:
        parts.append(f"agreement with the baseline {100 * evaluation.agreement:.2f}%")
    return f"{', '.join(parts)} on {evaluation.count} images" if parts else f"{evaluation.count} images, no labels"


def count(recipe: Recipe, model: nn.Module) -> dict[str, int]:
    """Parameters, MACs of one image, and depth (non-linear layers)."""
    counts = counters.count(model, example(recipe))
    return {"params": counts.params, "macs": counts.macs, "depth": counts.depth}
