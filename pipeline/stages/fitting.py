"""Fine-tuning as a recipe's section says: data, augmentation, teacher, curves and checkpoints of one stage."""

__all__ = ["check", "check_features", "epochs", "fine_tune"]

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline.alpha import AlphaSchedule, is_activation
from pipeline.data.sources import ImageSource
from pipeline.errors import RecipeError, nearest
from pipeline.folding.units import Unit, find_units
from pipeline.recipe import DistillSection, Recipe, TrainSection
from pipeline.stages import StageContext, workbench
from pipeline.training.augment import RandAugmented
from pipeline.training.loop import FitConfig, FitResult, Progress, fit
from pipeline.training.scalars import TensorBoardLog

_CURVES = "tensorboard"


def fine_tune(
    context: StageContext,
    model: nn.Module,
    section: TrainSection,
    *,
    distill: DistillSection | None = None,
    teacher: nn.Module | None = None,
    alpha: AlphaSchedule | None = None,
    units: Sequence[str] = (),
) -> FitResult:
    """Fine-tunes a model in place as a recipe's section says, resuming where an earlier try was stopped.

    Loss, rate, throughput, α and evaluations are written for TensorBoard to the stage's folder `tensorboard`.

    Args:
        context: The stage at work.
        model: The network to train.
        section: How.
        distill: How much to learn from the teacher.
        teacher: The baseline.
        alpha: How α is driven; None without α.
        units: What `distill.features: units` means: modules of the network and of its teacher.

    Raises:
        RecipeError: There are no labels, or too few images, for what the section asks.
    """
    recipe, stage = context.recipe, context.stage.name
    held_out: ImageSource | None = None
    if section.patience is None:
        source = workbench.split(recipe, "train")
    else:
        source = workbench.split(recipe, "train", holdout=section.holdout)
        held_out = workbench.split(recipe, "select", holdout=section.holdout)
    check(stage, source, section, distill)
    if section.randaugment is not None:
        source = RandAugmented(source, workbench.preprocessing(recipe), section.randaugment)

    def on_progress(progress: Progress) -> None:
        context.report.progress(progress.step, progress.total_steps, _text(progress))
        if progress.note:
            context.report.say(progress.note)

    with TensorBoardLog(context.work / _CURVES, on_progress) as log:
        return log.finish(
            fit(
                model,
                source,
                replace(_config(recipe, section, distill, units), epochs=epochs(section, source)),
                evaluate=held_out,
                teacher=teacher if distill is not None else None,
                checkpoint_dir=Path(context.checkpoints),
                on_progress=log,
                alpha=alpha,
                device=workbench.device(recipe),
            )
        )


def check_features(recipe: Recipe, model: nn.Module, units: Sequence[Unit]) -> None:
    """Finds feature distillation that has nothing to read, before anything is trained.

    Args:
        recipe: The checked recipe.
        model: The baseline, with weights or without.
        units: The candidates of pre-folding.

    Raises:
        RecipeError: `features: units` meets units that are activations, or a name is no module of the network.
    """
    known = [name for name, _ in model.named_modules() if name]
    for stage, section in (("prefold", recipe.prefold), ("postfold", recipe.postfold)):
        features = section.distill.features if section.distill is not None and section.train is not None else "none"
        if features == "units":
            bare = [unit.name for unit in (units if stage == "prefold" else find_units(model))]
            bare = [name for name in bare if is_activation(model.get_submodule(name))]
            if bare:
                raise RecipeError(
                    f"{stage}.distill.features is 'units', but unit '{bare[0]}' is an activation: it has no output "
                    "to keep, since it is what goes",
                    hint=f"name modules behind it in {stage}.distill.features, or set it to none",
                )
        elif features != "none":
            for name in features:
                if name not in known:
                    raise RecipeError(
                        f"{stage}.distill.features: model '{recipe.model.name}' has no module '{name}'",
                        hint=nearest(name, known) or "name modules of the baseline",
                    )


def check(stage: str, source: ImageSource, section: TrainSection, distill: DistillSection | None) -> None:
    """Refuses what the training images cannot give.

    Args:
        stage: Names the recipe's section in errors.
        source: The training images.
        section: How they are trained on.
        distill: How much is learned from the baseline.

    Raises:
        RecipeError: There are no labels, or too few images, for what the section asks.
    """
    if not source.labelled and stage == "baseline":
        raise RecipeError(
            f"{source.name} has no labels, so baseline.train has nothing to learn from",
            hint="leave baseline.train out and take pretrained weights (model.weights), or give labelled data",
        )
    if not source.labelled and (distill is None or distill.weight < 1):
        raise RecipeError(
            f"{source.name} has no labels, so {stage} can only learn from the baseline",
            hint=f"set {stage}.distill.weight=1",
        )
    if not source.labelled and (section.mixup or section.cutmix):
        raise RecipeError(
            f"{source.name} has no labels, which {stage}.train.mixup and cutmix would blend", hint="set both to 0"
        )
    if epochs(section, source) * source.steps(section.batch_size, train=True) < 1:
        raise RecipeError(
            f"{stage}.train: {len(source)} images in batches of {section.batch_size} for "
            f"{section.epochs} epochs are less than one step",
            hint=f"lower {stage}.train.batch_size or raise data.train_images",
        )


def epochs(section: TrainSection, source: ImageSource) -> float:
    """Passes over the training images: as many as the section says, or as its least number of steps takes."""
    steps = source.steps(section.batch_size, train=True)
    return max(section.epochs, (section.min_steps or 0) / steps) if steps else section.epochs


def _config(recipe: Recipe, section: TrainSection, distill: DistillSection | None, units: Sequence[str]) -> FitConfig:
    features: tuple[str, ...] = ()
    if distill is not None and distill.features != "none":
        features = tuple(units) if distill.features == "units" else tuple(distill.features)
    return FitConfig(
        epochs=section.epochs,
        batch_size=section.batch_size,
        accumulate=section.accumulate,
        lr=section.lr,
        optimiser=section.optimiser,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
        warmup_epochs=section.warmup_epochs,
        label_smoothing=section.label_smoothing,
        mixup=section.mixup,
        cutmix=section.cutmix,
        ema_decay=section.ema_decay,
        grad_clip=section.grad_clip_norm,
        patience=section.patience,
        freeze_bn=section.freeze_bn,
        channels_last=section.channels_last,
        amp=section.amp,
        compile=section.compile,
        checkpoint_every_s=section.checkpoint_every_s,
        distill_weight=0.0 if distill is None else distill.weight,
        distill_temperature=1.0 if distill is None else distill.temperature,
        feature_units=features,
        feature_weight=1.0 if distill is None else distill.feature_weight,
        seed=recipe.seed,
    )


def _text(progress: Progress) -> str:
    return f"epoch {progress.epoch + 1}, loss {progress.loss:.3f}"
