"""`layerfold devices`: the targets, and the devices that are attached."""

__all__ = ["command"]

import json

import click


@click.command(epilog="\b\nExamples:\n  layerfold devices\n  layerfold devices --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """List the devices that models can be measured on, and the names to give to --target."""
    from rich.console import Console
    from rich.table import Table

    import targets

    found = targets.devices()
    if as_json:
        click.echo(json.dumps([device.as_dict() for device in found], indent=1))
        return
    table = Table(title="devices", title_justify="left")
    for column in ("id", "kind", "name", "arch", "cores", "memory", "state"):
        table.add_column(column)
    for device in found:
        memory = f"{device.memory_mb / 1024:.1f} GiB" if device.memory_mb else ""
        table.add_row(device.id, device.kind, device.name, device.arch, str(device.cores or ""), memory, device.state)
    Console(width=None if Console().is_terminal else 140).print(table)
    click.echo(f"targets: {', '.join(targets.names())}")
