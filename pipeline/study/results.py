"""What a study found: the schema of `results.json`, and the table of `results.csv`."""

__all__ = ["CellResult", "KneeResult", "StudyResult", "as_csv", "find_knees"]

import csv
import io
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.study import knee
from pipeline.study.schema import Study


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CellResult(_Part):
    """One run. Depths are numbers of non-linear layers; accuracies are fractions of the evaluation images."""

    network: str
    lambda_c: float
    seed: int
    depth_before: int
    depth: int
    accuracy_before: float
    accuracy: float
    removed: dict[str, bool]
    """For each activation with an α, in network order, whether it is gone."""
    seconds: float
    """Wall time of pre-folding (and what follows, where that is measured)."""


class KneeResult(_Part):
    """A network's knee by both rules; hinge figures are None where there are too few points."""

    network: str
    within_tolerance: int
    """Smallest depth with no loss beyond the study's tolerance."""
    hinge: int | None
    hinge_low: int | None
    hinge_high: int | None
    plateau: float | None
    slope: float | None


class StudyResult(_Part):
    """Everything that a study's page shows."""

    schema_version: int = 1
    study: str
    description: str
    variant: Literal["full", "quick"]
    reduced: str
    measure: Literal["settled", "folded"]
    tolerance_points: float
    data: str
    eval_images: int
    versions: dict[str, str]
    cells: list[CellResult]
    knees: list[KneeResult]
    task_knee: int | None
    """The one knee that explains all networks best."""
    task_knee_low: int | None
    task_knee_high: int | None
    task_p_value: float | None
    """Of the likelihood-ratio test that the networks share it."""

    def curve(self, network: str) -> list[tuple[int, float]]:
        """(depth, accuracy) of a network's runs, shallow first."""
        return sorted((cell.depth, cell.accuracy) for cell in self.cells if cell.network == network)

    @property
    def networks(self) -> list[str]:
        """The networks in the study's order."""
        return list(dict.fromkeys(cell.network for cell in self.cells))


def find_knees(study: Study, cells: Sequence[CellResult]) -> tuple[list[KneeResult], knee.SharedKnee | None]:
    """Each network's knee, and the one they may share."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for cell in cells:
        curves.setdefault(cell.network, []).append((cell.depth, cell.accuracy))
    rows = []
    for network, points in curves.items():
        hinge = knee.fit_hinge(points)
        rows.append(
            KneeResult(
                network=network,
                within_tolerance=knee.tolerance_knee(points, study.tolerance_points / 100),
                hinge=None if hinge is None else hinge.knee,
                hinge_low=None if hinge is None else hinge.low,
                hinge_high=None if hinge is None else hinge.high,
                plateau=None if hinge is None else hinge.plateau,
                slope=None if hinge is None else hinge.slope,
            )
        )
    return rows, knee.shared_knee(curves)


def as_csv(result: StudyResult) -> str:
    """One line a run."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["network", "lambda_c", "seed", "depth_before", "depth", "accuracy_before", "accuracy", "removed", "seconds"]
    )
    for cell in result.cells:
        gone = " ".join(name for name, removed in cell.removed.items() if removed)
        row = [cell.network, f"{cell.lambda_c:g}", cell.seed, cell.depth_before, cell.depth]
        writer.writerow([*row, f"{cell.accuracy_before:.4f}", f"{cell.accuracy:.4f}", gone, f"{cell.seconds:.0f}"])
    return stream.getvalue()
