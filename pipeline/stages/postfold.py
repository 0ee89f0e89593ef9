"""Stage 4: the folded network is fine-tuned once more."""

__all__ = ["run"]

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.stages import StageContext, fitting, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Fine-tunes the folded network, by labels or by distillation from the baseline, and evaluates it."""
    section = context.recipe.postfold
    folded = workbench.load_model(context, "fold", "folded.pt")
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = list(context.inputs["fold"].metrics["units_folded"])
    if section.train is not None:
        fitting.fine_tune(
            context, folded, section.train, distill=section.distill, teacher=baseline, units=_blocks(folded, units)
        )
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


def _blocks(folded: nn.Module, units: Sequence[str]) -> list[str]:
    """The units that the folded network still has as one layer under their own name, for feature distillation."""
    modules = dict(folded.named_modules())
    return [unit for unit in units if unit in modules and not list(modules[unit].children())]
