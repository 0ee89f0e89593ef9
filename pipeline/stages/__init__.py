"""The stages of a run, one module each, every one a function `run(context) -> metrics`.

A stage reads its parents' files and its own recipe sections, writes files under `context.work`, and returns plain
data. It never looks at other stages' folders, at the run folder or at the terminal.
"""

__all__ = ["Report", "StageContext", "StageFunction", "load_stage"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifacts import CHECKPOINTS, StageOutput
from pipeline.plan import PlannedStage
from pipeline.recipe import Recipe


class Report(Protocol):
    """How a stage tells what it is doing."""

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Moves the stage's bar to `done` of `total` (any unit) and sets the text beside it."""

    def say(self, text: str) -> None:
        """Writes a line to the log and, between the bars, to the terminal."""


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may use.

    Attributes:
        recipe: The whole recipe; a stage reads only the sections that its plan entry hashes, its parents' and `device`.
        stage: The planned stage.
        work: Folder to write to; files there when the stage returns become its output.
        inputs: The parents' outputs by name.
        report: Progress and log lines.
    """

    recipe: Recipe
    stage: PlannedStage
    work: Path
    inputs: Mapping[str, StageOutput]
    report: Report

    @property
    def checkpoints(self) -> Path:
        """Folder for what a killed stage resumes from."""
        folder = self.work / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        return folder


StageFunction = Callable[[StageContext], dict[str, Any]]


def load_stage(name: str) -> StageFunction:
    """The stage function of that name; imports its module, and so the heavy libraries, only now."""
    function: StageFunction = import_module(f"pipeline.stages.{name}").run
    return function
