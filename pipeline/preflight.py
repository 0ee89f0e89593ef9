"""Checks that need the model or the data, made before a run writes anything.

A wrong unit or a data set of other classes is found here in seconds, not after an hour of training.
"""

__all__ = ["check"]

from pipeline.models import weights, zoo
from pipeline.recipe import Recipe
from pipeline.results.collect import paper_row
from pipeline.stages import workbench
from pipeline.stages.bench import make_targets
from pipeline.stages.prefold import candidates


def check(recipe: Recipe, *, load_weights: bool) -> None:
    """Builds the model, names the units, opens the splits and looks up the targets of a recipe.

    Args:
        recipe: The checked recipe.
        load_weights: Whether the weights are loaded too, which may download them.

    Raises:
        LayerfoldError: The first thing that cannot work, with its fix.
        TargetError: A target of `bench.targets` is unknown, or does not take its options.
    """
    section = recipe.model
    model = zoo.create(
        section.name,
        num_classes=section.num_classes,
        in_chans=section.in_channels,
        input_px=section.input_px,
        args=section.args,
    )
    candidates(recipe, model)
    if load_weights:
        weights.load(model, section.name, section.weights, num_classes=section.num_classes)
    workbench.device(recipe)
    paper_row(recipe.report.paper)
    for split in ("train", "eval"):
        workbench.split(recipe, split)
    workbench.labelled(recipe)
    make_targets(recipe)
