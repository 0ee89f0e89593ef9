"""Stage 4: the folded network is fine-tuned once more."""

__all__ = ["run"]

from typing import Any

from pipeline.stages import StageContext, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Fine-tunes the folded network, by labels or by distillation from the baseline, and evaluates it."""
    section = context.recipe.postfold
    folded = workbench.load_model(context, "fold", "folded.pt")
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    if section.train is not None:
        workbench.fine_tune(context, folded, section.train, distill=section.distill, teacher=baseline)
    evaluation = workbench.score(context, folded, teacher=baseline)
    units = list(context.inputs["fold"].metrics["units_folded"])
    workbench.save_model(context, "models/folded.pt", folded, units_folded=units)
    return {
        "units_folded": units,
        "counts": workbench.count(context.recipe, folded),
        "evaluation": evaluation.as_dict(),
        "summary": workbench.summary(evaluation),
    }
