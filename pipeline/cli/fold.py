"""`layerfold fold`: units of a model become one convolution each, without a recipe."""

__all__ = ["command"]

from pathlib import Path

import click

_EPILOG = """\b
Examples:
  layerfold fold runs/quickstart-1a2b3c4d/models/baseline.pt --units blocks.2.1,blocks.2.2 --out folded.pt
  layerfold inspect runs/quickstart-1a2b3c4d/models/baseline.pt --units
"""


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--units", required=True, help="Names of the units to fold, separated by commas.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folded model's file, e.g. folded.pt.")
@click.option("--border", type=click.Choice(["approximate", "exact"]), default="approximate", show_default=True)
def command(model: Path, units: str, out: Path, border: str) -> None:
    """Make the activations inside the given units of MODEL linear, fold each unit, and write the folded model.

    Nothing is trained, so expect the accuracy to fall: use a recipe to fine-tune before and after.
    """
    import torch

    from pipeline.errors import ModelError
    from pipeline.folding import counters, fold, linearise
    from pipeline.models import store

    if out.suffix != ".pt":
        raise ModelError(f"--out is '{out}', expected a .pt file", hint="write --out folded.pt")
    if not out.parent.is_dir():
        raise ModelError(f"--out: there is no folder {out.parent}", hint="make it first, or give another --out")
    stored = store.load(model)
    names = [name.strip() for name in units.split(",") if name.strip()]
    example = torch.zeros(1, 3, stored.meta["input_px"], stored.meta["input_px"])
    linear = linearise(stored.module, names)
    result = fold(linear, example, border="exact" if border == "exact" else "approximate", units=names)
    before, after = counters.count(stored.module, example), counters.count(result.model, example)
    store.save(out, result.model, {**stored.meta, "units_folded": names})
    for segment in result.segments:
        if segment.windows > 1:
            ratio = segment.macs_after / segment.macs_before
            click.echo(
                f"{segment.name}: {segment.windows} layers became one, MACs x{ratio:.2f}, border {segment.border}"
            )
    for skip in result.skipped:
        click.echo(f"left {', '.join(skip.names)}: {skip.reason}")
    click.echo(f"MACs {before.macs / 1e6:.2f} M to {after.macs / 1e6:.2f} M, depth {before.depth} to {after.depth}")
    click.echo(f"largest difference to the linearised model: {result.max_abs_error:.2e}")
    click.echo(f"{out}")
