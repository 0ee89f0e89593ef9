"""Stage 2: α-activations learn, under the auxiliary loss, which units can do without their non-linearities."""

__all__ = ["candidates", "run", "unit_macs"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pipeline import alpha
from pipeline.errors import UnitError, nearest
from pipeline.folding import fold
from pipeline.folding.closed_form import closed_form_fold
from pipeline.folding.units import Unit, find_units, linearise
from pipeline.recipe import Recipe
from pipeline.stages import StageContext, workbench

_CLOSED_FORM_BATCH = 16


def run(context: StageContext) -> dict[str, Any]:
    """Makes units linear, by learned or annealed α or in closed form, and evaluates the network that will fold."""
    recipe = context.recipe
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = candidates(recipe, baseline)
    if recipe.prefold.method == "closed_form":
        settled, values, details = _closed_form(context, baseline, [unit.name for unit in units])
    else:
        settled, values, details = _learned(context, baseline, units)
    evaluation = workbench.score(context, settled, teacher=baseline)
    linear = [name for name, value in values.items() if value > recipe.prefold.threshold]
    workbench.save_model(context, "settled.pt", settled, alphas=values, linear_units=linear)
    if not linear:
        context.report.say(
            f"no unit's alpha passed {recipe.prefold.threshold}: nothing will fold; "
            "raise prefold.lambda_c or prefold.train.epochs"
        )
    return {
        "alphas": values,
        "linear_units": linear,
        "details": details,
        "evaluation": evaluation.as_dict(),
        "summary": f"{len(linear)} of {len(units)} units linear ({', '.join(linear) or 'none'}), "
        + workbench.summary(evaluation),
    }


def _learned(
    context: StageContext, baseline: nn.Module, units: list[Unit]
) -> tuple[nn.Module, dict[str, float], dict[str, Any]]:
    """Attaches α to the candidate units, fine-tunes, and settles: α above the threshold becomes linear."""
    recipe, section = context.recipe, context.recipe.prefold
    assert section.train is not None, "the recipe's validator asks for it"
    student = alpha.attach(baseline, units=[unit.name for unit in units], per="unit")
    alpha.set_values(student, section.alpha_init)
    schedule = alpha.AlphaSchedule(
        lambda_c=section.lambda_c,
        p=section.p,
        threshold=section.threshold,
        alpha_lr=section.alpha_lr,
        weights=_penalty_weights(recipe, baseline, units),
        anneal=tuple(unit.name for unit in units) if section.method == "fixed" else (),
        anneal_fraction=section.anneal_fraction,
        snap_at=section.snap_at,
    )
    workbench.fine_tune(context, student, section.train, distill=section.distill, teacher=baseline, alpha=schedule)
    return alpha.settle(student, threshold=section.threshold), alpha.values(student), {}


def _closed_form(
    context: StageContext, baseline: nn.Module, names: list[str]
) -> tuple[nn.Module, dict[str, float], dict[str, Any]]:
    """Fits one convolution to each unit on the training images, without labels or gradients: they fold right here."""
    recipe, section = context.recipe, context.recipe.prefold
    source = workbench.split(recipe, "train")
    context.report.progress(0, 1, f"least squares on {len(source)} images")

    def images() -> Iterator[torch.Tensor]:
        for batch, _ in source.batches(_CLOSED_FORM_BATCH, train=True, seed=recipe.seed):
            yield batch

    result = closed_form_fold(
        baseline,
        names,
        images,
        ridge=section.ridge,
        refit=section.refit,
        batch_size=_CLOSED_FORM_BATCH,
        seed=recipe.seed,
    )
    fits = {fit.unit: {"kernel": list(fit.kernel), "residual": fit.residual} for fit in result.units}
    return result.model, dict.fromkeys(names, 1.0), {"fits": fits, "refitted": list(result.refitted)}


def candidates(recipe: Recipe, model: nn.Module) -> list[Unit]:
    """The units that α is attached to, in network order.

    Raises:
        UnitError: A named unit is unknown or cannot fold, or none is left.
    """
    section = recipe.prefold
    known = {unit.name: unit for unit in find_units(model)}
    named = list(known) if section.units == "all" else list(section.units)
    for name in (*named, *section.exclude):
        if name not in known:
            close = nearest(name, known)
            raise UnitError(
                f"prefold.units: model '{recipe.model.name}' has no unit '{name}'" + (f"; {close}" if close else ""),
                hint=f"its units are {', '.join(known) or 'none'}",
            )
        if section.units != "all" and not known[name].foldable and name in named:
            raise UnitError(
                f"prefold.units: unit '{name}' cannot fold: {known[name].reason}",
                hint="leave it out; `layerfold inspect MODEL --units` lists what can fold",
            )
    chosen = [
        unit for unit in known.values() if unit.name in named and unit.foldable and unit.name not in section.exclude
    ]
    if section.units == "all":
        cost = unit_macs(model, [unit.name for unit in chosen], workbench.example(recipe))
        dear = {name for name, (before, after) in cost.items() if after > section.max_macs_ratio * before}
        chosen = [unit for unit in chosen if unit.name not in dear]
    if not chosen:
        raise UnitError(
            f"prefold.units leaves no foldable unit of model '{recipe.model.name}'", hint="set prefold.units=all"
        )
    return chosen


def _penalty_weights(recipe: Recipe, model: nn.Module, units: list[Unit]) -> dict[str, float] | None:
    """c_l of the auxiliary loss: None for the paper's uniform weights, else by the MACs that folding saves."""
    if recipe.prefold.penalty_weights == "uniform":
        return None
    cost = unit_macs(model, [unit.name for unit in units], workbench.example(recipe))
    return alpha.weights_from_savings({name: before - after for name, (before, after) in cost.items()})


def unit_macs(model: nn.Module, units: list[str], example: torch.Tensor) -> dict[str, tuple[int, int]]:
    """MACs of one image in each unit, as it is and as one convolution."""
    result = fold(linearise(model, units), example, units=units)
    merged = [segment for segment in result.segments if segment.windows > 1]
    return {
        unit: (segment.macs_before, segment.macs_after)
        for unit in units
        for segment in merged
        if segment.name == unit or segment.merged[0].startswith(f"{unit}.")
    }
