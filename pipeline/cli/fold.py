"""`layerfold fold`: units of a model become one convolution each, without a recipe."""

__all__ = ["command"]

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from pipeline.data.sources import ImageSource
    from pipeline.folding import ClosedFormResult, Selection, UnitFit
    from pipeline.folding.selection import Trial
    from pipeline.models.store import StoredModel

_HOLDOUT = 0.3
_BATCH = 16
_KEPT_BYTES = 2 << 30
_EPILOG = """\b
Examples:
  layerfold fold runs/quickstart-1a2b3c4d/models/baseline.pt --units blocks.2.1,blocks.2.2 --out folded.pt
  layerfold fold tf_efficientnet_lite0 --units blocks.3.2 --method closed_form --data photos --out folded.pt
  layerfold fold tf_efficientnet_lite0 --units auto --keep-agreement 0.85
  layerfold fold my.pt --units auto --keep-agreement 0.9 --save-by macs --data imagefolder --root photos --out f.pt
  layerfold inspect tf_efficientnet_lite0 --units

With --units auto, units are taken greedily by what they save for each prediction lost. The time saved is measured, not
looked up: each unit and its plain fold become TFLite files of their own and run in turns on --target, two processes
each, about ten seconds a unit. A unit alone is quicker than inside its network, so these times rank units and do not
add up; one whose measurement shows no difference saves nothing. A table and a plot of every unit's sensitivity are
written beside the folded model.
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option("--units", required=True, help="Units to fold, separated by commas; or `auto`.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="The folded model's file.  [default: <model>-folded.pt, beside the model's file]",
)
@click.option(
    "--method",
    type=click.Choice(["linear", "closed_form"]),
    default=None,
    help="Take the activations away and merge, or fit each convolution to images.  [default: linear; for auto: "
    "closed_form]",
)
@click.option(
    "--border",
    type=click.Choice(["approximate", "exact"]),
    default="approximate",
    show_default=True,
    help="Of `linear`: compose kernels as the papers do, or keep every value up to the border.",
)
@click.option(
    "--keep-agreement",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Of `auto`: least share of predictions that stay, on images kept for the choice.",
)
@click.option(
    "--save-by",
    type=click.Choice(["latency", "macs"]),
    default=None,
    help="Of `auto`: what a unit's fold should save.  [default: latency; macs, with a line that says so, where units "
    "cannot be measured alone or no unit shows a difference]",
)
@click.option("--target", default="host-litert", show_default=True, help="Of `--save-by latency`: where to measure.")
@click.option(
    "--data",
    default=None,
    help="Of `closed_form`: data set to fit to, by name (as data.name of a recipe); needs no labels.  [default: "
    "photos, those that packages bring]",
)
@click.option("--root", type=click.Path(path_type=Path), default=None, help="Folder of the data set.")
@click.option("--images", default=300, show_default=True, type=click.IntRange(min=10), help="Images to fit to.")
@click.option("--ridge", default=1e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option(
    "--refit",
    type=click.Choice(["none", "bias", "pointwise", "all"]),
    default="none",
    show_default=True,
    help="Of `closed_form`: which layers behind a folded unit are fitted anew.",
)
@click.option(
    "--window-steps",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of `closed_form`: so many steps of fine-tuning of each folded unit with the block behind it, e.g. 300.",
)
@click.option("--seed", default=0, show_default=True)
def command(model: str, units: str, out: Path | None, method: str | None, border: str, **chosen: Any) -> None:
    """Fold units of MODEL, a .pt file or the name of a published network, and write the folded model.

    Labels are never needed. To fine-tune the whole network before and after the fold, use a recipe.
    """
    from pipeline.errors import ModelError, RecipeError
    from pipeline.models.opening import open_model

    auto = units.strip() == "auto"
    method = method or ("closed_form" if auto else "linear")
    out = out or _beside(model)
    if out.suffix != ".pt":
        raise ModelError(f"--out is '{out}', expected a .pt file", hint="write --out folded.pt")
    if not out.parent.is_dir():
        raise ModelError(f"--out: there is no folder {out.parent}", hint="make it first, or give another --out")
    if auto and method == "linear":
        raise RecipeError("--units auto chooses units by their closed form", hint="leave --method out")
    if chosen["data"] is None and chosen["root"] is not None:
        raise RecipeError("--root is given, but --data is not", hint="--data imagefolder, for instance")
    stored = open_model(model)
    names = list(dict.fromkeys(name.strip() for name in units.split(",") if name.strip()))
    if not names:
        raise RecipeError(f"--units '{units}' names no unit", hint="layerfold inspect MODEL --units lists them")
    if method == "linear":
        _fold_linear(stored, names, out, border)
    else:
        _fold_closed(stored, None if auto else names, out, chosen)


def _beside(model: str) -> Path:
    """`<model>-folded.pt`: beside a file, in the current folder for a network by name."""
    return Path(f"{model.removesuffix('.pt')}-folded.pt")


def _fold_linear(stored: "StoredModel", names: list[str], out: Path, border: str) -> None:
    from pipeline.errors import UnitError
    from pipeline.folding import fold, linearise

    example = _example(stored)
    linear = linearise(stored.module, names)
    result = fold(linear, example, border="exact" if border == "exact" else "approximate", units=names)
    folded = [name for name in names if any(name in segment.units for segment in result.segments)]
    if not folded:
        reasons = "; ".join(f"{', '.join(skip.names)}: {skip.reason}" for skip in result.skipped)
        raise UnitError(
            f"no convolutions were merged in {', '.join(names)}: {reasons or 'there is one convolution each'}",
            hint="--border approximate merges more" if border == "exact" else "name other units",
        )
    _save(stored, result.model, folded, out)
    for segment in result.segments:
        if segment.windows > 1:
            ratio = segment.macs_after / segment.macs_before
            click.echo(
                f"{segment.name}: {segment.windows} layers became one, MACs x{ratio:.2f}, border {segment.border}"
            )
    for skip in result.skipped:
        click.echo(f"left {', '.join(skip.names)}: {skip.reason}")
    _say_counts(stored, result.model)
    click.echo(f"largest difference to the linearised model: {result.max_abs_error:.2e}")
    click.echo(f"{out}")


def _fold_closed(stored: "StoredModel", names: list[str] | None, out: Path, chosen: dict[str, Any]) -> None:
    from pipeline.data import datasets
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.folding import closed_form_fold, closeness

    preprocessing = Preprocessing.from_dict(stored.meta["preprocess"])
    found = datasets.resolve(chosen["data"] or "photos", chosen["root"], say=lambda text: click.echo(text, err=True))
    click.echo(f"{found.note}", err=True)
    seed = chosen["seed"]

    def opened(split: str, *, limit: int | None = None) -> "ImageSource":
        return datasets.open_split(found, split, preprocessing, limit=limit, seed=seed, holdout=_HOLDOUT)

    train = opened("train", limit=chosen["images"])
    report = opened("eval", limit=chosen["images"])

    size = min(_BATCH, len(train))

    def read() -> "Iterator[torch.Tensor]":
        for batch, _ in train.batches(size, train=True, seed=seed):
            yield batch

    # Every trial reads all images: they are decoded once where they fit.
    nbytes = 12 * len(train) * preprocessing.input_px**2
    images = list(read()) if names is None and nbytes <= _KEPT_BYTES else read
    options = {"ridge": chosen["ridge"], "refit": chosen["refit"], "batch_size": size, "seed": seed}
    selection, measure = None, ""
    if names is None:
        selection, measure = _select(stored, images, opened("select"), chosen, options)
        if selection.result is None:
            _write_scan(selection, chosen["keep_agreement"], measure, out)
            best = max((trial.closeness.agreement for trial in selection.trials), default=0.0)
            click.echo(f"no unit can fold at an agreement of {chosen['keep_agreement']:g}: {out} is not written; "
                       f"the best of those tried keeps {best:.3f}")  # fmt: skip
            return
        result, names = selection.result, list(selection.units)
    elif not chosen["window_steps"]:
        click.echo(f"fitting {len(names)} unit(s) to {len(train)} images", err=True)
        result = closed_form_fold(stored.module, names, images, **options)
    if chosen["window_steps"]:
        result = _with_windows(stored, names, images, chosen["window_steps"], options)
    measured = closeness(stored.module, result.model, lambda: (batch for batch, _ in report.batches(_BATCH)))
    _save(stored, result.model, names, out)
    if selection is not None:
        _write_scan(selection, chosen["keep_agreement"], measure, out)
    _say_fits(result.units)
    _say_counts(stored, result.model)
    click.echo(
        f"agreement with the original {100 * measured.agreement:.1f} %, KL {measured.kl:.4f}, "
        f"on {measured.count} images of {report.name} that nothing was fitted to or chosen by"
    )
    click.echo(f"{out}")


def _with_windows(
    stored: "StoredModel", names: list[str], images: Any, steps: int, options: dict[str, Any]
) -> "ClosedFormResult":
    """The closed form again, now with each unit and the block behind it fine-tuned before the next is fitted."""
    from pipeline.cli.progress import bars
    from pipeline.folding import WindowOptions, closed_form_fold

    with bars([f"fine-tuning {', '.join(names)}"]) as (move,):
        windows = WindowOptions(steps=steps, seed=options["seed"])
        result = closed_form_fold(
            stored.module, names, images, windows=windows, on_step=lambda _, done, total: move(done, total), **options
        )
    for window in result.windows:
        click.echo(
            f"{' + '.join(window.units)} and the layers behind: error {100 * window.before:.1f} % to "
            f"{100 * window.after:.1f} % of the variance"
        )
    return result


def _select(
    stored: "StoredModel", images: Any, selecting: "ImageSource", chosen: dict[str, Any], options: dict[str, Any]
) -> "tuple[Selection, str]":
    """Scans every unit and tries them greedily; a bar for the scan, a line for each trial.

    Returns:
        What was chosen, and in what its savings are counted.
    """
    from pipeline.cli.progress import bars
    from pipeline.folding import find_units, select_units

    savings: dict[str, float] | None = None

    def tell(trial: "Trial") -> None:
        verdict = "kept" if trial.accepted else "left"
        saving = f"{trial.saving / 1e6:.3g} M MACs" if savings is None else f"{trial.saving:.3g} ms"
        click.echo(
            f"{verdict} {trial.unit}: saves {saving}, agreement so far {100 * trial.closeness.agreement:.1f} %",
            err=True,
        )

    units = [unit for unit in find_units(stored.module) if unit.foldable]
    foldable = [unit.name for unit in units]
    if chosen["save_by"] is None and any(unit.kind == "activation" for unit in units):
        click.echo("units that are one activation cannot be measured alone: choosing by MACs", err=True)
        chosen = {**chosen, "save_by": "macs"}
    with ExitStack() as stack:
        titles = [f"fitting {len(foldable)} units alone"]
        if chosen["save_by"] != "macs":
            titles.insert(0, f"measuring {len(foldable)} units")
        moves = stack.enter_context(bars(titles))
        if chosen["save_by"] != "macs":
            savings = _savings(stored, foldable, chosen["target"], moves[0])
            if chosen["save_by"] is None and max(savings.values(), default=0.0) <= 0:
                click.echo(f"no unit's fold is shown to save time on {chosen['target']}: choosing by MACs", err=True)
                savings = None
        # Read once: the pictures are the same in every pass.
        kept = [batch for batch, _ in selecting.batches(_BATCH)]
        selection = select_units(
            stored.module, images, kept, keep_agreement=chosen["keep_agreement"], savings=savings, units=foldable,
            on_unit=moves[-1], on_trial=tell, **options,
        )  # fmt: skip
    return selection, "MACs" if savings is None else f"ms on {chosen['target']}, each unit alone"


def _savings(stored: "StoredModel", names: Sequence[str], target: str, move: Any) -> dict[str, float]:
    import targets
    from pipeline.stages import unit_latency

    rows = unit_latency.measure(stored.module, names, _example(stored), targets.get(target), on_unit=move)
    for row in rows:
        note = "" if row.difference_shown else " (no difference shown)"
        click.echo(f"{row.unit}: {row.baseline_ms:.3f} ms, folded {row.folded_ms:.3f} ms{note}", err=True)
    return {row.unit: row.saved_ms for row in rows}


def _write_scan(selection: "Selection", keep_agreement: float, measure: str, out: Path) -> None:
    """Writes the scan and the trials beside the model, as JSON, Markdown and a picture."""
    from pipeline.artifacts import write_atomic
    from pipeline.folding import sensitivity

    base = out.name.removesuffix(".pt")  # which may hold dots of its own
    data, text_file, picture = (out.with_name(f"{base}.sensitivity.{kind}") for kind in ("json", "md", "png"))
    content = {
        "keep_agreement": keep_agreement,
        "savings_in": measure,
        "units": list(selection.units),
        "scan": [row.as_dict() for row in selection.scan],
        "trials": [
            {"unit": trial.unit, "saving": trial.saving, "accepted": trial.accepted, **vars(trial.closeness)}
            for trial in selection.trials
        ],
    }
    text = sensitivity.table(selection.scan)
    write_atomic(data, json.dumps(content, indent=1))
    write_atomic(text_file, f"{text}\n")
    sensitivity.plot(selection.scan, picture)
    click.echo(text)
    click.echo(f"{picture}")


def _say_fits(fits: "Sequence[UnitFit]") -> None:
    for fit in fits:
        rows, cols = fit.kernel
        click.echo(
            f"{fit.unit}: one {rows}x{cols} convolution, MACs x{fit.macs_after / fit.macs_before:.2f}, "
            f"{100 * fit.residual:.1f} % of the output's variance not explained"
        )


def _say_counts(stored: "StoredModel", folded: Any) -> None:
    from pipeline.folding import counters

    before, after = (counters.count(module, _example(stored)) for module in (stored.module, folded))
    click.echo(f"MACs {before.macs / 1e6:.2f} M to {after.macs / 1e6:.2f} M, depth {before.depth} to {after.depth}")


def _example(stored: "StoredModel") -> "torch.Tensor":
    """One random image, the same each time: on zeros, layers that differ in their weights could not be told apart."""
    import torch

    px = stored.meta["input_px"]
    return torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(0))


def _save(stored: "StoredModel", folded: Any, names: Sequence[str], out: Path) -> None:
    """Writes the model; what an earlier fold of the same file merged stays on its list."""
    from pipeline.models import store

    earlier = stored.meta.get("units_folded", [])
    store.save(out, folded, {**stored.meta, "units_folded": list(dict.fromkeys([*earlier, *names]))})
