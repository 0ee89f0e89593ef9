"""`MODEL_CARD.md`: what a reader must know before putting the exported files into an app."""

__all__ = ["ModelCard", "is_card", "write_card"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.export.census_types import Census
from pipeline.export.verify import FileReport
from pipeline.export.writing import replacing


@dataclass(frozen=True)
class ModelCard:
    """The content of a card.

    Attributes:
        name: The model's name.
        summary: One sentence: what it does.
        licence: Of the weights, as an SPDX expression or in words.
        weights: Where the weights came from.
        data: What it was trained, calibrated and evaluated on, a sentence each.
        preprocessing: From picture to input, as key and value.
        units_folded: Units that became one convolution; empty for a baseline.
        files: Census of each file.
        reports: Verification of each file; files without one say so.
        made_with: Versions and hashes, as key and value.
        limits: What the model must not be used for, or is known to fail at.
    """

    name: str
    summary: str
    licence: str
    weights: str
    data: Mapping[str, str]
    preprocessing: Mapping[str, object]
    units_folded: Sequence[str]
    files: Sequence[Census]
    reports: Sequence[FileReport] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)
    limits: Sequence[str] = ()


def write_card(card: ModelCard, path: Path | str) -> Path:
    """Writes a card as Markdown.

    Returns:
        The path.
    """
    reports = {report.file: report for report in card.reports}
    folded = ", ".join(f"`{unit}`" for unit in card.units_folded) or "none"
    lines = [
        f"# {card.name}",
        "",
        card.summary,
        "",
        f"- Licence of the weights: {card.licence}",
        f"- Weights: {card.weights}",
        f"- Units folded into one convolution: {folded}",
        *(f"- {key}: {value}" for key, value in card.data.items()),
        "",
        "## Files",
        "",
        "| file | MB | input | operators | top-1 | agreement with torch | verdict |",
        "|---|---|---|---|---|---|---|",
        *(_row(found, reports.get(found.file)) for found in card.files),
        "",
        "## Preprocessing",
        "",
        *(f"- {key}: {_text(value)}" for key, value in card.preprocessing.items()),
    ]
    if card.limits:
        lines += ["", "## Limits", "", *(f"- {limit}" for limit in card.limits)]
    if card.made_with:
        lines += ["", "## Made with", "", *(f"- {key}: {value}" for key, value in card.made_with.items())]
    target = Path(path)
    with replacing(target) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def is_card(path: Path) -> bool:
    """Whether a file is a card that layerfold wrote, and may be replaced by a newer one."""
    return "\n- layerfold: " in path.read_text(encoding="utf-8", errors="replace")


def _row(found: Census, report: FileReport | None) -> str:
    port = found.inputs[0]
    image = f"{port.dtype} {'×'.join(str(size) for size in port.shape)}"
    cells = [f"`{found.file}`", f"{found.bytes / 1e6:.2f}", image, str(sum(found.ops.values()))]
    if report is None:
        return _cells([*cells, "—", "—", "not verified"])
    top1 = "no labels" if report.top1 is None else f"{100 * report.top1:.2f}%"
    verdict = "passed" if report.passed else "failed: " + "; ".join(report.reasons)
    return _cells([*cells, top1, f"{100 * report.agreement:.2f}% of {report.images}", verdict])


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(value: object) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)
