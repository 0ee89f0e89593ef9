"""Stage 9: the table, as Markdown, JSON and self-contained HTML."""

__all__ = ["run"]

from typing import Any

from pipeline.report import html, table
from pipeline.results.collect import collect
from pipeline.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Gathers what the stages found and writes it three ways."""
    report = collect(context.recipe, context.inputs)
    (context.work / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (context.work / "report.md").write_text(table.markdown(report), encoding="utf-8")
    (context.work / "report.html").write_text(html.render(report), encoding="utf-8")
    return {"failures": report.failures, "summary": f"{len(report.failures)} checks failed" if report.failures else ""}
