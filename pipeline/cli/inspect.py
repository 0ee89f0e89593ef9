"""`layerfold inspect`: what is inside a model file or a run folder."""

__all__ = ["command"]

import json
from pathlib import Path

import click

_EPILOG = """\b
Examples:
  layerfold inspect runs/quickstart-1a2b3c4d/models/folded.int8.tflite
  layerfold inspect runs/quickstart-1a2b3c4d/models/baseline.pt --units
  layerfold inspect mobilenetv2_100 --units
"""


@click.command(epilog=_EPILOG)
@click.argument("what")
@click.option("--units", is_flag=True, help="List the fold units of a .pt file or of a model by name.")
def command(what: str, units: bool) -> None:
    """Show what is inside WHAT: a .tflite, .onnx or .pt file, or a run folder; with --units also a model's name."""
    path = Path(what)
    if units:
        _units(what, path)
    elif path.is_dir():
        _run_folder(path)
    elif path.suffix in (".tflite", ".onnx"):
        _model_file(path)
    else:
        _torch_file(path)


def _model_file(path: Path) -> None:
    from pipeline.export import inspect, metadata

    census = inspect.census(path)
    click.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    for name, count in sorted(census.ops.items(), key=lambda item: (-item[1], item[0])):
        click.echo(f"  {count:5d} {name}")
    for name, count in sorted(census.fused_activations.items()):
        click.echo(f"  {count:5d} {name} fused into other operators")
    for finding in inspect.gate(census):
        click.echo(f"  ! {finding}")
    click.echo(json.dumps(metadata.read(path), indent=1))


def _torch_file(path: Path) -> None:
    from pipeline.models import store

    stored = store.load(path)
    parameters = sum(parameter.numel() for parameter in stored.module.parameters())
    click.echo(f"{path}  {parameters:,} parameters")
    click.echo(json.dumps(dict(stored.meta), indent=1))


def _run_folder(folder: Path) -> None:
    from pipeline import artifacts
    from pipeline.errors import ArtifactError

    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ArtifactError(f"{folder} is no run folder: it has no manifest.json", hint="give a folder under runs/")
    content = json.loads(manifest.read_text())
    click.echo(f"{folder}: recipe {content['recipe']}, seed {content['seed']}")
    for name, stage in content["stages"].items():
        path = folder / "stages" / stage
        if path.is_dir():
            output = artifacts.read(path)
            click.echo(f"  {name:<9} {output.manifest['duration_s']:8.1f} s  {output.metrics.get('summary', '')}")
        else:
            click.echo(f"  {name:<9} not done")


def _units(what: str, path: Path) -> None:
    from pipeline.folding.units import find_units
    from pipeline.models import store, zoo

    model = store.load(path).module if path.suffix == ".pt" else zoo.create(what, num_classes=1000)
    for unit in find_units(model):
        click.echo(f"{unit.name:<14} {unit.kind:<22} " + ("can fold" if unit.foldable else f"no: {unit.reason}"))
