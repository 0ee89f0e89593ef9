"""Stage 6: static int8 of every float file, calibrated on training images."""

__all__ = ["run"]

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export import metadata, quantize
from pipeline.export.equalise import equalise
from pipeline.export.lowering import lower
from pipeline.stages import StageContext, workbench
from pipeline.stages.export import EXPORTERS, MODELS

_CALIBRATION_BATCH = 16


def run(context: StageContext) -> dict[str, Any]:
    """Quantises both networks in the recipe's formats; the calibration images are drawn by seed, never from `eval`."""
    recipe = context.recipe
    source = workbench.split(recipe, "calibration", limit=recipe.quantize.calibration_images)
    images = [batch.numpy() for batch, _ in source.batches(_CALIBRATION_BATCH)]  # decoded once for all files
    quantisers = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}
    jobs = [(which, form) for which in MODELS for form in recipe.export.formats]
    (context.work / "models").mkdir(exist_ok=True)
    spreads: dict[str, Any] = {}
    for done, (which, form) in enumerate(jobs):
        context.report.progress(done, len(jobs), f"{which}.{form} to int8")
        exported = context.inputs["export"].file(f"models/{which}.{form}")
        float_file = exported
        if recipe.quantize.equalise:
            float_file, spreads[which] = _equalised(context, which, form, images)
        path = context.work / "models" / f"{which}.int8.{form}"
        quantisers[form](float_file, path, images)
        metadata.write(path, metadata.read(exported) | {"calibration_images": len(source)})
    return {
        "calibration_images": len(source),
        "calibration_source": source.name,
        "equalised": spreads,
        "summary": f"{len(jobs)} int8 files, calibrated on {len(source)} images of {source.name}",
    }


def _equalised(
    context: StageContext, which: str, form: str, images: list[NDArray[np.float32]]
) -> tuple[Path, dict[str, Any]]:
    """A float file whose layers share their weight ranges, and how far each layer's channels spread before and after.

    Folded kernels multiply the scales of several norms, so their channels spread over decades; one int8 scale per
    output channel cannot hold that, but the layer before can take a part of it.
    """
    stage = "baseline" if which == "baseline" else "postfold"
    network = lower(workbench.load_model(context, stage, f"models/{which}.pt"), workbench.example(context.recipe))
    balanced, pairs = equalise(network, images)
    path = context.checkpoints / f"{which}-equalised.{form}"
    EXPORTERS[form](balanced, workbench.example(context.recipe), path)
    return path, {pair.first: [round(pair.spread_before, 3), round(pair.spread_after, 3)] for pair in pairs}
