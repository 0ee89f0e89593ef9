"""`layerfold bench`: model files against each other on a target."""

__all__ = ["command"]

import json
from pathlib import Path

import click

_EPILOG = """\b
Examples:
  layerfold bench runs/q/models/folded.tflite --baseline runs/q/models/baseline.tflite
  layerfold bench a.int8.onnx b.int8.onnx --target host-ort --threads 2 --json > rows.json
"""


@click.command(epilog=_EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", default=None, help="Target.  [default: host-litert for .tflite, host-ort for .onnx]")
@click.option(
    "--baseline", type=click.Path(path_type=Path), default=None, help="File that the others are compared with."
)
@click.option("--threads", default=1, show_default=True)
@click.option("--warmup", default=5, show_default=True)
@click.option("--runs", default=60, show_default=True, help="Timed inferences in each process.")
@click.option("--restarts", default=3, show_default=True, help="Processes, one after the other.")
@click.option("--quick", is_flag=True, help="Fewer runs; every row is marked.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurement rows as JSON.")
def command(
    files: tuple[Path, ...],
    target: str | None,
    baseline: Path | None,
    threads: int,
    warmup: int,
    runs: int,
    restarts: int,
    quick: bool,
    as_json: bool,
) -> None:
    """Measure FILES (.tflite or .onnx) on a target, interleaved; with --baseline also the ratio and its interval."""
    from rich.console import Console
    from rich.table import Table

    import targets
    from pipeline.cli.progress import bar
    from targets.stats import ratio_interval

    paths = [*([baseline] if baseline is not None else []), *files]
    name = target or ("host-ort" if paths[0].suffix == ".onnx" else "host-litert")
    if quick:
        runs, restarts = min(runs, 10), 1
    with bar(f"measuring on {name}") as advance:
        rows = targets.get(name, threads=threads).benchmark(
            paths, warmup=warmup, runs=runs, restarts=restarts, quick=quick, on_progress=advance
        )
    if as_json:
        click.echo(json.dumps([row.as_dict() for row in rows], indent=1, allow_nan=False))
        return
    table = Table(title=f"{name}, {threads} thread(s)" + (", quick" if quick else ""), title_justify="left")
    for column in ("file", "precision", "median", "p10 to p90", "against the baseline"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = ""
        if baseline is not None and row is not rows[0]:
            ratio = ratio_interval(rows[0], row)
            verdict = f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f}): {ratio.verdict}"
        mark = "" if row.valid else f" ({row.invalid_reason})"
        table.add_row(row.model, row.precision, _cost(row), _spread(row), verdict + mark)
    Console(width=None if Console().is_terminal else 140).print(table)


def _cost(row) -> str:  # type: ignore[no-untyped-def]  # targets.base is imported only when the verb runs
    if row.median_ms is not None:
        return f"{row.median_ms:.3f} ms"
    return f"{row.instructions / 1e6:.2f} M instructions" if row.instructions is not None else "failed"


def _spread(row) -> str:  # type: ignore[no-untyped-def]
    return "" if row.p10_ms is None else f"{row.p10_ms:.3f} to {row.p90_ms:.3f} ms"
