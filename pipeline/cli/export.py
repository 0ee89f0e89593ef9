"""`layerfold export`: a model file to TFLite, ONNX and ExecuTorch, in the precisions asked for."""

__all__ = ["command"]

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from pipeline.data.preprocessing import Preprocessing
    from pipeline.data.sources import ImageSource
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
_NEEDS_IMAGES = "--precision int8 needs images to calibrate on"
_GIVE = "give --calibration FOLDER (of training images) or a data set such as fashion_mnist; 'dynamic' needs none"
_PRECISIONS = ("fp32", "fp16", "dynamic", "int8")


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "formats", default="tflite,onnx", show_default=True, help=f"Some of {','.join(_FORMATS)}.")
@click.option("--precision", "precisions", default="fp32", show_default=True, help=f"Some of {','.join(_PRECISIONS)}.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder.  [default: beside MODEL, or `exported` there in a run]")  # fmt: skip
@click.option("--input", "input_kind", type=click.Choice(["float", "uint8"]), default="float", show_default=True,
              help="uint8: the file takes pixels and normalises them itself.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images of one inference.")
@click.option(
    "--calibration",
    metavar="FOLDER|DATASET",
    default=None,
    help="Images for int8: a folder or a data set.  [default: what the model was trained on]",
)
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
    drawn from; a model that a run made brings its own data set. A damaged image is left out and named; the images of
    an evaluation set are refused. The files of a run stay as its report describes them: exports of its models go to
    `exported` beside them. MODEL_CARD.md describes the files of the last export.
    """
    from pipeline.export.conversion import require_formats
    from pipeline.export.int8 import Int8Options
    from pipeline.models import store

    wanted_formats = _names(formats, _FORMATS, "--to")
    wanted = _names(precisions, _PRECISIONS, "--precision")
    require_formats(wanted_formats, wanted)
    folder = _folder_of(model, out)
    stored = store.load(model)
    _require_size(model, stored)
    _require_calibration(wanted, options["calibration"], stored)
    int8 = Int8Options(
        split_identity=options["split_identity"],
        equalise=options["equalise"],
        bias_correction=options["bias_correction"],
        per_channel=not options["per_tensor"],
        ranges=options["ranges"],
        percentile=options["percentile"],
        float_units=tuple(_split(options["float_units"])),
    )
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
    import torch

    from pipeline.cli.progress import steps
    from pipeline.export import metadata
    from pipeline.export.conversion import (
        EXPORTERS,
        SHRINKERS,
        check,
        conversion_record,
        file_name,
        to_int8,
        without_needless_pads,
    )
    from pipeline.export.int8 import operate
    from pipeline.export.lowering import lower
    from pipeline.export.model_card import is_card, write_card
    from pipeline.export.provenance import card_of, file_content
    from pipeline.os_errors import os_errors_named

    meta = dict(stored.meta)
    pixels = _pixels(meta) if options["input_kind"] == "uint8" else None
    content = file_content(meta, stem, options["input_kind"])
    smaller = [name for name in precisions if name != "fp32"]
    total = 1 + 2 * ("int8" in precisions) + len(formats) * (1 + len(smaller))
    finished: list[Path] = []
    checked: list[Checked] = []
    with _scratch_inside(folder) as work, steps(f"export {stem}") as show:
        done = 0

        def next_step(text: str) -> None:
            nonlocal done
            show(done, total, text)
            done += 1

        next_step("to plain layers")
        example = torch.zeros(options["batch"], 3, meta["input_px"], meta["input_px"])
        network, pads, _ = without_needless_pads(lower(stored.module, example), example, enlarge=False)
        _require_float_units(int8.float_units, network)
        taken, ready = None, None
        if "int8" in precisions:
            next_step("reading calibration images")
            taken = _calibration(meta, options)
            next_step("made ready for int8")
            ready = operate(network, taken.batches, int8)
        scratch = work / "scratch"
        for form in formats:
            next_step(f"to {form}")
            float_file = work / file_name(stem, "fp32", form)
            float_info = EXPORTERS[form](network, example, float_file, pixels=pixels)
            for precision in precisions:
                path, info = work / file_name(stem, precision, form), float_info
                extra: dict[str, Any] = {}
                if precision in smaller:
                    next_step(f"{form} to {precision}")
                if precision in ("fp16", "dynamic"):
                    info = SHRINKERS[form, precision](float_file, path)
                elif precision == "int8":
                    assert taken is not None and ready is not None
                    info, _ = to_int8(
                        form, network, ready, float_file, path, taken.batches, int8,
                        example=example, pixels=pixels, scratch=scratch / f"operated.{form}",
                    )  # fmt: skip
                    extra = {"quantised": int8.as_dict(), "calibration": taken.as_dict()}
                metadata.write(path, content | extra | conversion_record(precision, info))
                for note in info.notes:
                    click.echo(f"{path.name}: {note}", err=True)
                float_units = int8.float_units if precision == "int8" else ()
                allowed = _split(options["allow_operators"])
                checked.append(check(path, pads=pads, allow_operators=allowed, float_units=float_units))
                finished.append(path)
        _judge(checked, options["gate"])
        with os_errors_named(folder):
            finished = [path.replace(folder / path.name) for path in finished]
            card = folder / "MODEL_CARD.md"
            if card.exists() and not is_card(card):
                click.echo(f"{card} is not layerfold's: left as it is", err=True)
            else:
                finished.append(write_card(card_of(stem, content, taken, [item.census for item in checked]), card))
    for target in finished:
        click.echo(f"{target}  {target.stat().st_size / 1e6:.2f} MB")


@contextmanager
def _scratch_inside(folder: Path) -> Iterator[Path]:
    """A temporary folder inside the output folder, made before the long work; a failure leaves neither."""
    import tempfile

    from pipeline.os_errors import os_errors_named

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with os_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".export-", dir=folder)
    try:
        with scratch as text:
            yield Path(text)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _folder_of(model: Path, out: Path | None) -> Path:
    """Where to write: beside the model, but never over the files that a run has recorded with their digests."""
    from pipeline.errors import ExportError

    if out is None:
        return model.parent / "exported" if _is_runs_own(model.parent) else model.parent
    if _is_runs_own(out):
        raise ExportError(
            f"{out} holds the files that a run has recorded: its report would no longer fit them",
            hint=f"leave --out away to write to {out / 'exported'}, or give another folder",
        )
    return out


def _is_runs_own(folder: Path) -> bool:
    whole = folder.resolve()
    return whole.name == "models" and (whole.parent / "manifest.json").is_file()


def _calibration(meta: dict[str, Any], options: dict[str, Any]) -> "Calibration":
    """Reads the calibration images and names those that cannot be read."""
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.export.calibration import collect, open_images

    count, seed = options["calibration_images"], options["seed"]
    spec = Preprocessing.from_dict(_preprocess(meta))
    if options["calibration"] is None:
        source = _own_images(meta, spec, count, seed)
    else:
        source = open_images(options["calibration"], spec, limit=count, seed=seed)
    taken = collect(source, asked=count, seed=seed)
    for damaged, reason in taken.skipped.items():
        click.echo(f"calibration: left out {damaged}: {reason}", err=True)
    if taken.skipped:
        click.echo(f"calibration: {len(taken.skipped)} damaged images left out, {taken.count} used", err=True)
    if options["calibration"] is None:
        click.echo(f"calibration: {taken.count} images of {taken.source}, as the model's recipe trained on", err=True)
    return taken


def _own_images(meta: dict[str, Any], spec: "Preprocessing", count: int, seed: int) -> "ImageSource":
    """The calibration split of the data set that the model was trained on."""
    from pipeline.data import datasets
    from pipeline.errors import DataError

    data = meta["data"]
    try:
        found = datasets.resolve(data["name"], data.get("root"), data.get("fallback"))
        return datasets.open_split(found, "calibration", spec, limit=count, seed=seed)
    except DataError as error:
        raise DataError(f"{_NEEDS_IMAGES}, and the model's own are not to be had: {error.what}", hint=_GIVE) from error


def _require_float_units(names: tuple[str, ...], network: "GraphModule") -> None:
    """Finds a misspelt name before the long conversions."""
    from pipeline.errors import ExportError, nearest

    known = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in known:
            raise ExportError(
                "; ".join(filter(None, [f"--float-units: no layer or unit is called '{name}'", nearest(name, known)])),
                hint="`layerfold inspect MODEL.pt --units` lists the units",
            )


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


def _require_size(model: Path, stored: "StoredModel") -> None:
    from pipeline.errors import ModelError

    if not isinstance(stored.meta.get("input_px"), int):
        raise ModelError(f"{model} does not say its input_px", hint="make it with `layerfold run` or `layerfold fold`")


def _require_calibration(precisions: list[str], calibration: str | None, stored: "StoredModel") -> None:
    from pipeline.errors import DataError

    if "int8" in precisions and calibration is None and not isinstance(stored.meta.get("data"), dict):
        raise DataError(_NEEDS_IMAGES, hint=_GIVE)


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
