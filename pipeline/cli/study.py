"""What `layerfold run` and `layerfold plan` do with a study file."""

__all__ = ["plan_study", "run_study"]

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import duration, say, terminated_as_interrupt
from pipeline.cli.progress import TerminalEvents
from pipeline.plan import Plan
from pipeline.runner import RunEvents

if TYPE_CHECKING:
    from pipeline.study.execute import CellStates

_DONE = ("cached", "shared")


def run_study(name: str, out: Path | None, overrides: tuple[str, ...], quick: bool) -> None:
    """Runs every cell that is not done, prints the knees, and says where the page is."""
    from pipeline import preflight
    from pipeline.study import execute, page, schema

    study = schema.load(name, overrides=overrides, quick=quick)
    folder = schema.study_folder(study, out)
    planned = execute.cell_states(study, folder, say)
    to_do = [entry for entry in planned if any(state not in _DONE for state in entry.states.values())]
    for entry in _first_of_each_network(to_do):
        preflight.check(entry.cell.recipe, load_weights=entry.states["baseline"] not in _DONE)
    with terminated_as_interrupt(), ExitStack() as stack:

        def events(plan: Plan, title: str) -> RunEvents:
            stack.close()
            click.echo(title, err=True)
            return stack.enter_context(TerminalEvents(len(plan.stages)))

        result = execute.execute(study, folder, events, say)
    from rich.console import Console
    from rich.table import Table

    marks = [word for word, there in (("QUICK", study.variant == "quick"), ("reduced", bool(study.reduced))) if there]
    title = f"{study.name} on {result.data}" + (f" ({', '.join(marks)})" if marks else "")
    table = Table(title=title, title_justify="left")
    for column in ("network", "depths", "accuracy", f"knee within {study.tolerance_points:g} points", "broken stick"):
        table.add_column(column)
    for row in result.knees:
        curve = result.curve(row.network)
        accuracies = [100 * accuracy for _, accuracy in curve]
        table.add_row(
            row.network,
            f"{curve[0][0]} to {curve[-1][0]}",
            f"{min(accuracies):.1f}% to {max(accuracies):.1f}%",
            str(row.within_tolerance),
            "" if row.hinge is None else f"{row.hinge} ({row.hinge_low} to {row.hinge_high})",
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(page.finding(result), highlight=False, markup=False)
    click.echo(f"report: {folder / 'report.html'}")


def plan_study(name: str, out: Path | None, overrides: tuple[str, ...], quick: bool, *, estimate: bool) -> None:
    """Shows every cell with the state of its stages, and roughly how long the rest takes."""
    from rich.console import Console
    from rich.table import Table

    from pipeline import preflight
    from pipeline.study import execute, schema

    study = schema.load(name, overrides=overrides, quick=quick)
    folder = schema.study_folder(study, out)
    planned = execute.cell_states(study, folder, say)
    seconds: dict[str, dict[str, float]] = {}
    for entry in _first_of_each_network(planned):
        preflight.check(entry.cell.recipe, load_weights=False)
        if estimate:
            from pipeline.estimate import estimate_seconds

            seconds[entry.cell.network] = estimate_seconds(entry.cell.recipe)
    table = Table(title=f"{study.name} ({study.variant}) in {folder}", title_justify="left")
    stages = [stage.name for stage in planned[0].plan.stages]
    for column in ("network", "λ_c", "seed", *stages, "about"):
        table.add_column(column)
    total_s = 0.0
    to_train: set[str] = set()
    for entry in planned:
        states = dict(entry.states)
        baseline = entry.plan.stage("baseline").hash
        if states["baseline"] not in _DONE:
            if baseline in to_train:
                states["baseline"] = "shared"
            to_train.add(baseline)
        cost = seconds.get(entry.cell.network, {})
        cell_s = sum(cost.get(stage, 0.0) for stage in stages if states[stage] not in _DONE)
        total_s += cell_s
        about = duration(cell_s) if cell_s else ""
        table.add_row(
            entry.cell.network, f"{entry.cell.lambda_c:g}", str(entry.cell.seed), *(states[s] for s in stages), about
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    if seconds:
        console.print(f"to do: about {duration(total_s)} on this machine", highlight=False, markup=False)


def _first_of_each_network(planned: "list[CellStates]") -> "list[CellStates]":
    return list({entry.cell.network: entry for entry in reversed(planned)}.values())[::-1]
