"""Stage 9: the table, as Markdown, JSON and self-contained HTML, and the model card that travels with the files."""

__all__ = ["run"]

from typing import Any

from pipeline.export.inspect import census
from pipeline.export.model_card import ModelCard, write_card
from pipeline.export.verify import FileReport
from pipeline.report import html, table
from pipeline.results.collect import FILE_SUFFIXES, collect
from pipeline.results.schema import RunReport, VerifyRow
from pipeline.stages import StageContext, workbench


def run(context: StageContext) -> dict[str, Any]:
    """Gathers what the stages found, writes it three ways, and describes the exported files in `MODEL_CARD.md`."""
    report = collect(context.recipe, context.inputs)
    (context.work / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (context.work / "report.md").write_text(table.markdown(report), encoding="utf-8")
    (context.work / "report.html").write_text(html.render(report), encoding="utf-8")
    # Among the models, so that it is published beside the files it describes.
    write_card(_card(context, report), context.work / "models" / "MODEL_CARD.md")
    return {"failures": report.failures, "summary": f"{len(report.failures)} checks failed" if report.failures else ""}


def _card(context: StageContext, report: RunReport) -> ModelCard:
    origin = context.inputs["baseline"].metrics["weights_origin"]
    files = [
        context.inputs["quantize" if kind.endswith("int8") else "export"].file(entry.path)
        for model in (report.folded, report.baseline)
        for kind, entry in model.files.items()
    ]
    few = report.labelled_images < 1000
    taken = report.calibration
    data = {"Trained or fitted on": report.data, "Evaluated on": f"{report.eval_images} images of its evaluation split"}
    if taken is not None:
        data["Calibrated on"] = f"{taken.count} images of {taken.source}, seed {taken.seed}"
    limits = ["The classes are those of the training data; a picture of anything else is still given one of them."]
    if few:
        limits.append(
            f"Checked on {report.labelled_images} labelled images only: no accuracy is claimed, "
            "agreement with the original network is what was measured."
        )
    if report.variant == "quick":
        limits.append("Made by a shortened run, to try the pipeline; not for use.")
    limits += [f"Failed a check: {failure}" for failure in report.failures]
    return ModelCard(
        name=f"{report.recipe}: {report.model}, folded",
        summary=report.description or f"An image classifier, {report.model} at {report.input_px} px, made shallower.",
        licence=origin.get("licence") or "not stated by the source of the weights",
        weights=report.weights,
        data=data,
        preprocessing=workbench.preprocessing(context.recipe).as_dict()
        | {"input": "uint8 pixels" if context.recipe.export.input == "uint8" else "normalised float32"},
        units_folded=report.units_folded,
        files=[census(path) for path in files],
        reports=[_verdict(row) for row in report.verify],
        made_with=report.versions | {"recipe stages": ", ".join(report.stage_hashes.values())},
        limits=limits,
    )


def _verdict(row: VerifyRow) -> FileReport:
    return FileReport(
        f"{row.model}{FILE_SUFFIXES[row.kind]}",
        row.images,
        row.accuracy,
        row.top5,
        None,
        row.agreement,
        row.max_abs_logit_error,
        row.mean_abs_logit_error,
        row.relative_error or 0.0,
        (),
        (row.reason,) if row.reason else (),
    )
