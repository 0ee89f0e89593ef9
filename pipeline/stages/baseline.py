"""Stage 1: the network to beat, with its given weights or trained from scratch."""

__all__ = ["run"]

from typing import Any

import torch

from pipeline.models import weights, zoo
from pipeline.stages import StageContext, fitting, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Builds the model, loads its weights, trains it where the recipe says so, and evaluates it."""
    recipe = context.recipe
    section = recipe.model
    torch.manual_seed(recipe.seed)  # random weights are part of what the seed decides
    model = zoo.create(
        section.name,
        num_classes=section.num_classes,
        in_chans=section.in_channels,
        input_px=section.input_px,
        args=section.args,
    )
    origin = weights.load(model, section.name, section.weights, num_classes=section.num_classes)
    context.report.say(f"weights: {origin.source} ({origin.detail})")
    train = recipe.baseline.train
    if train is not None:
        fitting.fine_tune(context, model, train)
    evaluation = workbench.score(context, model)
    workbench.save_model(context, "models/baseline.pt", model, **workbench.provenance(context, origin.as_dict()))
    return {
        "weights": f"{origin.source}: {origin.detail}"
        + ("" if train is None else f", trained {fitting.epochs(train, workbench.split(recipe, 'train')):.3g} epochs"),
        "weights_origin": origin.as_dict(),
        "data": context.stage.facts["data"],
        "counts": workbench.count(recipe, model),
        "evaluation": evaluation.as_dict(),
        "summary": workbench.summary(evaluation),
    }
