"""Stage 5: baseline and folded network as float files, each with a census that the target must run."""

__all__ = ["MODELS", "Prepared", "census_record", "file_metadata", "judge", "pixel_input", "prepared", "run"]

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

import pipeline
from pipeline.errors import ExportError
from pipeline.export import metadata
from pipeline.export.conversion import (
    EXPORTERS,
    SHRINKERS,
    Checked,
    check,
    conversion_record,
    file_name,
    without_needless_pads,
)
from pipeline.export.input_format import PixelInput
from pipeline.export.lowering import lower
from pipeline.recipe import Recipe
from pipeline.stages import StageContext, workbench

MODELS = ("baseline", "folded")


@dataclass(frozen=True)
class Prepared:
    """A network as it is converted.

    Attributes:
        network: Lowered, and with enlarged kernels where the recipe asks for them.
        example: Its input, Tensor[batch, channels, input_px, input_px] of zeros.
        pads: How many PAD operators its files need.
        enlarged: Layers whose kernels grew.
    """

    network: fx.GraphModule
    example: Tensor
    pads: int
    enlarged: list[str]


def run(context: StageContext) -> dict[str, Any]:
    """Converts both networks to the recipe's formats and precisions, with what a file says about itself inside.

    Raises:
        ExportError: A network cannot be converted, or the census gate fails; the files stay in the stage's
            unfinished folder for inspection.
    """
    recipe, section = context.recipe, context.recipe.export
    precisions = ("fp32", *section.precisions)
    total = len(MODELS) * len(section.formats) * len(precisions)
    models = context.work / "models"
    # What a killed run left half written must not be published with the rest.
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    infos: dict[str, Any] = {}
    checked: list[Checked] = []
    enlarged: dict[str, list[str]] = {}
    for which in MODELS:
        context.report.progress(len(checked), total, f"{which} to plain layers")
        source = prepared(context, which)
        enlarged[which] = source.enlarged
        content = file_metadata(context, which)
        for form in section.formats:
            for precision in precisions:
                context.report.progress(len(checked), total, f"{which} to {precision} {form}")
                path = models / file_name(which, precision, form)
                if precision == "fp32":
                    info = EXPORTERS[form](source.network, source.example, path, pixels=pixel_input(recipe))
                else:
                    info = SHRINKERS[form, precision](models / file_name(which, "fp32", form), path)
                metadata.write(path, content | conversion_record(precision, info))
                for note in info.notes:
                    context.report.say(f"{path.name}: {note}")
                found = check(path, pads=source.pads, allow_operators=section.allow_operators)
                checked.append(found)
                infos[path.name] = info.as_dict() | {"advice": list(found.advice)}
    judge(context, checked)
    return {
        "files": infos,
        "census": {item.census.file: census_record(item) for item in checked},
        "kernels_enlarged": enlarged,
        "summary": f"{total} float files",
    }


def prepared(context: StageContext, which: str) -> Prepared:
    """Reads `baseline` or `folded` and makes it the network that is converted."""
    section = context.recipe.export
    single = workbench.example(context.recipe)
    example = single.expand(section.batch, *single.shape[1:]).contiguous()
    stage = "baseline" if which == "baseline" else "postfold"
    network = lower(workbench.load_model(context, stage, f"models/{which}.pt"), example)
    network, pads, changed = without_needless_pads(network, example, enlarge=section.pads == "enlarge")
    return Prepared(network, example, pads, changed)


def pixel_input(recipe: Recipe) -> PixelInput | None:
    """The normalisation that goes into the files, or None where they take normalised images."""
    if recipe.export.input == "float":
        return None
    return PixelInput.of(recipe.preprocess.mean, recipe.preprocess.std)


def judge(context: StageContext, checked: Sequence[Checked]) -> None:
    """Says what only costs speed, and fails the stage on what the target cannot run, unless the recipe only warns.

    Raises:
        ExportError: A file breaks a rule of the gate and `export.gate` is `fail`.
    """
    for finding in dict.fromkeys(text for item in checked for text in item.advice):
        context.report.say(finding)
    broken = list(dict.fromkeys(text for item in checked for text in item.broken))
    if not broken:
        return
    if context.recipe.export.gate == "warn":
        for finding in broken:
            context.report.say(f"export.gate: {finding}")
        return
    raise ExportError(
        f"the census gate fails: {'; '.join(broken)}",
        hint="replace that part of the model, name operators that your target runs in export.allow_operators, or set "
        f"export.gate=warn; the files are in {context.work / 'models'}",
    )


def census_record(item: Checked) -> dict[str, Any]:
    """A census for the manifest and the report; the layer whose channels differ most stands for the weights."""
    census = item.census
    widest = max(census.weights, key=lambda weight: weight.spread, default=None)
    return {
        "ops": dict(census.ops),
        "fused_activations": dict(census.fused_activations),
        "float_tensors": list(census.float_tensors),
        "weights": {w.name: [w.channels, w.largest, min(w.spread, 1e30)] for w in census.weights},
        "widest_layer": None if widest is None else widest.name,
        "widest_spread": None if widest is None else min(widest.spread, 1e30),
        "findings": [*item.broken, *item.advice],
    }


def file_metadata(context: StageContext, which: str) -> dict[str, Any]:
    """What is written into an exported file: labels, preprocessing, fold list, origin and licence of the weights.

    `recipe_hash` covers the parts of the recipe that decide the file, not those of later stages.
    """
    recipe = context.recipe
    baseline = context.inputs["baseline"]
    origin = dict(baseline.metrics["weights_origin"])
    return {
        **workbench.model_meta(recipe),
        "model": which,
        "input": recipe.export.input,
        "units_folded": [] if which == "baseline" else list(context.inputs["postfold"].metrics["units_folded"]),
        "labels": workbench.class_names(recipe, origin),
        "layerfold": pipeline.__version__,
        "seed": recipe.seed,
        "weights": origin,
        "licence": origin.get("licence") or "not stated by the source of the weights",
        "baseline_hash": baseline.manifest["hash"],
        "recipe_hash": context.stage.hash,
    }
