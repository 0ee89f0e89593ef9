"""Stage 5: baseline and folded network as float TFLite and ONNX files."""

__all__ = ["run"]

from typing import Any

from pipeline.export import metadata, onnx, tflite
from pipeline.stages import StageContext, workbench

MODELS = ("baseline", "folded")
EXPORTERS = {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}


def run(context: StageContext) -> dict[str, Any]:
    """Converts both networks to the recipe's formats, with the preprocessing written into every file."""
    recipe = context.recipe
    example = workbench.example(recipe)
    jobs = [(which, form) for which in MODELS for form in recipe.export.formats]
    (context.work / "models").mkdir(exist_ok=True)
    infos = {}
    for done, (which, form) in enumerate(jobs):
        context.report.progress(done, len(jobs), f"{which} to {form}")
        module = workbench.load_model(context, "baseline" if which == "baseline" else "postfold", f"models/{which}.pt")
        path = context.work / "models" / f"{which}.{form}"
        info = EXPORTERS[form](module, example, path)
        units = [] if which == "baseline" else list(context.inputs["postfold"].metrics["units_folded"])
        metadata.write(path, workbench.file_metadata(context, which, units))
        infos[path.name] = info.as_dict()
    return {"files": infos, "summary": f"{len(jobs)} float files"}
