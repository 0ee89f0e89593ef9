"""`layerfold export`: a model file to TFLite, ONNX and ExecuTorch, in the precisions asked for."""

__all__ = ["command"]

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeline.export.calibration import Calibration
    from pipeline.export.conversion import Checked
    from pipeline.export.input_format import PixelInput
    from pipeline.export.int8 import Int8Options
    from pipeline.models.store import StoredModel

_EPILOG = """\b
Examples:
  layerfold export runs/quickstart-1a2b3c4d/models/folded.pt
  layerfold export folded.pt --to onnx --precision fp32,fp16 --out exported
  layerfold export folded.pt --precision int8 --input uint8 --calibration photos/train-folder
  layerfold export folded.pt --precision int8 --calibration fashion_mnist --bias-correction
  layerfold export folded.pt --to executorch --precision fp32,int8 --calibration photos/train-folder
"""
_FORMATS = ("tflite", "onnx", "executorch")
_PRECISIONS = ("fp32", "fp16", "dynamic", "int8")


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "formats", default="tflite,onnx", show_default=True, help=f"Some of {','.join(_FORMATS)}.")
@click.option("--precision", "precisions", default="fp32", show_default=True, help=f"Some of {','.join(_PRECISIONS)}.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=None, help="Folder.  [default: beside MODEL]"
)
@click.option("--input", "input_kind", type=click.Choice(["float", "uint8"]), default="float", show_default=True,
              help="uint8: the file takes pixels and normalises them itself.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images of one inference.")
@click.option("--calibration", metavar="FOLDER|DATASET", default=None, help="Images for int8: a folder or a data set.")
@click.option("--calibration-images", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the calibration images.")
@click.option("--split-identity/--whole-kernels", default=True, show_default=True,
              help="Round folded residual kernels without their identity.")  # fmt: skip
@click.option("--equalise/--no-equalise", default=False, show_default=True, help="Cross-layer range equalisation.")
@click.option("--bias-correction/--no-bias-correction", default=True, show_default=True)
@click.option("--ranges", type=click.Choice(["minmax", "percentile", "mse"]), default="minmax", show_default=True)
@click.option("--percentile", type=click.FloatRange(50, 100), default=99.99, show_default=True)
@click.option("--per-tensor", is_flag=True, help="One weight scale a tensor instead of one a channel.")
@click.option("--float-units", default="", help="Units or layers that int8 files keep in float32, by commas.")
@click.option("--gate", type=click.Choice(["fail", "warn"]), default="fail", show_default=True,
              help="What transposes, float islands and foreign operators do.")  # fmt: skip
@click.option("--allow-operators", default="", help="Operators that your target runs beside the usual, by commas.")
def command(model: Path, formats: str, precisions: str, out: Path | None, **options: Any) -> None:
    """Convert MODEL (a .pt file that layerfold wrote) to TFLite, ONNX and ExecuTorch files.

    int8 needs images to calibrate on: a folder of training images, or the name of a data set, whose training part is
    drawn from. A damaged image is left out and named; the images of an evaluation set are refused.
    """
    from pipeline.export.conversion import require_formats
    from pipeline.export.int8 import Int8Options
    from pipeline.models import store

    wanted_formats = _names(formats, _FORMATS, "--to")
    wanted = _names(precisions, _PRECISIONS, "--precision")
    require_formats(wanted_formats, wanted)
    _require_calibration(wanted, options["calibration"])
    stored = store.load(model)
    int8 = Int8Options(
        split_identity=options["split_identity"],
        equalise=options["equalise"],
        bias_correction=options["bias_correction"],
        per_channel=not options["per_tensor"],
        ranges=options["ranges"],
        percentile=options["percentile"],
        float_units=tuple(_split(options["float_units"])),
    )
    folder = out if out is not None else model.parent
    _write(stored, folder, model.stem, wanted_formats, wanted, int8, options)


def _write(
    stored: "StoredModel",
    folder: Path,
    stem: str,
    formats: list[str],
    precisions: list[str],
    int8: "Int8Options",
    options: dict[str, Any],
) -> None:
    """Makes every file in a temporary folder and moves them out when all are whole and pass the gate."""
    import tempfile

    import torch

    import pipeline
    from pipeline.export import metadata
    from pipeline.export.conversion import EXPORTERS, SHRINKERS, check, file_name, to_int8, without_needless_pads
    from pipeline.export.int8 import operate
    from pipeline.export.lowering import lower

    meta = dict(stored.meta)
    pixels = _pixels(meta) if options["input_kind"] == "uint8" else None
    example = torch.zeros(options["batch"], 3, meta["input_px"], meta["input_px"])
    network, pads, _ = without_needless_pads(lower(stored.module, example), example, enlarge=False)
    content = meta | {"layerfold": pipeline.__version__, "input": options["input_kind"]}
    taken, ready = None, None
    if "int8" in precisions:
        taken = _calibration(meta, options)
        ready = operate(network, taken.batches, int8)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as text:
        work = Path(text)
        finished: list[Path] = []
        checked: list[Checked] = []
        for form in formats:
            float_file = work / file_name(stem, "fp32", form)
            info = EXPORTERS[form](network, example, float_file, pixels=pixels)
            for precision in precisions:
                path = work / file_name(stem, precision, form)
                extra: dict[str, Any] = {}
                if precision in ("fp16", "dynamic"):
                    info = SHRINKERS[form, precision](float_file, path)
                elif precision == "int8":
                    assert taken is not None and ready is not None
                    scratch = work / f"operated.{form}"
                    info, _ = to_int8(
                        form, network, ready, float_file, path, taken.batches, int8,
                        example=example, pixels=pixels, scratch=scratch,
                    )  # fmt: skip
                    extra = {"quantised": int8.as_dict(), "calibration": taken.as_dict()}
                metadata.write(path, content | extra | {"precision": precision, "converter": info.converter})
                float_units = int8.float_units if precision == "int8" else ()
                allowed = _split(options["allow_operators"])
                checked.append(check(path, pads=pads, allow_operators=allowed, float_units=float_units))
                finished.append(path)
        _judge(checked, options["gate"])
        for path in finished:
            target = path.replace(folder / path.name)
            click.echo(f"{target}  {target.stat().st_size / 1e6:.2f} MB")


def _calibration(meta: dict[str, Any], options: dict[str, Any]) -> "Calibration":
    """Reads the calibration images and names those that cannot be read."""
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.export.calibration import collect, open_images

    count, seed = options["calibration_images"], options["seed"]
    spec = Preprocessing.from_dict(_preprocess(meta))
    taken = collect(open_images(options["calibration"], spec, limit=count, seed=seed), asked=count, seed=seed)
    for damaged, reason in taken.skipped.items():
        click.echo(f"calibration: left out {damaged}: {reason}", err=True)
    if taken.skipped:
        click.echo(f"calibration: {len(taken.skipped)} damaged images left out, {taken.count} used", err=True)
    return taken


def _judge(checked: "list[Checked]", gate: str) -> None:
    from pipeline.errors import ExportError

    broken = [text for item in checked for text in item.broken]
    for text in dict.fromkeys(text for item in checked for text in item.advice):
        click.echo(f"note: {text}", err=True)
    if broken and gate == "fail":
        raise ExportError(
            f"the census gate fails: {'; '.join(broken)}",
            hint="name operators that your target runs with --allow-operators, or write the files with --gate warn",
        )
    for text in broken:
        click.echo(f"warning: {text}", err=True)


def _names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    from pipeline.errors import ExportError, nearest

    names = _split(text)
    for name in names or [""]:
        if name not in known:
            close = nearest(name, known)
            raise ExportError(
                f"{option}: '{name}' is none of {', '.join(known)}" + (f"; {close}" if close else ""),
                hint=f"write {option} {','.join(known[:2])}",
            )
    return list(dict.fromkeys(names))


def _require_calibration(precisions: list[str], calibration: str | None) -> None:
    from pipeline.errors import DataError

    if "int8" in precisions and calibration is None:
        raise DataError(
            "--precision int8 needs images to calibrate on",
            hint="give --calibration FOLDER (of training images) or a data set such as fashion_mnist; "
            "'dynamic' needs none",
        )


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _preprocess(meta: dict[str, Any]) -> dict[str, Any]:
    from pipeline.errors import ModelError

    found = meta.get("preprocess")
    if not isinstance(found, dict):
        raise ModelError(
            "the model file does not say how its images are preprocessed", hint="make it with `layerfold run`"
        )
    return found


def _pixels(meta: dict[str, Any]) -> "PixelInput":
    from pipeline.export.input_format import PixelInput

    found = _preprocess(meta)
    return PixelInput.of(found["mean"], found["std"])
