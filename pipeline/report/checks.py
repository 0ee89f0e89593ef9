"""The tables that show how every file was checked: verification, worst images, operators, noise of int8."""

__all__ = ["check_tables"]

from pipeline.report.rows import KINDS, Row, Table, percent
from pipeline.results.schema import CensusRow, NoiseRow, RunReport

_WORST_SHOWN = 3
_MODELS = ("baseline", "folded")


def check_tables(report: RunReport) -> list[Table]:
    """Verification, second opinions, worst images, a census for each format, noise of each unit; those with rows."""
    tables = [_verification(report), _opinions(report), _worst(report)]
    formats = (("tflite", "TFLite"), ("onnx", "ONNX"), ("executorch", "ExecuTorch"))
    tables += [_census(report, form, title) for form, title in formats]
    return [table for table in (*tables, _noise(report)) if table.rows]


def _verification(report: RunReport) -> Table:
    rows = [
        Row(
            (
                f"{row.model} {KINDS[row.kind]}",
                percent(row.accuracy),
                percent(row.top5),
                percent(row.agreement),
                f"{row.max_abs_logit_error:.2g}",
                f"{row.mean_abs_logit_error:.2g}",
                "" if row.relative_error is None else f"{row.relative_error:.1e}",
                "passed" if row.passed else f"failed: {row.reason}",
            ),
            not row.passed,
        )
        for row in report.verify
    ]
    header = ("file", "top-1", "top-5", "agreement", "max error", "mean error", "relative", "verdict")
    note = (
        f"Each file by its own runtime on {report.eval_images} evaluation images, against the torch model it came "
        "from. Errors are of logits; relative is the largest over the torch model's largest logit."
    )
    return Table("Verification", header, tuple(rows), note)


def _opinions(report: RunReport) -> Table:
    rows = [
        Row(
            (
                row.model,
                f"{KINDS[row.first]} and {KINDS[row.second]}",
                percent(row.agreement),
                f"{row.max_abs_logit_difference:.2g}",
                "passed" if row.passed else f"failed: {row.reason}",
            ),
            not row.passed,
        )
        for row in report.opinions
    ]
    header = ("model", "files", "agreement", "largest difference", "verdict")
    return Table("Second opinion: the formats against each other", header, tuple(rows))


def _worst(report: RunReport) -> Table:
    rows = [
        Row(
            (
                f"{row.model} {KINDS[row.kind]}",
                image.name,
                f"{image.max_abs_error:.2g}",
                str(image.network_class),
                str(image.file_class),
            )
        )
        for row in report.verify
        if not row.kind.endswith("fp32") or not row.passed
        for image in row.worst[:_WORST_SHOWN]
    ]
    header = ("file", "image", "logit error", "torch's class", "the file's class")
    return Table("Worst images", header, tuple(rows), "report.json lists more, and those of the float32 files.")


def _census(report: RunReport, form: str, title: str) -> Table:
    found: dict[tuple[str, str], CensusRow] = {
        (row.model, row.kind): row for row in report.census if row.kind.startswith(form)
    }
    kinds = [kind for kind in KINDS if any(key[1] == kind for key in found)]
    columns = [found.get((model, kind)) for kind in kinds for model in _MODELS]
    operators = sorted({name for row in found.values() for name in row.ops})
    fused = sorted({name for row in found.values() for name in row.fused_activations})
    rows = [Row((name, *(str(row.ops.get(name, 0)) if row else "" for row in columns))) for name in operators]
    rows += [
        Row((f"{name}, fused", *(str(row.fused_activations.get(name, 0)) if row else "" for row in columns)))
        for name in fused
    ]
    if found:
        rows.append(Row(("float inside int8", *(str(len(row.float_tensors)) if row else "" for row in columns))))
        rows.append(Row(("widest weights", *(_widest(row) for row in columns))))
    header = ("operators", *(f"{KINDS[kind].removeprefix(title).strip()} {m}" for kind in kinds for m in _MODELS))
    findings = dict.fromkeys(text for row in found.values() for text in row.findings)
    note = "Widest weights: the largest weight over the median channel's largest, and the layer where that is most."
    return Table(f"What the {title} files hold", header, tuple(rows), " ".join([note, *(f"{f}." for f in findings)]))


def _widest(row: CensusRow | None) -> str:
    if row is None or row.widest_spread is None:
        return ""
    return f"{row.widest_spread:.3g}× {row.widest_layer}"


def _noise(report: RunReport) -> Table:
    by_unit: dict[str, dict[str, NoiseRow]] = {}
    for row in report.noise:
        by_unit.setdefault(row.name, {})[row.model] = row
    rows = []
    for name, found in by_unit.items():
        folded = found.get("folded")
        label = f"{name} (folded)" if folded is not None and folded.folded else name
        cells = [_decibels(found.get(model), worst) for worst in (False, True) for model in _MODELS]
        rows.append(Row((label, *cells)))
    header = ("unit", "baseline", "folded", "worst channel, baseline", "worst channel, folded")
    files = ", ".join(dict.fromkeys(row.file for row in report.noise))
    note = (
        f"Signal over noise in dB behind each unit of {files}, against its float file on calibration images: higher "
        "is better, and noise adds up along the network, so look for drops."
    )
    return Table("What int8 leaves of each unit", header, tuple(rows), note)


def _decibels(row: NoiseRow | None, worst: bool) -> str:
    if row is None:
        return ""
    value = row.worst_channel_db if worst else row.sqnr_db
    return "exact" if value is None else f"{value:.1f}"
