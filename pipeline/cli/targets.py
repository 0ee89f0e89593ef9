"""`layerfold targets`: what models can be measured on, and building what has to be built first."""

__all__ = ["command"]

import json
import time
from pathlib import Path
from types import MappingProxyType

import click

_EPILOG = """\b
Examples:
  layerfold targets list
  layerfold targets setup emulated-arm64
"""
_SETUP_EPILOG = """\b
Examples:
  layerfold targets setup emulated-arm64
  layerfold targets setup emulated-arm64 --folder /mnt/large/arm64
  layerfold bench folded.tflite --baseline baseline.tflite --target emulated-arm64

Run it again after an interruption: it goes on where it was, and repairs files whose SHA-256 has changed.
"""
_WHAT = MappingProxyType(
    {
        "host-litert": "this machine, LiteRT with XNNPACK: milliseconds",
        "host-ort": "this machine, ONNX Runtime: milliseconds",
        "emulated-arm64": "a Cortex-A76 in QEMU, the real aarch64 runtimes: executed instructions, cache misses",
        "android": "a phone behind adb (android:SERIAL), by the runtimes' own tools: milliseconds",
        "ssh": "a Linux board behind OpenSSH (ssh:user@board): milliseconds",
        "ethos-u": "Arm's estimate for an Ethos-U (ethos-u:ethos-u55-256): NPU cycles",
        "qnn-htp": "Qualcomm's compiler for Hexagon (qnn-htp:75): does the model compile whole?",
    }
)


@click.group(epilog=_EPILOG)
def command() -> None:
    """List what models can be measured on, and set up what has to be built first."""


@command.command("list", epilog="\b\nExamples:\n  layerfold targets list\n  layerfold targets list --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_targets(as_json: bool) -> None:
    """List the names to give to --target, what each runs and says; `layerfold devices` lists what is attached."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import targets
    from targets.registry import options

    rows = [
        {"name": name, "gives": _WHAT.get(name, "registered by another package"), "options": options(name)}
        for name in targets.names()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(title="targets", title_justify="left")
    for column in ("name", "what it is and gives", "options (--option NAME=VALUE)"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(escape(row["name"]), escape(row["gives"]), escape(row["options"]))
    Console(width=None if Console().is_terminal else 140).print(table, highlight=False)


@command.command(epilog=_SETUP_EPILOG)
@click.argument("name", metavar="TARGET", type=click.Choice(["emulated-arm64"]))
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Where to build.  [default: the user's cache]",
)
def setup(name: str, folder: Path | None) -> None:
    """Build what TARGET needs: a root of 300 MB with Debian's arm64 Python, the aarch64 wheels, and QEMU.

    Packages and wheels are fetched by this machine's own apt and pip, which check what they fetch; no root rights are
    needed and nothing is installed.
    """
    from pipeline.cli.progress import bars
    from targets import emulated_setup

    started = time.monotonic()
    with bars([f"setting up {name}"]) as (advance,):
        told: list[str] = []

        def on_step(done: float, what: str) -> None:
            advance(round(1000 * done), 1000)
            if what not in told:
                told.append(what)
                elapsed_s = time.monotonic() - started
                left = f", about {elapsed_s * (1 - done) / done:.0f} s left" if done > 0 else ""
                click.echo(f"{100 * done:3.0f}% after {elapsed_s:.0f} s{left}: {what}", err=True)

        root = emulated_setup.setup(on_step, folder=folder)
    versions = ", ".join(f"{package} {version}" for package, version in root.versions.items())
    click.echo(f"ready in {root.folder}: {versions}, QEMU {root.qemu}")
    if folder is not None:
        click.echo(f"give it to the target: --option emulated-arm64.folder={root.folder}")
