"""Gathers what the stages found into one `RunReport`, and reads such a report back."""

__all__ = ["collect", "load_report"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from pipeline.artifacts import StageOutput
from pipeline.errors import ArtifactError, RecipeError, nearest
from pipeline.recipe import Recipe
from pipeline.results.paper import IMAGENET_ROWS
from pipeline.results.schema import (
    CalibrationEntry,
    CensusRow,
    FileEntry,
    FileKind,
    LatencyRow,
    ModelResult,
    NoiseRow,
    OpinionRow,
    PaperRow,
    RunReport,
    VerifyRow,
)
from pipeline.versions import stack

FILE_SUFFIXES: dict[FileKind, str] = {
    "tflite_fp32": ".tflite",
    "tflite_int8": ".int8.tflite",
    "onnx_fp32": ".onnx",
    "onnx_int8": ".int8.onnx",
    "tflite_fp16": ".fp16.tflite",
    "tflite_dynamic": ".dynamic.tflite",
    "onnx_fp16": ".fp16.onnx",
    "onnx_dynamic": ".dynamic.onnx",
    "executorch_fp32": ".pte",
    "executorch_int8": ".int8.pte",
}


def collect(recipe: Recipe, stages: Mapping[str, StageOutput]) -> RunReport:
    """Builds the report of a run from its stages' outputs.

    Args:
        recipe: The run's recipe.
        stages: Outputs of all stages before the report, by name.
    """
    prefold, fold, verify = stages["prefold"].metrics, stages["fold"].metrics, stages["verify"].metrics
    rows = [VerifyRow.model_validate(row) for row in verify["files"]]
    opinions = [OpinionRow.model_validate(row) for row in verify["opinions"]]
    quantize = stages["quantize"].metrics
    latency = [LatencyRow.model_validate(row) for row in stages["bench"].metrics["latency"]]
    baseline = stages["baseline"].metrics
    return RunReport(
        recipe=recipe.name,
        variant=recipe.variant,
        description=recipe.description,
        seed=recipe.seed,
        model=recipe.model.name,
        input_px=recipe.model.input_px,
        weights=baseline["weights"],
        data=baseline["data"],
        eval_images=verify["eval_images"],
        labelled_images=verify["labelled_images"],
        versions=stack(),
        stage_hashes={name: output.manifest["hash"] for name, output in stages.items()},
        stage_seconds={name: output.manifest["duration_s"] for name, output in stages.items()},
        units_folded=fold["units_folded"],
        units_skipped=fold["units_skipped"],
        alphas=prefold["alphas"],
        alpha_trace=prefold["details"].get("alpha_trace", []),
        fold_max_abs_error=fold["max_abs_error"],
        fold_changed_predictions=fold["changed_predictions"],
        baseline=_model("baseline", baseline["counts"], verify, stages),
        folded=_model("folded", stages["postfold"].metrics["counts"], verify, stages),
        verify=rows,
        latency=latency,
        paper=paper_row(recipe.report.paper),
        batch=recipe.export.batch,
        opinions=opinions,
        census=_census(stages),
        noise=[NoiseRow.model_validate(row) for row in quantize["noise"]],
        calibration=CalibrationEntry.model_validate(quantize["calibration"]),
        quantised=quantize["options"],
        identities_apart=quantize["networks"]["folded"]["identities_apart"],
        failures=[f"{row.model} {row.kind}: {row.reason}" for row in rows if not row.passed]
        + [f"{row.model} {row.first} and {row.second}: {row.reason}" for row in opinions if not row.passed]
        + [f"bench {row.target} {row.precision}: {row.note}" for row in latency if row.failed],
    )


def paper_row(key: str | None) -> PaperRow | None:
    """The published row of that key.

    Raises:
        RecipeError: There is no such row.
    """
    if key is None:
        return None
    if key not in IMAGENET_ROWS:
        raise RecipeError(
            f"report.paper is '{key}', which is no published row; {nearest(key, IMAGENET_ROWS)}".rstrip("; "),
            hint=f"use one of {', '.join(IMAGENET_ROWS)}",
        )
    return IMAGENET_ROWS[key]


def load_report(path: Path) -> RunReport:
    """Reads a `report.json`.

    Raises:
        ArtifactError: The file is missing, no JSON, or of another schema.
    """
    try:
        return RunReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", hint="give a finished run's folder") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{path} does not fit the report schema: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}",
            hint="make it anew with `layerfold run`",
        ) from error


def _census(stages: Mapping[str, StageOutput]) -> list[CensusRow]:
    rows = []
    for which in ("baseline", "folded"):
        for kind, suffix in FILE_SUFFIXES.items():
            for stage in ("export", "quantize"):
                found = stages[stage].metrics["census"].get(f"{which}{suffix}")
                if found is not None:
                    shown = {key: value for key, value in found.items() if key != "weights"}
                    rows.append(CensusRow.model_validate({"model": which, "kind": kind, **shown}))
    return rows


def _model(
    which: str, counts: Mapping[str, int], verify: Mapping[str, Any], stages: Mapping[str, StageOutput]
) -> ModelResult:
    files: dict[FileKind, FileEntry] = {}
    for kind in get_args(FileKind):
        name = f"models/{which}{FILE_SUFFIXES[kind]}"
        for stage in ("export", "quantize"):
            entry = stages[stage].manifest["files"].get(name)
            if entry is not None:
                files[kind] = FileEntry(path=name, bytes=entry["bytes"], sha256=entry["sha256"])
    return ModelResult(
        params=counts["params"],
        macs=counts["macs"],
        depth=counts["depth"],
        accuracy=verify["accuracy"][which],
        agreement=verify["agreement"][which],
        files=files,
    )
