"""The study's page: one HTML file with its figures inside."""

__all__ = ["render"]

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.study.results import StudyResult


def render(result: StudyResult, folder: Path) -> str:
    """The page as text; the figures are read from the folder and put inside."""
    environment = Environment(
        loader=PackageLoader("pipeline.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pictures = {
        name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in ("depth_accuracy", "layers")
    }
    return environment.get_template("study.html.j2").render(
        result=result, pictures=pictures, finding=finding(result), small=_too_few(result)
    )


def finding(result: StudyResult) -> str:
    """What the knees say about the claim that all networks of a task share one, in one sentence."""
    hinges = [row for row in result.knees if row.hinge is not None]
    if result.task_knee is None or result.task_p_value is None or len(hinges) < 2:
        return "Too few points to say whether the networks share a knee."
    spread = f"{min(row.hinge or 0 for row in hinges)} to {max(row.hinge or 0 for row in hinges)}"
    verdict = "no evidence against one shared knee" if result.task_p_value >= 0.05 else "the networks do not share one"
    return (
        f"Knees of the single networks lie at {spread} non-linear layers; the best common one is {result.task_knee} "
        f"(95 % interval {result.task_knee_low} to {result.task_knee_high}); likelihood-ratio test: "
        f"p = {result.task_p_value:.2g}, so {verdict}."
    )


def _too_few(result: StudyResult) -> list[str]:
    return [row.network for row in result.knees if row.hinge is None]
