"""Stage 3: every linear unit becomes one convolution; the rest of the network keeps its layers."""

__all__ = ["run"]

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pipeline.errors import FoldError
from pipeline.folding import FoldResult, fold
from pipeline.stages import StageContext, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Folds the settled network and proves on the evaluation images that it still predicts the same."""
    recipe, section = context.recipe, context.recipe.fold
    settled = workbench.load_model(context, "prefold", "settled.pt")
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    linear = list(context.inputs["prefold"].metrics["linear_units"])
    example = workbench.example(recipe)
    result = fold(settled, example, border=section.border, policy=section.policy, units=linear, norms="keep")
    changed, worst = _compare(context, settled, result.model)
    error = max(worst, result.max_abs_error)
    if not math.isfinite(error) or error > section.max_abs_error:
        raise FoldError(
            f"the folded network differs from the linearised one by {error:.3g} in a logit "
            f"(fold.max_abs_error is {section.max_abs_error:g})",
            hint="use fold.border=exact, or raise fold.max_abs_error if post-folding may repair it",
        )
    evaluation = workbench.score(context, result.model, teacher=baseline)
    workbench.save_model(context, "folded.pt", result.model, units_folded=linear)
    merged = {unit for segment in result.segments for unit in segment.units}
    # A unit that was one layer already, fitted in closed form, shows in no merged segment.
    folded = [unit for unit in linear if unit in merged or _is_one_layer(unit, result)]
    skips = {name: skip.reason for skip in result.skipped for name in skip.names}
    unfolded = {unit: _reason(unit, skips) for unit in linear if unit not in folded}
    return {
        "units_folded": folded,
        "units_skipped": unfolded,
        "segments": [asdict(segment) for segment in result.segments],
        "max_abs_error": error,
        "changed_predictions": changed,
        "evaluation": evaluation.as_dict(),
        "summary": f"{len(folded)} of {len(linear)} linear units folded, error {error:.1e}, "
        f"{changed} predictions changed, {workbench.summary(evaluation)}",
    }


def _is_one_layer(unit: str, result: FoldResult) -> bool:
    """Whether one convolution of the folded network stands for the unit; a unit may be a single activation."""
    modules = dict(result.model.named_modules())
    if unit in modules:
        return "weight" in dict(modules[unit].named_parameters(recurse=False)) and not list(modules[unit].children())
    return not any(name.startswith(f"{unit}.") for name in modules) and not any(
        unit in skip.names for skip in result.skipped
    )


def _reason(unit: str, skips: Mapping[str, str]) -> str:
    return next((why for name, why in skips.items() if name == unit or name.startswith(f"{unit}.")), "nothing to merge")


def _compare(context: StageContext, before: nn.Module, after: nn.Module) -> tuple[int, float]:
    """How many evaluation images change their top-1, and the largest difference of a logit."""
    source = workbench.split(context.recipe, "eval")
    batch_size = context.recipe.verify.batch_size
    on = workbench.device(context.recipe)
    before, after = before.to(on).eval(), after.to(on).eval()
    changed, worst = 0, 0.0
    with torch.inference_mode():
        for step, (images, _) in enumerate(source.batches(batch_size)):
            one, other = before(images.to(on)), after(images.to(on))
            changed += int((one.argmax(1) != other.argmax(1)).sum())
            worst = max(worst, float((one - other).abs().max()))
            context.report.progress(step + 1, source.steps(batch_size), "comparing with the unfolded network")
    return changed, worst
