"""`layerfold export`: a model file to TFLite and ONNX."""

__all__ = ["command"]

from pathlib import Path

import click

_EPILOG = """\b
Examples:
  layerfold export runs/quickstart-1a2b3c4d/models/folded.pt
  layerfold export folded.pt --to onnx --out exported
"""


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "formats", default="tflite,onnx", show_default=True, help="Formats, separated by commas.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=None, help="Folder.  [default: beside MODEL]"
)
def command(model: Path, formats: str, out: Path | None) -> None:
    """Convert MODEL (a .pt file that layerfold wrote) to float TFLite and ONNX files."""
    import torch

    from pipeline.errors import ExportError
    from pipeline.export import metadata, onnx, tflite
    from pipeline.models import store

    exporters = {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    for name in wanted:
        if name not in exporters:
            raise ExportError(f"--to: unknown format '{name}'", hint=f"give some of {', '.join(exporters)}")
    stored = store.load(model)
    folder = out if out is not None else model.parent
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(1, 3, stored.meta["input_px"], stored.meta["input_px"])
    for name in wanted:
        path = folder / f"{model.stem}.{name}"
        exporters[name](stored.module, example, path)
        metadata.write(path, dict(stored.meta))
        click.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
