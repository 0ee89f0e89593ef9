"""Stage 2: α-activations learn, under the auxiliary loss, which units can do without their non-linearities."""

__all__ = ["candidates", "run", "unit_macs"]

import json
from typing import Any

import torch
from torch import nn

from pipeline import alpha
from pipeline.errors import UnitError, nearest
from pipeline.folding import fold
from pipeline.folding.units import Unit, find_units, linearise
from pipeline.recipe import Recipe
from pipeline.stages import StageContext, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Attaches α to the candidate units, fine-tunes, and settles: α above the threshold becomes linear."""
    recipe, section = context.recipe, context.recipe.prefold
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = candidates(recipe, baseline)
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
    values = alpha.values(student)
    settled = alpha.settle(student, threshold=section.threshold)
    evaluation = workbench.score(context, settled, teacher=baseline)
    linear = [name for name, value in values.items() if value > section.threshold]
    workbench.save_model(context, "settled.pt", settled, alphas=values, linear_units=linear)
    (context.work / "alphas.json").write_text(json.dumps(values, indent=1))
    if not linear:
        context.report.say(
            f"no unit's alpha passed {section.threshold}: nothing will fold; "
            "raise prefold.lambda_c or prefold.train.epochs"
        )
    return {
        "alphas": values,
        "linear_units": linear,
        "evaluation": evaluation.as_dict(),
        "summary": f"{len(linear)} of {len(units)} units linear ({', '.join(linear) or 'none'}), "
        + workbench.summary(evaluation),
    }


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
