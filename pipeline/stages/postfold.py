"""Stage 4: the folded network is fine-tuned once more."""

__all__ = ["run"]

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.errors import RecipeError
from pipeline.folding.units import find_activations
from pipeline.stages import StageContext, fitting, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Fine-tunes the folded network, by labels or by distillation from the baseline, and evaluates it."""
    section = context.recipe.postfold
    folded = workbench.load_model(context, "fold", "folded.pt")
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = list(context.inputs["fold"].metrics["units_folded"])
    by_units = section.distill is not None and section.distill.features == "units"
    outputs = _outputs(folded, baseline, units) if by_units else []
    if section.train is not None:
        fitting.fine_tune(context, folded, section.train, distill=section.distill, teacher=baseline, units=outputs)
    evaluation = workbench.score(context, folded, teacher=baseline)
    origin = context.inputs["baseline"].metrics["weights_origin"]
    workbench.save_model(
        context, "models/folded.pt", folded, units_folded=units, **workbench.provenance(context, origin)
    )
    return {
        "units_folded": units,
        "counts": workbench.count(context.recipe, folded),
        "evaluation": evaluation.as_dict(),
        "summary": workbench.summary(evaluation),
    }


def _outputs(folded: nn.Module, baseline: nn.Module, units: Sequence[str]) -> list[str]:
    """For feature distillation, the modules of both networks that give each unit's output.

    That is the unit itself where it is one layer now, and the activation behind its sum where it kept that one.

    Raises:
        RecipeError: A unit has no such module.
    """
    modules, teacher = dict(folded.named_modules()), dict(baseline.named_modules())
    found = []
    for unit in units:
        kept = [name for name in find_activations(folded) if name.startswith(f"{unit}.") and name in teacher]
        if unit in modules and not list(modules[unit].children()):
            found.append(unit)
        elif kept:
            found.append(kept[-1])
        else:
            raise RecipeError(
                f"postfold.distill.features is 'units', but no module gives the output of the folded unit '{unit}'",
                hint="name modules that both networks have",
            )
    return found
