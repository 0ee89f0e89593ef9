"""The latency table: what was compared, by how much it differs, and whether that is certain."""

__all__ = ["latency_table"]

from pipeline.report.rows import Row, Table
from pipeline.results.schema import LatencyRow, RunReport

_COUNTED = {"instructions": "instructions", "cycles": "cycles"}
_HEADER = ("target", "precision", "baseline", "folded", "compared", "change", "95% interval of the ratio")


def latency_table(report: RunReport) -> Table:
    """One line for each target and file pair; milliseconds, instructions and cycles are named, never mixed.

    What makes rows doubtful stands below the table, once, and the rows refer to it by number.
    """
    doubts = list(dict.fromkeys(row.note for row in report.latency if row.ratio is not None and not row.valid))
    notes = []
    if any(row.metric in ("time", "processor time") for row in report.latency):
        notes.append("Baseline and folded interleaved; read the ratio, not the milliseconds, on a shared machine.")
    if any(row.metric == "processor time" for row in report.latency):
        notes.append("Processor time leaves out what other programs took; the columns show time on the wall.")
    if any(row.metric in _COUNTED for row in report.latency):
        notes.append("Instructions and cycles are counted, not timed, and say nothing of milliseconds.")
    notes += [f"[{number}] {doubt}." for number, doubt in enumerate(doubts, start=1)]
    return Table(
        "Latency of one image (median)" if report.batch == 1 else f"Latency of {report.batch} images (median)",
        _HEADER,
        tuple(Row(_cells(row, doubts), row.failed) for row in report.latency),
        " ".join(notes),
    )


def _cells(row: LatencyRow, doubts: list[str]) -> tuple[str, ...]:
    facts = ", ".join(filter(None, (row.runtime, f"{row.threads} thread{'s' if row.threads > 1 else ''}")))
    target = f"{row.target} ({facts})"
    if row.metric == "none":
        return (target, row.precision, "", "", "compiles?", "", row.note)
    if row.ratio is None:
        return (target, row.precision, "failed", "failed", "", "", row.note)
    if row.metric in _COUNTED:
        interval = "counted"
        before, after = (f"{(count or 0) / 1e6:.3f} M" for count in (row.baseline_count, row.folded_count))
    else:
        interval = "too few runs to tell"
        if row.ratio_low is not None and row.ratio_high is not None:
            interval = f"{row.ratio_low:.3f} to {row.ratio_high:.3f}"
        before, after = (f"{ms:.3f} ms" if ms is not None else "" for ms in (row.baseline_ms, row.folded_ms))
    if row.ratio_low is not None and row.ratio_high is not None and row.ratio_low <= 1 <= row.ratio_high:
        interval += " (no difference shown)"
    if not row.valid:
        interval += f" [{doubts.index(row.note) + 1}]"
    return (target, row.precision, before, after, row.metric, f"{100 * (row.ratio - 1):+.1f}%", interval)
