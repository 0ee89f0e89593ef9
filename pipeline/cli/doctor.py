"""`layerfold doctor`: what is installed, what is missing, and how to get it."""

__all__ = ["command"]

import click

_STYLES = {"ok": "green", "missing": "red", "broken": "red", "warning": "yellow", "optional": "yellow"}


@click.command(epilog="\b\nExamples:\n  layerfold doctor\n  layerfold doctor --json > doctor.json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Examine runtimes, versions, devices, data and weights. Exit code 2 when something needed is missing or broken."""
    import json
    from dataclasses import asdict

    from pipeline import doctor

    findings = doctor.examine()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    if any(finding.status in ("missing", "broken") for finding in findings):
        raise click.exceptions.Exit(2)


def _print(findings: list) -> None:  # type: ignore[type-arg]
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="layerfold doctor", title_justify="left")
    for column in ("area", "what", "status", "found", "to get or mend it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.status]
        status = f"[{style}]{finding.status}[/{style}]"
        table.add_row(finding.area, escape(finding.name), status, escape(finding.detail), escape(finding.fix))
    Console(width=None if Console().is_terminal else 140).print(table, highlight=False)
