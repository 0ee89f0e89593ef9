"""Stage 6: static int8 of every float file, calibrated on training images."""

__all__ = ["run"]

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export import metadata, quantize
from pipeline.stages import StageContext, workbench
from pipeline.stages.export import MODELS


def run(context: StageContext) -> dict[str, Any]:
    """Quantises both networks in the recipe's formats; the calibration images are drawn by seed, never from `eval`."""
    recipe = context.recipe
    wanted = recipe.quantize.calibration_images
    source = workbench.split(recipe, "calibration", limit=wanted)

    def calibration() -> Iterator[NDArray[np.float32]]:
        for images, _ in source.batches(1):
            yield images.numpy()

    quantisers = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}
    jobs = [(which, form) for which in MODELS for form in recipe.export.formats]
    (context.work / "models").mkdir(exist_ok=True)
    for done, (which, form) in enumerate(jobs):
        context.report.progress(done, len(jobs), f"{which}.{form} to int8")
        source_path = context.inputs["export"].file(f"models/{which}.{form}")
        path = context.work / "models" / f"{which}.int8.{form}"
        quantisers[form](source_path, path, calibration())
        metadata.write(path, metadata.read(source_path) | {"calibration_images": len(source)})
    return {
        "calibration_images": len(source),
        "calibration_source": source.name,
        "summary": f"{len(jobs)} int8 files, calibrated on {len(source)} images of {source.name}",
    }
