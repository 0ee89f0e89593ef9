"""Stage 2: α-activations learn, under the auxiliary loss, which units can do without their non-linearities."""

__all__ = ["candidates", "penalty_weights", "run", "thinned"]

from dataclasses import asdict
from typing import Any

from torch import nn

from pipeline import alpha
from pipeline.alpha.rings import TRAINING_REACH
from pipeline.errors import UnitError, nearest
from pipeline.folding.savings import unit_macs
from pipeline.folding.units import Unit, find_activations, find_units
from pipeline.recipe import PrefoldSection, Recipe
from pipeline.stages import StageContext, closed_form, fitting, workbench
from pipeline.training.scalars import plot_alphas

_PLOT = "alpha.png"


def run(context: StageContext) -> dict[str, Any]:
    """Makes units linear, by learned or annealed α or in closed form, and evaluates the network that will fold."""
    recipe = context.recipe
    section = recipe.prefold
    baseline = workbench.load_model(context, "baseline", "models/baseline.pt")
    units = candidates(recipe, baseline)
    fitting.check_features(recipe, baseline, units)
    if section.method == "closed_form":
        settled, values, details = _closed_form(context, baseline, [unit.name for unit in units])
    else:
        settled, values, details = _learned(context, baseline, units)
    evaluation = workbench.score(context, settled, teacher=baseline)
    gone = [name for name, value in values.items() if value > section.threshold]
    linear = gone if section.per == "unit" else _whole_units(baseline, gone)
    workbench.save_model(context, "settled.pt", settled, alphas=values, linear_units=linear)
    if not gone:
        context.report.say(
            f"no α passed {section.threshold}: nothing will fold; raise prefold.lambda_c or prefold.train.epochs"
        )
    what = "units" if section.per == "unit" else "activations"
    return {
        "alphas": values,
        "linear_units": linear,
        "counts": workbench.count(recipe, settled),
        "details": details,
        "evaluation": evaluation.as_dict(),
        "summary": f"{len(gone)} of {len(values)} {what} linear ({', '.join(gone) or 'none'}), "
        + workbench.summary(evaluation),
    }


def _learned(
    context: StageContext, baseline: nn.Module, units: list[Unit]
) -> tuple[nn.Module, dict[str, float], dict[str, Any]]:
    """Attaches α to the candidate units, fine-tunes, and settles: α above the threshold becomes linear."""
    recipe, section = context.recipe, context.recipe.prefold
    assert section.train is not None, "the recipe's validator asks for it"
    names = [unit.name for unit in units]
    details: dict[str, Any] = {}
    if section.init == "closed_form":
        layers, details = closed_form.replacements(context, baseline, units)
        student = alpha.attach_replacements(baseline, layers, initial=section.alpha_init)
    else:
        wanted = [name for unit in units for name in unit.activations] if section.per == "layer" else names
        student = alpha.attach(
            baseline,
            units=wanted,
            per=section.per,
            ring=section.ring,
            reach=TRAINING_REACH,
            initial=section.alpha_init,
        )
    schedule = alpha.AlphaSchedule(
        lambda_c=section.lambda_c,
        p=section.p,
        threshold=section.threshold,
        alpha_lr=section.alpha_lr,
        weights=penalty_weights(recipe, baseline, units),
        lambda_warmup=section.lambda_warmup,
        anneal=_anneal_order(section, list(alpha.values(student))) if section.method == "fixed" else (),
        anneal_order=section.anneal_order,
        anneal_fraction=section.anneal_fraction,
        snap_at=section.snap_at,
    )
    blocks = [unit.name for unit in units if unit.kind != "activation"]
    result = fitting.fine_tune(
        context, student, section.train, distill=section.distill, teacher=baseline, alpha=schedule, units=blocks
    )
    plot_alphas(result.alpha_trace, context.work / _PLOT, threshold=section.threshold)
    details |= {"alpha_trace": thinned(result.alpha_trace), "history": result.history}
    return alpha.settle(student, threshold=section.threshold), alpha.values(student), details


def _anneal_order(section: PrefoldSection, groups: list[str]) -> tuple[str, ...]:
    """The α to anneal, in the recipe's own order of units (α come in network order)."""
    if section.per == "layer" or section.units == "all":
        return tuple(groups)
    return tuple(sorted(groups, key=list(section.units).index))


def thinned(trace: list[dict[str, Any]], points: int = 50) -> list[dict[str, Any]]:
    """At most so many points of an α trace, the last one among them, with α rounded to four decimals."""
    every = max(-(-len(trace) // points), 1)
    kept = trace[::-1][::every][::-1]
    return [{"step": p["step"], "alphas": {name: round(a, 4) for name, a in p["alphas"].items()}} for p in kept]


def _whole_units(model: nn.Module, gone: list[str]) -> list[str]:
    """The foldable units all of whose activations are gone: only they become one layer."""
    return [unit.name for unit in find_units(model) if unit.foldable and set(unit.activations) <= set(gone)]


def _closed_form(
    context: StageContext, baseline: nn.Module, names: list[str]
) -> tuple[nn.Module, dict[str, float], dict[str, Any]]:
    """Fits one convolution to each unit on the training images, without labels: they fold right here.

    Where the recipe trains, the fitted network then learns on, from labels or from the baseline.
    """
    section = context.recipe.prefold
    result = closed_form.fit(context, baseline, names, refit=section.refit, window_steps=section.window_steps)
    model: nn.Module = result.model
    details: dict[str, Any] = {
        "fits": closed_form.as_rows(result),
        "refitted": list(result.refitted),
        "windows": [asdict(window) for window in result.windows],
    }
    if section.train is not None:
        fitted = fitting.fine_tune(
            context, model, section.train, distill=section.distill, teacher=baseline, units=names
        )
        details["history"] = fitted.history
    return model, dict.fromkeys(names, 1.0), details


def candidates(recipe: Recipe, model: nn.Module) -> list[Unit]:
    """The units that α is attached to, in network order.

    Raises:
        UnitError: A named unit is unknown or cannot fold, or none is left.
    """
    section = recipe.prefold
    known = {unit.name: unit for unit in find_units(model)}
    if section.per == "layer":
        known |= {name: unit for name, unit in _layers(model, list(known.values())).items() if name not in known}
    named = list(known) if section.units == "all" else list(section.units)
    for name in (*named, *section.exclude):
        if name not in known:
            key = "units" if name in named else "exclude"
            close = nearest(name, (*known, "all"))
            raise UnitError(
                f"prefold.{key}: model '{recipe.model.name}' has no unit '{name}'" + (f"; {close}" if close else ""),
                hint=f"its units are {', '.join(known) or 'none'}",
            )
        if section.units != "all" and not known[name].foldable and name in named:
            raise UnitError(
                f"prefold.units: unit '{name}' cannot fold: {known[name].reason}",
                hint="leave it out; `layerfold inspect MODEL --units` lists what can fold",
            )
    chosen = [
        unit for unit in known.values() if unit.name in named and unit.foldable and unit.name not in section.exclude
    ]
    if section.per == "layer":
        named_blocks = [unit for unit in chosen if unit.kind != "activation"]
        inside = {name for unit in named_blocks for name in unit.activations}
        # With `all` every activation stands for itself; a block named by the user stands for those inside it.
        return (
            [u for u in chosen if u.kind == "activation"]
            if section.units == "all"
            else [u for u in chosen if u.name not in inside]
        )
    if section.units == "all":
        cost = unit_macs(model, chosen, workbench.example(recipe))
        dear = {name for name, (before, after) in cost.items() if after > section.max_macs_ratio * before}
        chosen = [unit for unit in chosen if unit.name not in dear]
    if not chosen:
        raise UnitError(
            f"prefold.units leaves no foldable unit of model '{recipe.model.name}'", hint="set prefold.units=all"
        )
    return chosen


def _layers(model: nn.Module, units: list[Unit]) -> dict[str, Unit]:
    """Every activation as a unit of its own; those that no unit holds, such as one after a residual sum, too.

    In a network without blocks the units are activations already, and one that joins no layers stays unfoldable.
    """
    if units and all(unit.kind == "activation" for unit in units):
        return {}
    return {name: Unit(name, "activation", (name,), True, "") for name in find_activations(model)}


def penalty_weights(recipe: Recipe, model: nn.Module, units: list[Unit]) -> dict[str, float] | None:
    """c_l of the auxiliary loss: None for the paper's uniform weights, else by what folding saves.

    Args:
        recipe: Says by what to weigh.
        model: The network, activations in place.
        units: Its candidates.

    Raises:
        UnitError: A unit has no entry in `latency_saved_ms`, or no unit would save anything.
    """
    if recipe.prefold.penalty_weights == "uniform":
        return None
    if recipe.prefold.penalty_weights == "latency":
        saved = recipe.prefold.latency_saved_ms
        for unit in units:
            if unit.name not in saved:
                raise UnitError(
                    f"prefold.latency_saved_ms has no entry for unit '{unit.name}'",
                    hint="measure it, or leave the unit out with prefold.exclude",
                )
        return alpha.weights_from_savings({unit.name: saved[unit.name] for unit in units})
    cost = unit_macs(model, units, workbench.example(recipe))
    return alpha.weights_from_savings({name: before - after for name, (before, after) in cost.items()})
