"""`layerfold bench`: model files against each other on one target or several."""

__all__ = ["command"]

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from targets.base import Measurement, Target
    from targets.profile import Profile
    from targets.stats import Ratio

FAILED = 1
# The fewest that make an interval: six pairs of two.
_QUICK_RUNS = 12
_EPILOG = """\b
Examples:
  layerfold bench folded.tflite --baseline baseline.tflite
  layerfold bench folded.tflite --baseline baseline.tflite --target host-litert --target emulated-arm64
  layerfold bench folded.tflite --baseline baseline.tflite --target android:SERIAL --option accelerator=gpu
  layerfold bench folded.tflite --baseline baseline.tflite --target ssh:pi@board --option cores=[2,3]
  layerfold bench folded.onnx --baseline baseline.onnx --profile
  layerfold bench a.int8.onnx b.int8.onnx --target host-ort --threads 2 --json > rows.json

Exit code 1 when a target failed: its rows say why, and the others' rows are there.
"""


@click.command(epilog=_EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--target",
    "names",
    multiple=True,
    help="Target; repeat for several (`layerfold targets list`).  [default: host-litert or host-ort]",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), default=None, help="File that the others are compared with."
)
@click.option("--threads", default=1, show_default=True)
@click.option("--warmup", default=5, show_default=True)
@click.option("--runs", default=60, show_default=True, help="Timed inferences in each process.")
@click.option("--restarts", default=3, show_default=True, help="Processes, one after the other.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="[TARGET.]NAME=VALUE",
    help="Option of a target, or of all; the value is YAML.",
)
@click.option("--profile", is_flag=True, help="Also show where the time goes, operator by operator, on this machine.")
@click.option("--quick", is_flag=True, help="Fewer runs; every row is marked.")
@click.option("--json", "as_json", is_flag=True, help="Print rows, ratios and profiles as JSON.")
def command(
    files: tuple[Path, ...],
    names: tuple[str, ...],
    baseline: Path | None,
    threads: int,
    warmup: int,
    runs: int,
    restarts: int,
    options: tuple[str, ...],
    profile: bool,
    quick: bool,
    as_json: bool,
) -> None:
    """Measure FILES (.tflite or .onnx), interleaved; with --baseline also the ratio with its 95% interval."""
    from pipeline.cli.progress import bars
    from targets.base import check_counts
    from targets.bench import collect

    paths = [*([baseline] if baseline is not None else []), *files]
    check_counts(paths, warmup=warmup, runs=runs, restarts=restarts)
    chosen = tuple(dict.fromkeys(names)) or ("host-ort" if paths[0].suffix.lower() == ".onnx" else "host-litert",)
    made = _make(chosen, paths, threads, options)
    if quick:
        runs, restarts = min(runs, _QUICK_RUNS), 1
    # A nightly job that is told to end must clean its devices as after Ctrl-C.
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with bars([f"measuring on {name}" for name in made]) as advance:
            found = collect(
                made, paths, warmup=warmup, runs=runs, restarts=restarts, quick=quick,
                on_progress=dict(zip(made, advance, strict=True)),
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, previous)
    ratios = _ratios(found) if baseline is not None else {}
    profiles, troubles = _profiles(paths, threads) if profile else ([], [])
    failed = any(row.failure for rows in found.values() for row in rows) or bool(troubles)
    if as_json:
        click.echo(_json(found, ratios, profiles))
    else:
        for name, rows in found.items():
            _print_rows(name, rows, ratios.get(name, {}))
        _print_profiles(profiles, compared=baseline is not None)
    for trouble in troubles:
        click.echo(f"profile: {trouble}", err=True)
    if failed:
        raise click.exceptions.Exit(FAILED)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _make(names: Sequence[str], paths: Sequence[Path], threads: int, options: Sequence[str]) -> "dict[str, Target]":
    """Makes the targets, and refuses wrong files and options before anything runs."""
    import targets
    from targets.errors import ModelFileError, OptionError
    from targets.registry import with_defaults

    for path in paths:
        if not path.is_file():
            raise ModelFileError(f"no model file at {path}", hint="give the path of a .tflite or .onnx file")
    given = [_option(text) for text in options]
    owners = {"", *names, *(name.partition(":")[0] for name in names)}
    if strangers := [owner for owner, _, _ in given if owner not in owners]:
        raise OptionError(f"--option names target '{strangers[0]}'", hint=f"use one of {', '.join(names)}")
    made = {}
    for name in names:
        mine = {key: value for owner, key, value in given if owner in ("", name, name.partition(":")[0])}
        made[name] = targets.get(name, **with_defaults(name, mine, threads=threads))
        forms = getattr(made[name], "formats", ("tflite", "onnx"))
        for path in paths:
            if path.suffix.lower().removeprefix(".") not in forms:
                kinds = " and ".join(f".{form}" for form in forms)
                raise ModelFileError(f"{name} runs {kinds} files, not {path.name}", hint="choose another target")
    return made


def _option(text: str) -> tuple[str, str, Any]:
    """Splits ``[TARGET.]NAME=VALUE``; a target's address may have dots of its own."""
    import yaml

    from targets.errors import OptionError

    left, equals, value = text.partition("=")
    owner, _, name = left.rpartition(".")
    if not equals or not name.isidentifier():
        raise OptionError(f"--option {text!r} is not of the form [TARGET.]NAME=VALUE", hint="e.g. cores=[0,1]")
    try:
        return owner, name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OptionError(f"the value of --option {text!r} is no YAML", hint="put it in quotes") from error


def _ratios(found: "Mapping[str, Sequence[Measurement]]") -> "dict[str, dict[int, Ratio | str]]":
    """Compares each target's rows with its first one; a comparison that cannot be made says why."""
    from targets.errors import StatsError
    from targets.stats import ratio_interval

    ratios: dict[str, dict[int, Ratio | str]] = {name: {} for name in found}
    for name, rows in found.items():
        for index, row in enumerate(rows[1:], start=1):
            if row.failure or rows[0].failure:
                continue
            try:
                ratios[name][index] = ratio_interval(rows[0], row)
            except StatsError as error:
                ratios[name][index] = error.what
    return ratios


def _profiles(paths: Sequence[Path], threads: int) -> "tuple[list[Profile], list[str]]":
    from targets.errors import TargetError
    from targets.model_file import telling_names
    from targets.profile import profile

    profiles, troubles = [], []
    for path, model in zip(paths, telling_names(paths), strict=True):
        try:
            profiles.append(replace(profile(path, threads=threads), model=model))
        except TargetError as error:
            troubles.append(f"{model}: {error}")
    return profiles, troubles


def _json(
    found: "Mapping[str, Sequence[Measurement]]",
    ratios: "Mapping[str, Mapping[int, Ratio | str]]",
    profiles: "Sequence[Profile]",
) -> str:
    compared = [
        {"target": name, "baseline": found[name][0].model, "file": found[name][index].model}
        | ({"why_not": ratio} if isinstance(ratio, str) else ratio.as_dict())
        for name, those in ratios.items()
        for index, ratio in those.items()
    ]
    content = {
        "rows": [row.as_dict() for rows in found.values() for row in rows],
        "ratios": compared,
        "profiles": [item.as_dict() for item in profiles],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _print_rows(name: str, rows: "Sequence[Measurement]", ratios: "Mapping[int, Ratio | str]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = rows[0]
    device = " ".join(filter(None, (first.device.name, first.device.cpu)))
    facts = [device, f"{first.runtime} {first.runtime_version}".strip(), f"{first.threads} thread(s)"]
    title = f"{name}: {', '.join(filter(None, facts))}" if not first.failure else name
    table = Table(title=escape(title) + (" (QUICK: fewer runs)" if first.quick else ""), title_justify="left")
    for column in ("file", "precision", "cost of one inference", "p10 to p90", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row.model, row.precision, _cost(row), _spread(row), _note(row))
        table.add_row(*map(escape, cells), style="red" if row.failure else None)
    Console(width=None if Console().is_terminal else 140).print(table, highlight=False)
    for index, ratio in ratios.items():
        click.echo(f"{name}: {rows[index].model} / {first.model} = {ratio}")
    if ratios:
        click.echo()


def _cost(row: "Measurement") -> str:
    if row.failure:
        return "failed"
    if row.median_ms is not None:
        return f"{row.median_ms:.3f} ms"
    if row.instructions is not None:
        return f"{row.instructions / 1e6:.3f} M instructions"
    return f"{row.cycles / 1e6:.3f} M cycles" if row.cycles is not None else f"no figure; ran: {row.actual_accelerator}"


def _spread(row: "Measurement") -> str:
    return "" if row.p10_ms is None else f"{row.p10_ms:.3f} to {row.p90_ms:.3f} ms"


def _note(row: "Measurement") -> str:
    return (
        f"{row.failure}: {row.invalid_reason}"
        if row.failure
        else "; ".join(filter(None, (row.invalid_reason, row.note)))
    )


def _print_profiles(profiles: "Sequence[Profile]", *, compared: bool) -> None:
    """Prints each file's operators beside the baseline's; without a baseline, each file's alone."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from targets.profile import comparison

    console = Console(width=None if Console().is_terminal else 140)
    pairs = [(profiles[0], other) for other in profiles[1:]] if compared else [(item, None) for item in profiles]
    for baseline, other in pairs:
        header, lines = comparison(baseline, other)
        what = f"{baseline.runtime} {baseline.runtime_version}"
        title = f"operators by {what}'s own profiler on this machine (it slows what it watches)"
        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(header):
            table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
        for number, line in enumerate(lines, start=1):
            table.add_row(*map(escape, line), end_section=number == len(lines) - 1)
        console.print(table, highlight=False)
