"""Stage 8: what an inference costs on the recipe's targets, baseline and folded interleaved."""

__all__ = ["run"]

import json
from collections.abc import Callable
from typing import Any

import targets
from pipeline.results.schema import LatencyRow
from pipeline.stages import StageContext
from targets.base import Measurement, Target
from targets.bench import collect
from targets.errors import StatsError
from targets.registry import with_defaults
from targets.stats import ratio_interval

_FORMATS = ("tflite", "onnx")


def run(context: StageContext) -> dict[str, Any]:
    """Measures every precision and format on every target that takes it.

    A target that fails gives failed rows, not missing ones, and costs the other targets nothing.
    """
    section = context.recipe.bench
    made = make_targets(context.recipe)
    asked = section.formats or context.recipe.export.formats
    if "executorch" in asked:
        context.report.say("no target runs .pte files: executorch is not measured")
    jobs = [
        (precision, form, {name: target for name, target in made.items() if _takes(target, precision, form)})
        for precision in section.precisions
        for form in asked
        if form in _FORMATS
    ]
    total = sum(len(chosen) for _, _, chosen in jobs)
    rows: list[LatencyRow] = []
    measured: list[dict[str, Any]] = []
    for precision, form, chosen in jobs:
        stage, infix = ("export", "") if precision == "fp32" else ("quantize", f".{precision}")
        paths = [context.inputs[stage].file(f"models/{which}{infix}.{form}") for which in ("baseline", "folded")]
        found = collect(
            chosen, paths, warmup=section.warmup, runs=section.runs, restarts=section.restarts,
            quick=context.recipe.variant == "quick",
            on_progress=_movers(context, chosen, f"{precision} {form}", begun=len(rows), total=total),
        )  # fmt: skip
        for name, (baseline, folded) in found.items():
            rows.append(_row(name, precision, baseline, folded))
            measured += [baseline.as_dict(), folded.as_dict()]
            if rows[-1].failed:
                context.report.say(f"{name} {precision} {form}: {rows[-1].note}")
    for name in made:
        if not any(row.target == name for row in rows):
            context.report.say(f"{name} runs none of the files: nothing to measure")
    order = list(made)
    rows.sort(key=lambda row: order.index(row.target))
    (context.work / "measurements.json").write_text(json.dumps(measured, indent=1, allow_nan=False))
    shown = ", ".join(f"{r.target} {r.precision} {r.ratio:.3f}" for r in rows if r.ratio is not None)
    summary = f"folded/baseline {shown or 'failed'}" if rows else "nothing to measure"
    return {"latency": [row.model_dump() for row in rows], "summary": summary}


def make_targets(recipe: Any) -> dict[str, Target]:
    """Makes the targets of `bench.targets` with their options; raises `TargetError` for a wrong name or option."""
    section = recipe.bench
    return {
        name: targets.get(name, **with_defaults(name, section.options.get(name, {}), threads=section.threads))
        for name in section.targets
    }


def _takes(target: Target, precision: str, form: str) -> bool:
    return form in getattr(target, "formats", _FORMATS) and precision in getattr(target, "precisions", (precision,))


def _movers(
    context: StageContext, chosen: dict[str, Target], what: str, *, begun: int, total: int
) -> dict[str, Callable[[int, int], None]]:
    """Functions that move the stage's one bar by the progress of several targets at once."""
    shares = dict.fromkeys(chosen, 0.0)

    def mover(name: str) -> Callable[[int, int], None]:
        def move(done: int, runs: int) -> None:
            shares[name] = done / runs
            context.report.progress(begun + sum(shares.values()), total, f"{name} {what}")

        return move

    return {name: mover(name) for name in chosen}


def _row(name: str, precision: str, baseline: Measurement, folded: Measurement) -> LatencyRow:
    threads = max(baseline.threads, 1)
    facts: dict[str, Any] = {
        "target": name,
        "runtime": f"{baseline.runtime} {baseline.runtime_version}".strip(),
        "precision": precision,
        "threads": threads,
        "device": " ".join(filter(None, (baseline.device.name, baseline.device.cpu))) or baseline.device.id,
        "baseline_ms": baseline.median_ms,
        "folded_ms": folded.median_ms,
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
    }
    reasons = list(dict.fromkeys(row.invalid_reason for row in (baseline, folded) if row.invalid_reason))
    if baseline.failure or folded.failure:
        return LatencyRow(**facts | {"valid": False, "note": "; ".join(reasons)})
    try:
        ratio = ratio_interval(baseline, folded)
    except StatsError as error:
        if any(row.median_ms or row.instructions or row.cycles for row in (baseline, folded)):
            return LatencyRow(**facts | {"valid": False, "note": error.what})
        # A compile check has no cost to compare: what it found is the result.
        ran = dict.fromkeys((baseline.actual_accelerator, folded.actual_accelerator))
        return LatencyRow(
            **facts | {"metric": "none", "valid": not reasons, "note": "; ".join([f"ran: {', '.join(ran)}", *reasons])}
        )
    counts = {
        "instructions": (baseline.instructions, folded.instructions),
        "cycles": (baseline.cycles, folded.cycles),
    }.get(ratio.metric, (None, None))
    # What cannot be told gets no interval that would look as if it could.
    low, high = (None, None) if ratio.too_few else (ratio.low, ratio.high)
    return LatencyRow(
        **facts | {
            "metric": ratio.metric, "baseline_count": counts[0], "folded_count": counts[1], "ratio": ratio.ratio,
            "ratio_low": low, "ratio_high": high, "valid": not reasons, "note": "; ".join(reasons),
        }
    )  # fmt: skip
