"""`layerfold inspect`: what is inside a model file or a run folder."""

__all__ = ["command"]

import json
from pathlib import Path
from typing import Any

import click

_LABELS_SHOWN = 12
_EPILOG = """\b
Examples:
  layerfold inspect runs/quickstart-1a2b3c4d/models/folded.int8.tflite
  layerfold inspect folded.onnx --weights
  layerfold inspect folded.tflite --json
  layerfold inspect runs/quickstart-1a2b3c4d/models/baseline.pt --units
  layerfold inspect mobilenetv2_100 --units
"""


@click.command(epilog=_EPILOG)
@click.argument("what")
@click.option("--units", is_flag=True, help="List the fold units of a .pt file or of a model by name.")
@click.option("--weights", is_flag=True, help="List the weight range of every layer of an exported file.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print all of an exported file's census, or of a .pt file's record, as JSON.",
)
def command(what: str, units: bool, weights: bool, as_json: bool) -> None:
    """Show what is inside WHAT: a .tflite, .onnx, .pte or .pt file, or a run folder; with --units also a model's name.

    Of an exported file: its input and output, operators by type, activations fused into them, tensors that stayed
    float inside an int8 file, what keeps it from running well on a phone, and what it says about itself.
    """
    path = Path(what)
    if units:
        _units(what, path)
    elif path.is_dir():
        _run_folder(path)
    elif path.suffix in (".tflite", ".onnx", ".pte"):
        _model_file(path, weights=weights, as_json=as_json)
    else:
        _torch_file(path, as_json=as_json)


def _model_file(path: Path, *, weights: bool, as_json: bool) -> None:
    from pipeline.export import inspect

    census = inspect.census(path)
    if as_json:
        click.echo(json.dumps(census.as_dict(), indent=1))
        return
    click.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    for kind, ports in (("input", census.inputs), ("output", census.outputs)):
        for port in ports:
            click.echo(f"  {kind:<6} {port.name}: {port.dtype} {'×'.join(map(str, port.shape))}")
    for name, count in sorted(census.ops.items(), key=lambda item: (-item[1], item[0])):
        click.echo(f"  {count:5d} {name}")
    for name, count in sorted(census.fused_activations.items()):
        click.echo(f"  {count:5d} {name} fused into other operators")
    if weights:
        click.echo("  weights: channels, largest, largest over the median channel's")
        for layer in census.weights:
            click.echo(f"    {layer.name:<28} {layer.channels:5d}  {layer.largest:10.4g}  {layer.spread:8.3g}×")
    for finding in inspect.gate(census, float_tensors=_float_units(census.metadata)):
        click.echo(f"  ! {finding}")
    if census.metadata:
        click.echo(json.dumps(_shortened(census.metadata), indent=1, ensure_ascii=False))
    else:
        click.echo("  it says nothing about itself: no layerfold metadata")


def _float_units(content: dict[str, Any]) -> tuple[str, ...]:
    """Units that were asked to stay float when the file was quantised."""
    return tuple(content.get("quantised", {}).get("float_units", ()))


def _shortened(content: dict[str, Any]) -> dict[str, Any]:
    """A thousand labels would hide the rest; `--json` prints them."""
    labels = content.get("labels") or []
    if len(labels) <= _LABELS_SHOWN:
        return content
    return content | {"labels": [*labels[:_LABELS_SHOWN], f"… {len(labels) - _LABELS_SHOWN} more"]}


def _torch_file(path: Path, *, as_json: bool) -> None:
    from pipeline.models import store

    stored = store.load(path)
    parameters = sum(parameter.numel() for parameter in stored.module.parameters())
    if as_json:
        click.echo(json.dumps({"parameters": parameters, **stored.meta}, indent=1))
        return
    click.echo(f"{path}  {parameters:,} parameters")
    click.echo(json.dumps(_shortened(dict(stored.meta)), indent=1, ensure_ascii=False))


def _run_folder(folder: Path) -> None:
    from pipeline import artifacts
    from pipeline.errors import ArtifactError

    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ArtifactError(f"{folder} is no run folder: it has no manifest.json", hint="give a folder under runs/")
    try:
        content = json.loads(manifest.read_text())
        if "stage" in content:
            raise ArtifactError(
                f"{folder} is the folder of one stage, '{content['stage']}'",
                hint=f"give the run folder that it lies in: {folder.absolute().parent.parent}",
            )
        title, stages = f"recipe {content['recipe']}, seed {content['seed']}", content["stages"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{manifest} is damaged, or not a run folder's: {type(error).__name__}: {error}",
            hint="run the recipe again into another folder beside it: finished stages are taken over",
        ) from error
    click.echo(f"{folder}: {title}")
    for name, stage in stages:
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
