"""Runs a study cell by cell: every one an ordinary run that stops before export, so it is cached and resumable.

Runs of one network share their baseline, since a stage of equal hash is copied from its sibling.
"""

__all__ = ["CellStates", "cell_states", "execute"]

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from pipeline import facts, runner
from pipeline.artifacts import StageOutput, write_atomic
from pipeline.errors import ArtifactError, RunFolderError
from pipeline.os_errors import os_errors_named
from pipeline.plan import Plan, build
from pipeline.runner import RunEvents, StageState
from pipeline.study import figures, page
from pipeline.study.results import CellResult, StudyResult, as_csv, find_knees
from pipeline.study.schema import Cell, Study, cells
from pipeline.versions import stack

_STAGES = {"settled": ("baseline", "prefold"), "folded": ("baseline", "prefold", "fold", "postfold")}
_STUDY_FILE = "study.yaml"


@dataclass(frozen=True)
class CellStates:
    """A cell, its plan cut to the stages that a study needs, and how far each stage is."""

    cell: Cell
    plan: Plan
    folder: Path
    states: Mapping[str, StageState]


def cell_states(study: Study, folder: Path, say: Callable[[str], None]) -> list[CellStates]:
    """Plans every cell.

    Args:
        study: The checked study.
        folder: The study's folder, which need not exist.
        say: Told what is being downloaded.
    """
    found = []
    for cell in cells(study):
        planned = build(cell.recipe, facts.gather(cell.recipe, say=say))
        wanted = _STAGES[study.measure]
        cut = replace(planned, stages=tuple(stage for stage in planned.stages if stage.name in wanted))
        place = folder / "cells" / cell.folder
        found.append(CellStates(cell, cut, place, runner.stage_states(cut, place)))
    return found


def execute(
    study: Study, folder: Path, events: Callable[[Plan, str], RunEvents], say: Callable[[str], None]
) -> StudyResult:
    """Runs what is not done yet, and writes results after every cell, figures and page at the end.

    Args:
        study: The checked study.
        folder: Its folder: `cells/`, `results.json`, `results.csv`, `depth_accuracy.png`, `layers.png`, `report.html`.
        events: Makes the watcher of a cell's run from its plan and a title.
        say: Told what is being downloaded.

    Raises:
        RunFolderError: The folder belongs to another study, another process is at work in it, or it cannot be written.
        LayerfoldError: Whatever a stage raises; the same command resumes.
    """
    with os_errors_named(folder, again="run the same command again: it resumes"):
        return _execute(study, folder, events, say)


def _execute(
    study: Study, folder: Path, events: Callable[[Plan, str], RunEvents], say: Callable[[str], None]
) -> StudyResult:
    _prepare(study, folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"another run is at work in {folder}", hint="wait for it to end, or give another --out"
        ) from error
    try:
        write_atomic(folder / _STUDY_FILE, yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True))
        planned = cell_states(study, folder, say)
        results: list[CellResult] = []
        for number, entry in enumerate(planned, start=1):
            title = f"[{number}/{len(planned)}] {entry.cell.network}, λ_c {entry.cell.lambda_c:g}"
            if len(study.seeds) > 1:
                title += f", seed {entry.cell.seed}"
            outcome = runner.execute(entry.plan, entry.folder, events(entry.plan, title))
            results.append(_result(entry.cell, outcome.outputs))
            found = _gather(study, results, outcome.outputs)
            write_atomic(folder / "results.json", found.model_dump_json(indent=1))
            write_atomic(folder / "results.csv", as_csv(found))
        render(found, folder)
    finally:
        lock.release()
    return found


def render(result: StudyResult, folder: Path) -> None:
    """Draws the figures and writes the page of a study's results into a folder."""
    figures.depth_accuracy(result, folder / "depth_accuracy.png")
    figures.layers(result, folder / "layers.png")
    write_atomic(folder / "report.html", page.render(result, folder))


def _prepare(study: Study, folder: Path) -> None:
    mark = folder / _STUDY_FILE
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder", hint="give another folder with --out")
    if mark.is_file():
        try:
            owner = yaml.safe_load(mark.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunFolderError(
                f"{mark} is damaged: {' '.join(str(error).split())}", hint="delete it, or give another --out"
            ) from error
        if not isinstance(owner, dict) or owner.get("name") != study.name:
            raise RunFolderError(f"{folder} belongs to another study", hint="give another folder with --out")
    elif folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise RunFolderError(
            f"{folder} is not empty and holds no study (it has no {_STUDY_FILE})", hint="give an empty or new --out"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _result(cell: Cell, outputs: Mapping[str, StageOutput]) -> CellResult:
    baseline, prefold = outputs["baseline"].metrics, outputs["prefold"].metrics
    last: Mapping[str, Any] = outputs["postfold"].metrics if "postfold" in outputs else prefold
    if last["evaluation"]["top1"] is None:
        raise ArtifactError(
            f"the evaluation images of network '{cell.network}' have no labels, so there is no accuracy to plot",
            hint="take a data set with labels",
        )
    threshold = cell.recipe.prefold.threshold
    return CellResult(
        network=cell.network,
        lambda_c=cell.lambda_c,
        seed=cell.seed,
        depth_before=baseline["counts"]["depth"],
        depth=last["counts"]["depth"],
        accuracy_before=baseline["evaluation"]["top1"],
        accuracy=last["evaluation"]["top1"],
        removed={name: value > threshold for name, value in prefold["alphas"].items()},
        seconds=sum(output.manifest["duration_s"] for name, output in outputs.items() if name != "baseline"),
    )


def _gather(study: Study, results: list[CellResult], outputs: Mapping[str, StageOutput]) -> StudyResult:
    rows, shared = find_knees(study, results)
    baseline = outputs["baseline"].metrics
    return StudyResult(
        study=study.name,
        description=study.description,
        variant=study.variant,
        reduced=study.reduced,
        measure=study.measure,
        tolerance_points=study.tolerance_points,
        data=baseline["data"],
        eval_images=baseline["evaluation"]["count"],
        versions=stack(),
        cells=list(results),
        knees=rows,
        task_knee=None if shared is None else shared.knee,
        task_knee_low=None if shared is None else shared.low,
        task_knee_high=None if shared is None else shared.high,
        task_p_value=None if shared is None else shared.p_value,
    )


def load_result(path: Path) -> StudyResult:
    """Reads a `results.json`.

    Raises:
        ArtifactError: It is missing or of another schema.
    """
    try:
        return StudyResult.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="make it anew with `layerfold run`") from error
