"""What several stages set up alike from a recipe: preprocessing, data splits, device, fine-tuning."""

__all__ = [
    "count",
    "device",
    "example",
    "file_metadata",
    "fine_tune",
    "labelled",
    "load_model",
    "model_meta",
    "preprocessing",
    "save_model",
    "score",
    "split",
    "summary",
]

from pathlib import Path
from typing import Any

import torch
from torch import nn

import pipeline
from pipeline.alpha import AlphaSchedule
from pipeline.data import datasets
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.errors import RecipeError
from pipeline.folding import counters
from pipeline.models import store
from pipeline.recipe import DistillSection, Recipe, TrainSection
from pipeline.stages import StageContext
from pipeline.training.evaluate import Evaluation, evaluate
from pipeline.training.loop import FitConfig, FitResult, Progress, fit


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


def split(recipe: Recipe, name: str, *, limit: int | None = None) -> ImageSource:
    """Opens a split of the data set that is there (the recipe's, or its fallback).

    Args:
        recipe: Says which data set, and how many images `train` and `eval` may hold.
        name: `train`, `calibration` or `eval`.
        limit: At most so many images; the recipe's limit unless given.
    """
    limits = {"train": recipe.data.train_images, "eval": recipe.data.eval_images}
    resolved = datasets.resolve(recipe.data.name, recipe.data.root, recipe.data.fallback)
    source = datasets.open_split(
        resolved, name, preprocessing(recipe), limit=limit or limits.get(name), seed=recipe.seed
    )
    if source.num_classes is not None and source.num_classes != recipe.model.num_classes:
        raise RecipeError(
            f"model.num_classes is {recipe.model.num_classes}, but {source.name} has {source.num_classes} classes",
            hint=f"set model.num_classes to {source.num_classes}, or data.root to the matching folder",
        )
    return source


def labelled(recipe: Recipe) -> ImageSource | None:
    """The recipe's second, labelled set, or None."""
    name = recipe.data.labelled
    if name is None:
        return None
    return datasets.open_split(datasets.resolve(name, None, None), "labelled", preprocessing(recipe))


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


def file_metadata(context: StageContext, which: str, units_folded: list[str]) -> dict[str, Any]:
    """What is written into an exported file: preprocessing, fold list, origin of the weights, versions."""
    baseline = context.inputs["baseline"]
    return {
        **model_meta(context.recipe),
        "model": which,
        "units_folded": units_folded,
        "layerfold": pipeline.__version__,
        "seed": context.recipe.seed,
        "weights": baseline.metrics["weights_origin"],
        "baseline_hash": baseline.manifest["hash"],
    }


def save_model(context: StageContext, name: str, module: nn.Module, **extra: Any) -> None:
    """Writes a model into the stage's folder."""
    path = context.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    store.save(path, module, model_meta(context.recipe, **extra))


def load_model(context: StageContext, stage: str, name: str) -> nn.Module:
    """Reads a model that a parent stage wrote."""
    return store.load(context.inputs[stage].file(name)).module


def fine_tune(
    context: StageContext,
    model: nn.Module,
    section: TrainSection,
    *,
    distill: DistillSection | None = None,
    teacher: nn.Module | None = None,
    alpha: AlphaSchedule | None = None,
) -> FitResult:
    """Fine-tunes a model in place as a recipe's section says, resuming where an earlier try was stopped."""
    recipe = context.recipe
    source = split(recipe, "train")
    if not source.labelled and (distill is None or distill.weight < 1):
        raise RecipeError(
            f"{source.name} has no labels, so {context.stage.name} can only learn from the baseline",
            hint=f"set {context.stage.name}.distill.weight=1",
        )
    if section.epochs * source.steps(section.batch_size, train=True) < 1:
        raise RecipeError(
            f"{context.stage.name}.train: {len(source)} images in batches of {section.batch_size} for "
            f"{section.epochs} epochs are less than one step",
            hint=f"lower {context.stage.name}.train.batch_size or raise data.train_images",
        )
    config = _fit_config(recipe, section, distill)

    def on_progress(progress: Progress) -> None:
        context.report.progress(progress.step, progress.total_steps, _progress_text(progress))

    return fit(
        model,
        source,
        config,
        teacher=teacher if distill is not None else None,
        checkpoint_dir=Path(context.checkpoints),
        on_progress=on_progress,
        alpha=alpha,
        device=device(recipe),
    )


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


def _fit_config(recipe: Recipe, section: TrainSection, distill: DistillSection | None) -> FitConfig:
    return FitConfig(
        epochs=section.epochs,
        batch_size=section.batch_size,
        lr=section.lr,
        optimiser=section.optimiser,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
        warmup_epochs=section.warmup_epochs,
        label_smoothing=section.label_smoothing,
        ema_decay=section.ema_decay,
        grad_clip=section.grad_clip_norm,
        freeze_bn=section.freeze_bn,
        channels_last=section.channels_last,
        amp=section.amp,
        checkpoint_every_s=section.checkpoint_every_s,
        distill_weight=0.0 if distill is None else distill.weight,
        distill_temperature=1.0 if distill is None else distill.temperature,
        seed=recipe.seed,
    )


def _progress_text(progress: Progress) -> str:
    return f"epoch {progress.epoch + 1}, loss {progress.loss:.3f}"
