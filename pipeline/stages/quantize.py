"""Stage 6: static int8 of every float file, calibrated on training images, after training with rounding if asked."""

__all__ = ["run"]

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.export import metadata, sqnr
from pipeline.export.calibration import Calibration, collect
from pipeline.export.conversion import EXPORTERS, Checked, check, conversion_record, file_name, to_int8
from pipeline.export.int8 import Int8Options, operate
from pipeline.folding.units import find_units
from pipeline.recipe import Recipe
from pipeline.stages import StageContext, workbench
from pipeline.stages.export import MODELS, census_record, judge, pixel_input, prepared

_CALIBRATION_BATCH = 16


def run(context: StageContext) -> dict[str, Any]:
    """Quantises both networks in the recipe's formats.

    The calibration images are drawn by seed, decoded once for all files, and recorded: how many, which (a digest), and
    which could not be read.

    Raises:
        DataError: Too many calibration images are damaged, or the split is one that judges the result.
        ExportError: A file cannot be quantised, or the census gate fails; the files stay in the stage's unfinished
            folder for inspection.
        TrainingError: Quantisation-aware training diverges.
    """
    recipe, section = context.recipe, context.recipe.quantize
    options = options_of(recipe)
    taken = _calibration(context)
    record = {"quantised": options.as_dict(), "calibration": taken.as_dict()}
    # What a killed run left half written must not be published with the rest.
    shutil.rmtree(context.work / "models", ignore_errors=True)
    (context.work / "models").mkdir()
    total = len(MODELS) * len(recipe.export.formats)
    checked: list[Checked] = []
    infos: dict[str, Any] = {}
    operated: dict[str, Any] = {}
    noise: list[dict[str, Any]] = []
    # Only these formats let one look at the tensors inside.
    watched = next((form for form in recipe.export.formats if form != "executorch"), None)
    if watched is None and section.noise_images:
        context.report.say("no table of each unit's noise: it needs a TFLite or ONNX file in export.formats")
    for which in MODELS:
        context.report.progress(len(checked), total, f"{which} made ready for int8")
        source = prepared(context, which)
        ready = operate(
            source.network,
            taken.batches,
            options,
            training=_training_images(recipe) if section.method == "qat" else None,
            on_step=lambda done, steps, which=which: context.report.progress(  # type: ignore[misc]
                done, steps, f"{which}: training with rounding"
            ),
        )
        operated[which] = ready.as_dict()
        for form in recipe.export.formats:
            context.report.progress(len(checked), total, f"{which}.{form} to int8")
            exported = context.inputs["export"].file(f"models/{file_name(which, 'fp32', form)}")
            path = context.work / "models" / file_name(which, "int8", form)
            info, float_file = to_int8(
                form, source.network, ready, exported, path, taken.batches, options, example=source.example,
                pixels=pixel_input(recipe), scratch=context.checkpoints / f"{which}.operated.{form}",
            )  # fmt: skip
            content = metadata.read(exported)
            metadata.write(path, content | record | conversion_record("int8", info))
            for note in info.notes:
                context.report.say(f"{path.name}: {note}")
            found = check(
                path,
                pads=source.pads,
                allow_operators=recipe.export.allow_operators,
                float_units=section.float_units,
            )
            checked.append(found)
            infos[path.name] = info.as_dict() | {"advice": list(found.advice)}
            if form == watched and section.noise_images:
                reference = float_file
                if ready.reference is source.network:
                    reference = exported
                elif ready.reference is not ready.network:
                    reference = context.checkpoints / f"{which}.reference.{form}"
                    EXPORTERS[form](ready.reference, source.example, reference, pixels=pixel_input(recipe))
                noise += _noise(context, which, reference, path, taken)
    judge(context, checked)
    for damaged, reason in taken.skipped.items():
        context.report.say(f"calibration: left out {damaged}: {reason}")
    return {
        "calibration": taken.as_dict(),
        "options": options.as_dict(),
        "networks": operated,
        "files": infos,
        "census": {item.census.file: census_record(item) for item in checked},
        "noise": noise,
        "summary": f"{total} int8 files ({section.method}), calibrated on {taken.count} images of {taken.source}"
        + (f", {len(taken.skipped)} damaged ones left out" if taken.skipped else ""),
    }


def options_of(recipe: Recipe) -> Int8Options:
    """The recipe's section `quantize` as the library takes it."""
    section = recipe.quantize
    return Int8Options(
        method=section.method,
        split_identity=section.split_identity,
        equalise=section.equalise,
        bias_correction=section.bias_correction,
        per_channel=section.per_channel,
        ranges=section.ranges,
        percentile=section.percentile,
        float_units=section.float_units,
        qat_steps=section.qat.steps,
        qat_learning_rate=section.qat.lr,
    )


def _calibration(context: StageContext) -> Calibration:
    recipe, section = context.recipe, context.recipe.quantize
    source = workbench.split(recipe, section.calibration_split, limit=section.calibration_images)
    context.report.progress(0, 1, f"reading {len(source)} calibration images")
    return collect(source, asked=section.calibration_images, seed=recipe.seed, batch_size=_CALIBRATION_BATCH)


def _training_images(recipe: Recipe) -> Iterator[Tensor]:
    """Augmented training images, epoch after epoch."""
    source = workbench.split(recipe, "train")
    size = min(recipe.quantize.qat.batch_size, len(source))
    for epoch in itertools.count():
        for images, _ in source.batches(size, train=True, seed=recipe.seed, epoch=epoch):
            yield images


def _noise(
    context: StageContext, which: str, reference: Path, quantised: Path, taken: Calibration
) -> list[dict[str, Any]]:
    """What quantisation leaves of each unit's output, in network order; a layer outside every unit is its own row."""
    recipe = context.recipe
    images, left = [], recipe.quantize.noise_images
    for batch in taken.batches:
        images.append(batch[: max(left, 0)])
        left -= len(batch)
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = [unit.name for unit in find_units(baseline)]
    folded = set() if which == "baseline" else set(context.inputs["postfold"].metrics["units_folded"])
    rows = sqnr.unit_noise(sqnr.layer_noise(reference, quantised, images), units)
    return [{"model": which, "file": quantised.name, "folded": row.name in folded, **row.as_dict()} for row in rows]
