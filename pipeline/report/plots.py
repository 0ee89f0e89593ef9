"""The report's plots as inline SVG: latency ratios with their intervals, α of every unit, MACs and accuracy."""

__all__ = ["alpha_plot", "alpha_progress_plot", "latency_plot"]

import io

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

from pipeline.results.schema import RunReport

_BLUE, _GREY, _ORANGE = "#2a6fbb", "#9aa5b1", "#d9822b"


def latency_plot(report: RunReport) -> str:
    """Folded over baseline per target and precision, with the 95 % interval; empty when nothing was measured."""
    rows = [row for row in report.latency if row.ratio is not None]
    if not rows:
        return ""
    figure = Figure(figsize=(7, 0.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    counted = {row.target: f" ({row.metric})" for row in rows if row.metric in ("instructions", "cycles")}
    labels = [f"{row.target} {row.precision}{counted.get(row.target, '')}" for row in rows]
    ratios = [row.ratio or 0.0 for row in rows]
    left = [max(ratio - (row.ratio_low or ratio), 0.0) for ratio, row in zip(ratios, rows, strict=True)]
    right = [max((row.ratio_high or ratio) - ratio, 0.0) for ratio, row in zip(ratios, rows, strict=True)]
    axes.axvline(1.0, color=_GREY, linewidth=1)
    axes.errorbar(ratios, range(len(rows)), xerr=[left, right], fmt="o", color=_BLUE, capsize=3)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("cost of an inference, folded / baseline (left of 1 is cheaper)")
    return _svg(figure)


def alpha_plot(report: RunReport) -> str:
    """α of every candidate unit at the end of pre-folding; folded ones stand out."""
    if not report.alphas:
        return ""
    names = list(report.alphas)
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = [_ORANGE if name in report.units_folded else _GREY for name in names]
    axes.barh(range(len(names)), [report.alphas[name] for name in names], color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("α (1 = linear); orange units were folded")
    return _svg(figure)


def alpha_progress_plot(report: RunReport) -> str:
    """α of every candidate over the steps of pre-folding; empty where none was trained."""
    if not report.alpha_trace:
        return ""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    steps = [point.step for point in report.alpha_trace]
    for name in report.alpha_trace[-1].alphas:
        line = [point.alphas[name] for point in report.alpha_trace]
        folded = name in report.units_folded
        axes.plot(steps, line, color=_ORANGE if folded else _GREY, linewidth=1.4 if folded else 0.8)
    axes.set_xlabel("optimiser step; orange units were folded")
    axes.set_ylabel("α (1 = linear)")
    axes.set_ylim(-0.03, 1.03)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "layerfold", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
