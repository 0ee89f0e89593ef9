"""Least-squares fits of a recipe's units: the whole pre-folding, or what α fades the units into."""

__all__ = ["as_rows", "fit", "replacements"]

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import UnitError
from pipeline.folding.closed_form import ClosedFormResult, closed_form_fold
from pipeline.folding.refit import Refit
from pipeline.folding.units import Unit
from pipeline.folding.windows import WindowOptions
from pipeline.stages import StageContext, workbench

_BATCH = 16


def fit(
    context: StageContext,
    baseline: nn.Module,
    names: Sequence[str],
    *,
    refit: Refit = "none",
    window_steps: int = 0,
) -> ClosedFormResult:
    """Fits one convolution to each unit on the training images, without labels.

    Gradients come in with `window_steps` only, for the unit and the block behind it.
    """
    recipe, section = context.recipe, context.recipe.prefold
    source = workbench.split(recipe, "train", limit=section.fit_images)
    context.report.progress(0, 1, f"least squares of {', '.join(names)} on {len(source)} images")

    def images() -> Iterator[torch.Tensor]:
        for crop in range(section.fit_crops):
            for batch, _ in source.batches(_BATCH, train=True, seed=recipe.seed, epoch=crop):
                yield batch

    def tell(units: str, done: int, total: int) -> None:
        context.report.progress(done, total, f"fine-tuning {units} with the layers behind")

    return closed_form_fold(
        baseline,
        names,
        images,
        ridge=section.ridge,
        refit=refit,
        windows=WindowOptions(steps=window_steps, seed=recipe.seed) if window_steps else None,
        batch_size=_BATCH,
        seed=recipe.seed,
        on_step=tell,
    )


def as_rows(result: ClosedFormResult) -> dict[str, Any]:
    """How each unit was fitted, as plain data."""
    return {row.unit: {"kernel": list(row.kernel), "residual": row.residual} for row in result.units}


def replacements(
    context: StageContext, baseline: nn.Module, units: Sequence[Unit]
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The convolution that fits each unit best, for `alpha.attach_replacements`.

    Units that will all go are fitted together, each on what the ones before it give. Where α decides which go, each is
    fitted in the network as it is, and α sees how well it fits.

    Raises:
        UnitError: A unit is no block that one layer can replace.
    """
    for unit in units:
        held = dict(baseline.named_modules())
        last = [name for name in held if name.startswith(f"{unit.name}.act") and name not in unit.activations]
        if unit.kind == "activation" or (unit.kind == "basic_block" and last):
            raise UnitError(
                f"prefold.init 'closed_form': unit '{unit.name}' is no block that one convolution can replace",
                hint="use prefold.init=network, or prefold.method=closed_form",
            )
    names = [unit.name for unit in units]
    parts = [names] if context.recipe.prefold.method == "fixed" else [[name] for name in names]
    layers: dict[str, nn.Module] = {}
    rows: dict[str, Any] = {}
    for part in parts:
        result = fit(context, baseline, part)
        layers |= {name: result.model.get_submodule(name) for name in part}
        rows |= as_rows(result)
    return layers, {"fits": rows}
