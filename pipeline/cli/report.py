"""`layerfold report`: a finished run's table again."""

__all__ = ["command"]

from pathlib import Path

import click

_EPILOG = """\b
Examples:
  layerfold report runs/quickstart-1a2b3c4d
  layerfold report runs/quickstart-1a2b3c4d --format markdown > table.md
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["table", "markdown", "json"]), default="table", show_default=True)
def command(folder: Path, style: str) -> None:
    """Print the table of the finished run in folder RUN (or of a report.json)."""
    from pipeline.report.table import markdown, terminal_table
    from pipeline.results.collect import load_report

    path = folder if folder.suffix == ".json" else folder / "report.json"
    report = load_report(path)
    if style == "markdown":
        click.echo(markdown(report))
    elif style == "json":
        click.echo(report.model_dump_json(indent=1))
    else:
        terminal_table(report)
