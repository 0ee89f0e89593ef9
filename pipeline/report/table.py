"""The reduction table: baseline against folded, as rows that Markdown, HTML and the terminal share."""

__all__ = ["Row", "Table", "all_tables", "facts_lines", "markdown", "reduction_tables", "terminal_table"]

from collections.abc import Sequence

from pipeline.report import checks
from pipeline.report.latency import latency_table
from pipeline.report.rows import KINDS, Row, Table, percent
from pipeline.results.schema import RunReport


def reduction_tables(report: RunReport) -> list[Table]:
    """The report's tables in reading order: cost, prediction, latency, files, and the paper's row if there is one."""
    tables = [_cost(report), *_predictions(report), latency_table(report), _files(report)]
    if report.paper is not None:
        tables.append(_paper(report))
    return tables


def all_tables(report: RunReport) -> list[Table]:
    """The tables of `reduction_tables`, then those that show how every file was checked."""
    return [*reduction_tables(report), *checks.check_tables(report)]


def facts_lines(report: RunReport) -> list[str]:
    """What was folded and with what: the lines below the tables."""
    units = ", ".join(report.units_folded) or "none"
    skipped = "; ".join(f"{name}: {reason}" for name, reason in report.units_skipped.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    hashes = ", ".join(f"{name} {value}" for name, value in report.stage_hashes.items())
    return [
        f"units folded ({len(report.units_folded)}): {units}",
        *([f"units left as they were: {skipped}"] if skipped else []),
        f"fold error: {report.fold_max_abs_error:.2e} (largest difference of logits), "
        f"{report.fold_changed_predictions} of {report.eval_images} predictions changed by the fold itself",
        f"weights: {report.weights}",
        f"data: {report.data}, {report.eval_images} evaluation images",
        *_calibration_lines(report),
        f"seed {report.seed}; {versions}",
        f"stages: {hashes}",
    ]


def _calibration_lines(report: RunReport) -> list[str]:
    taken = report.calibration
    if taken is None:
        return []
    options = ", ".join(f"{key} {_plain(value)}" for key, value in report.quantised.items() if value != [])
    lines = [
        f"int8: {options}; calibrated on {taken.count} images of {taken.source} "
        f"(seed {taken.seed}, sha256 {taken.sha256[:12]})"
    ]
    if report.identities_apart:
        finer = ", ".join(f"{name} ({gain:.1f} times finer)" for name, gain in report.identities_apart.items())
        lines.append(f"int8 rounds these kernels without their identity, which an ADD brings back: {finer}")
    if taken.skipped:
        named = "; ".join(f"{path} ({reason})" for path, reason in taken.skipped.items())
        lines.append(f"{len(taken.skipped)} damaged calibration images left out: {named}")
    return lines


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(report: RunReport) -> str:
    """The whole report as Markdown."""
    lines = [f"# {_title(report)}", ""]
    if report.description:
        lines += [report.description.strip(), ""]
    for failure in report.failures:
        lines += [f"**FAILED** {failure}", ""]
    for table in all_tables(report):
        lines += [f"## {table.title}", "", _md_line(table.header), _md_line(["---"] * len(table.header))]
        lines += [_md_line([f"**{c}**" if row.failed and c else c for c in row.cells]) for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    lines += ["## What was folded, and with what", "", *(f"- {line}" for line in facts_lines(report)), ""]
    return "\n".join(lines)


def terminal_table(report: RunReport) -> None:
    """Prints the tables to stdout."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if Console().is_terminal else 120)
    console.print(_title(report), highlight=False, markup=False)
    for table in reduction_tables(report):
        rich_table = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for index, column in enumerate(table.header):
            rich_table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            rich_table.add_row(*row.cells, style="red" if row.failed else None)
        console.print(rich_table, highlight=False)
    for line in facts_lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _title(report: RunReport) -> str:
    quick = " (QUICK variant: shortened, not comparable)" if report.variant == "quick" else ""
    return f"{report.recipe}: {report.model} at {report.input_px} px{quick}"


def _cost(report: RunReport) -> Table:
    before, after = report.baseline, report.folded
    return Table(
        f"Cost: {report.model}",
        ("", "baseline", "folded", "change"),
        (
            Row(("params", f"{before.params:,}", f"{after.params:,}", _change(before.params, after.params))),
            Row(
                (
                    "MACs (one image)",
                    f"{before.macs / 1e6:.2f} M",
                    f"{after.macs / 1e6:.2f} M",
                    _change(before.macs, after.macs),
                )
            ),
            Row(
                (
                    "depth (non-linear layers)",
                    str(before.depth),
                    str(after.depth),
                    f"{after.depth - before.depth:+d}",
                )
            ),
        ),
    )


def _predictions(report: RunReport) -> list[Table]:
    tables = []
    failed = {(row.model, row.kind) for row in report.verify if not row.passed}
    if report.baseline.accuracy:
        rows = []
        torch_accuracy = report.baseline.accuracy["torch"]
        for kind, label in KINDS.items():
            before, after = report.baseline.accuracy.get(kind), report.folded.accuracy.get(kind)
            if before is None and after is None:
                continue
            drop = "" if after is None else f"{100 * (torch_accuracy - after):+.2f}"
            red = ("baseline", kind) in failed or ("folded", kind) in failed
            rows.append(Row((label, percent(before), percent(after), drop), red))
        note = (
            f"Top-1 on {report.labelled_images} labelled images; "
            "drop in points of the folded file against the baseline in torch."
        )
        if report.labelled_images < 1000:
            note += " So few images are a sanity check, not an accuracy."
        tables.append(Table("Accuracy", ("", "baseline", "folded", "drop"), tuple(rows), note))
    rows = [
        Row(
            (label, percent(report.baseline.agreement.get(kind)), percent(report.folded.agreement.get(kind))),
            ("baseline", kind) in failed or ("folded", kind) in failed,
        )
        for kind, label in KINDS.items()
        if kind in report.baseline.agreement or kind in report.folded.agreement
    ]
    tables.append(
        Table(
            "Agreement with the baseline (same top-1)",
            ("", "baseline", "folded"),
            tuple(rows),
            f"On {report.eval_images} evaluation images, against the baseline in torch.",
        )
    )
    return tables


def _files(report: RunReport) -> Table:
    rows = []
    for kind, label in KINDS.items():
        before = next((f for k, f in report.baseline.files.items() if k == kind), None)
        after = next((f for k, f in report.folded.files.items() if k == kind), None)
        if before is not None and after is not None:
            cells = (label, _size(before.bytes), _size(after.bytes), _change(before.bytes, after.bytes), after.path)
            rows.append(Row(cells))
    return Table("Files", ("", "baseline", "folded", "change", "folded file"), tuple(rows))


def _paper(report: RunReport) -> Table:
    paper = report.paper
    assert paper is not None
    before, after = report.baseline, report.folded
    timed = [row for row in report.latency if row.ratio is not None and row.metric.endswith("time")]
    ours = "; ".join(f"{r.target} {r.precision} {100 * (1 - (r.ratio or 0)):+.1f}%" for r in timed)
    drop = 100 * (before.accuracy["torch"] - after.accuracy["torch"]) if "torch" in after.accuracy else None
    return Table(
        f"Beside the paper's {paper.model}",
        ("", "this run", "paper (ImageNet, Titan X Pascal)"),
        (
            Row(("accuracy", percent(after.accuracy.get("torch")), percent(paper.accuracy))),
            Row(
                (
                    "drop, points",
                    "" if drop is None else f"{drop:.2f}",
                    f"{paper.accuracy_drop_points:.1f}",
                )
            ),
            Row(("latency reduction", ours, f"{paper.latency_reduction_percent:.0f}%")),
            Row(
                (
                    "MACs reduction",
                    f"{100 * (1 - after.macs / before.macs):.2f}%",
                    f"{paper.flops_reduction_percent:.0f}%",
                )
            ),
        ),
    )


def _md_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.2f}%" if before else ""


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
