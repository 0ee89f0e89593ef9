"""Stage 8: latency on the recipe's targets, baseline and folded interleaved."""

__all__ = ["run"]

import json
from typing import Any

import targets
from pipeline.results.schema import LatencyRow
from pipeline.stages import StageContext
from targets.base import Measurement
from targets.errors import TargetError
from targets.stats import ratio_interval


def run(context: StageContext) -> dict[str, Any]:
    """Measures every precision on every target; a target that fails gives a failed row, not a missing one."""
    section = context.recipe.bench
    jobs = [(name, precision) for name in section.targets for precision in section.precisions]
    rows: list[LatencyRow] = []
    measured: list[dict[str, Any]] = []
    for done, (name, precision) in enumerate(jobs):
        context.report.progress(done, len(jobs), f"{name} {precision}")
        try:
            row, pair = _measure(context, name, precision)
        except TargetError as error:
            context.report.say(f"{name} {precision}: {error}")
            rows.append(_failed(name, precision, section.threads, str(error)))
            continue
        rows.append(row)
        measured += [measurement.as_dict() for measurement in pair]
    (context.work / "measurements.json").write_text(json.dumps(measured, indent=1, allow_nan=False))
    shown = ", ".join(f"{r.target} {r.precision} {r.ratio:.3f}" for r in rows if r.ratio is not None)
    return {"latency": [row.model_dump() for row in rows], "summary": f"folded/baseline {shown or 'failed'}"}


def _measure(context: StageContext, name: str, precision: str) -> tuple[LatencyRow, list[Measurement]]:
    section = context.recipe.bench
    target = targets.get(name, threads=section.threads)
    form = next(form for form in context.recipe.export.formats if form in getattr(target, "formats", (form,)))
    stage = "export" if precision == "fp32" else "quantize"
    infix = "" if precision == "fp32" else ".int8"
    paths = [context.inputs[stage].file(f"models/{which}{infix}.{form}") for which in ("baseline", "folded")]
    baseline, folded = target.benchmark(paths, warmup=section.warmup, runs=section.runs, restarts=section.restarts)
    ratio = ratio_interval(baseline, folded)
    reasons = [m.invalid_reason for m in (baseline, folded) if not m.valid]
    row = LatencyRow(
        target=name,
        runtime=f"{baseline.runtime} {baseline.runtime_version}",
        precision=precision,
        threads=section.threads,
        baseline_ms=baseline.median_ms,
        folded_ms=folded.median_ms,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        valid=not reasons,
        note="; ".join(dict.fromkeys(reasons)),
    )
    return row, [baseline, folded]


def _failed(name: str, precision: str, threads: int, why: str) -> LatencyRow:
    return LatencyRow(
        target=name, runtime="", precision=precision, threads=threads, baseline_ms=None, folded_ms=None,
        ratio=None, ratio_low=None, ratio_high=None, valid=False, note=why,
    )  # fmt: skip
