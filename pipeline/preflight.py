"""Checks that need the model or the data, made before a run writes anything.

A wrong unit or a data set of other classes is found here in seconds, not after an hour of training.
"""

__all__ = ["check"]

from torch import nn

from pipeline.data.sources import ImageSource
from pipeline.errors import UnitError, WeightsError, nearest
from pipeline.export.conversion import require_formats
from pipeline.models import weights, zoo
from pipeline.recipe import Recipe
from pipeline.results.collect import paper_row
from pipeline.stages import fitting, workbench
from pipeline.stages.bench import make_targets
from pipeline.stages.prefold import candidates, penalty_weights


def check(recipe: Recipe, *, load_weights: bool) -> None:
    """Looks for the formats' libraries, builds the model, names the units, opens the splits and looks up targets.

    Args:
        recipe: The checked recipe.
        load_weights: Whether the weights are loaded too, which may download them.

    Raises:
        LayerfoldError: The first thing that cannot work, with its fix.
        TargetError: A target of `bench.targets` is unknown, or does not take its options.
    """
    require_formats(recipe.export.formats, recipe.export.precisions)
    section = recipe.model
    model = zoo.create(
        section.name,
        num_classes=section.num_classes,
        in_chans=section.in_channels,
        input_px=section.input_px,
        args=section.args,
    )
    units = candidates(recipe, model)
    fitting.check_features(recipe, model, units)
    if recipe.prefold.method != "closed_form":
        penalty_weights(recipe, model, units)
    _require_float_units(recipe, model)
    _require_weights(recipe)
    if load_weights:
        weights.load(model, section.name, section.weights, num_classes=section.num_classes)
    workbench.device(recipe)
    paper_row(recipe.report.paper)
    _require_fit_data(recipe, workbench.split(recipe, "train"))
    workbench.split(recipe, "eval")
    workbench.labelled(recipe)
    make_targets(recipe)


def _require_weights(recipe: Recipe) -> None:
    """Refuses to fold a network that is neither pretrained nor trained, unless the recipe asks for random weights."""
    section = recipe.model
    if section.weights == "auto" and recipe.baseline.train is None and weights.choose(section.name) == "none":
        raise WeightsError(
            f"nobody published weights for model.name '{section.name}', and the recipe has no baseline.train: "
            "a network of random weights would be folded",
            hint="give its weights with model.weights=/path/to/file.pth, or train it on the recipe's data with "
            "baseline.train (epochs, lr, …); model.weights=none folds it untrained",
        )


def _require_fit_data(recipe: Recipe, source: ImageSource) -> None:
    """Finds labels or images that a fine-tuning would miss, before another one has run for hours."""
    sections = (
        ("baseline", recipe.baseline.train, None),
        ("prefold", recipe.prefold.train, recipe.prefold.distill),
        ("postfold", recipe.postfold.train, recipe.postfold.distill),
    )
    for stage, train, distill in sections:
        if train is not None:
            fitting.check(stage, source, train, distill)


def _require_float_units(recipe: Recipe, model: nn.Module) -> None:
    """Finds a misspelt name before training, not when the files are quantised."""
    known = [name for name, _ in model.named_modules() if name]
    for name in recipe.quantize.float_units:
        if name not in known:
            close = nearest(name, known)
            raise UnitError(
                f"quantize.float_units: model '{recipe.model.name}' has no layer or unit '{name}'"
                + (f"; {close}" if close else ""),
                hint="`layerfold inspect MODEL --units` lists its units",
            )
