"""The self-contained HTML report: one file with style, tables and plots inside, readable from a mail attachment."""

__all__ = ["render"]

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import plots, table
from pipeline.results.schema import RunReport


def render(report: RunReport) -> str:
    """The report as one HTML page."""
    environment = Environment(
        loader=PackageLoader("pipeline.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=table.all_tables(report),
        facts=table.facts_lines(report),
        figures=[
            (title, Markup(svg))
            for title, svg in (
                ("Latency, folded over baseline", plots.latency_plot(report)),
                ("α during pre-folding", plots.alpha_progress_plot(report)),
                ("α after pre-folding", plots.alpha_plot(report)),
            )
            if svg
        ],
    )
