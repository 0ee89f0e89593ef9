"""Runs a plan in a run folder: skips what is cached, locks the folder, resumes what was killed."""

__all__ = ["RunEvents", "RunOutcome", "StageState", "execute", "stage_states"]

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import yaml
from filelock import FileLock, Timeout

from pipeline import artifacts
from pipeline.artifacts import StageOutput
from pipeline.errors import ArtifactError, RunFolderError
from pipeline.os_errors import os_errors_named
from pipeline.plan import Plan, PlannedStage
from pipeline.recipe import Recipe
from pipeline.stages import Report, StageContext, load_stage
from pipeline.versions import stack

_MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_log = logging.getLogger("pipeline.runner")

StageState = Literal["cached", "shared", "resumable", "to run"]


class RunEvents(Protocol):
    """Who watches a run: the terminal's progress bars, or a test."""

    def stage_started(self, stage: PlannedStage, *, resumed: bool) -> Report:
        """A stage begins; the returned object takes its progress."""

    def stage_finished(self, stage: PlannedStage, output: StageOutput, *, cached: bool) -> None:
        """A stage is done, or was found done."""


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: its folder and every stage's output by name."""

    folder: Path
    outputs: Mapping[str, StageOutput]


def stage_states(plan: Plan, folder: Path) -> dict[str, StageState]:
    """For every stage whether it is done here (`cached`), in a sibling run (`shared`), half done, or to run."""
    states: dict[str, StageState] = {}
    for stage in plan.stages:
        here = folder / "stages" / stage.folder
        if here.is_dir():
            states[stage.name] = "cached"
        elif _siblings(folder, stage):
            states[stage.name] = "shared"
        elif here.with_name(here.name + _PARTIAL).is_dir():
            states[stage.name] = "resumable"
        else:
            states[stage.name] = "to run"
    return states


def execute(plan: Plan, folder: Path, events: RunEvents) -> RunOutcome:
    """Runs every stage of the plan that is not done yet and publishes models and report in the run folder.

    Args:
        plan: What to run.
        folder: The run folder; made if missing.
        events: Told of every stage's start, progress and end.

    Raises:
        RunFolderError: The folder is locked, belongs to another recipe, cannot be written, or the disk is full.
        LayerfoldError: Whatever a stage raises; its working folder stays and the next run resumes.
    """
    with os_errors_named(folder, again="run the same command again: it resumes"):
        _prepare(folder, plan.recipe)
        with _locked(folder), _log_file(folder / "run.log"):
            write = artifacts.write_atomic
            write(folder / "recipe.yaml", yaml.safe_dump(plan.recipe.resolved(), sort_keys=False))
            write(folder / _MANIFEST, json.dumps(_run_manifest(plan), indent=1))
            outputs: dict[str, StageOutput] = {}
            for stage in plan.stages:
                inputs = {parent: outputs[parent] for parent in stage.parents}
                outputs[stage.name] = _one_stage(plan.recipe, stage, folder, inputs, events)
            _publish(outputs, folder)
    return RunOutcome(folder, outputs)


class _Logged:
    """A stage's report whose lines also go to the run's log, for those who read it when the terminal is gone."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report = report
        self._stage = stage

    def progress(self, done: float, total: float, text: str = "") -> None:
        self._report.progress(done, total, text)

    def say(self, text: str) -> None:
        _log.info("stage %s: %s", self._stage, text)
        self._report.say(text)


def _one_stage(
    recipe: Recipe, stage: PlannedStage, folder: Path, inputs: Mapping[str, StageOutput], events: RunEvents
) -> StageOutput:
    final = folder / "stages" / stage.folder
    done = _find_done(stage, folder, final)
    if done is not None:
        events.stage_finished(stage, done, cached=True)
        return done
    work = final.with_name(final.name + _PARTIAL)
    resumed = work.is_dir()
    work.mkdir(parents=True, exist_ok=True)
    report = events.stage_started(stage, resumed=resumed)
    _log.info("stage %s starts in %s%s", stage.name, work.name, " (resumed)" if resumed else "")
    started = time.monotonic()
    context = StageContext(recipe=recipe, stage=stage, work=work, inputs=inputs, report=_Logged(report, stage.name))
    metrics = load_stage(stage.name)(context)
    duration_s = time.monotonic() - started
    output = artifacts.commit(
        work, final, stage, metrics=metrics, versions=stack(), seed=recipe.seed, duration_s=duration_s
    )
    _log.info("stage %s done in %.1f s: %s", stage.name, duration_s, metrics.get("summary", ""))
    events.stage_finished(stage, output, cached=False)
    return output


def _find_done(stage: PlannedStage, folder: Path, final: Path) -> StageOutput | None:
    """The stage's output from this run folder, or brought over from a sibling run; damaged ones are set aside."""
    if not final.is_dir():
        for sibling in _siblings(folder, stage):
            try:
                artifacts.read(sibling)
            except ArtifactError as error:
                _log.warning("not sharing %s: %s", sibling, error.what)
                continue
            _copy_stage(sibling, final)
            _log.info("stage %s shared from %s", stage.name, sibling)
            break
    if not final.is_dir():
        return None
    try:
        return artifacts.read(final)
    except ArtifactError as error:
        aside = final.with_name(f"{final.name}.damaged-{int(time.time())}")
        final.rename(aside)
        _log.warning("stage %s: %s; kept as %s and run anew", stage.name, error.what, aside.name)
        return None


def _copy_stage(sibling: Path, final: Path) -> None:
    """Copies a finished stage file by file: `copytree` gathers errors into one that no longer says what they were."""
    copying = final.with_name(final.name + ".copying")
    shutil.rmtree(copying, ignore_errors=True)
    try:
        copying.mkdir()
        for path in sorted(sibling.rglob("*")):
            target = copying / path.relative_to(sibling)
            if path.is_dir():
                target.mkdir()
                continue
            try:
                shutil.copy2(path, target)
            except OSError as error:
                error.filename = error.filename or str(target)
                raise
        copying.rename(final)
    finally:
        shutil.rmtree(copying, ignore_errors=True)


def _siblings(folder: Path, stage: PlannedStage) -> list[Path]:
    if not folder.parent.is_dir():
        return []
    found = sorted(folder.parent.glob(f"*/stages/{stage.folder}"))
    return [path for path in found if path.parent.parent.resolve() != folder.resolve() and path.is_dir()]


def _prepare(folder: Path, recipe: Recipe) -> None:
    manifest = folder / _MANIFEST
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder", hint="give another folder with --out")
    if manifest.is_file():
        try:
            owner = json.loads(manifest.read_text())["recipe"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{manifest} is damaged: {error}", hint="delete it, or give another --out") from error
        if owner != recipe.name:
            raise RunFolderError(
                f"{folder} is a run folder of recipe '{owner}', not of '{recipe.name}'",
                hint="give another folder with --out",
            )
    elif folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise RunFolderError(
            f"{folder} is not empty and is no run folder (it has no {_MANIFEST})",
            hint="give an empty or new folder with --out",
        )
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise RunFolderError(f"{folder} cannot be written", hint="give a writable folder with --out")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"another run is at work in {folder}",
            hint="wait for it to end, or give another folder with --out",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("pipeline")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that a stage imports put handlers on the root logger
    try:
        yield
    except BaseException as error:
        _log.error("run stopped: %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


def _run_manifest(plan: Plan) -> dict[str, object]:
    return {
        "format": 1,
        "recipe": plan.recipe.name,
        "seed": plan.recipe.seed,
        "versions": stack(),
        "stages": {stage.name: stage.folder for stage in plan.stages},
    }


def _publish(outputs: Mapping[str, StageOutput], folder: Path) -> None:
    """Lays the models and the report where users look for them; unchanged files are left alone."""
    for output in outputs.values():
        for name, entry in output.manifest["files"].items():
            if not name.startswith("models/") and output.manifest["stage"] != "report":
                continue
            target = folder / name
            if target.is_file() and artifacts.sha256_of(target) == entry["sha256"]:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                shutil.copyfile(output.folder / name, temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
