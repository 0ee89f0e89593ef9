"""`layerfold plan`: what a run would do."""

__all__ = ["command"]

from pathlib import Path

import click

from pipeline.cli.options import duration, out_option, quick_option, recipe_argument, run_folder, say, set_option

_EPILOG = """\b
Examples:
  layerfold plan quickstart
  layerfold plan mobilenet_v2/imagenet_100 --set data.root=/data/imagenet --no-estimate
"""


@click.command(epilog=_EPILOG)
@recipe_argument
@out_option
@set_option
@quick_option
@click.option("--estimate/--no-estimate", default=True, help="Time a few steps of the model to estimate the stages.")
def command(recipe: str, out: Path | None, overrides: tuple[str, ...], quick: bool, estimate: bool) -> None:
    """Show the stages of RECIPE with their hashes, what is cached already, and roughly how long the rest takes."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.study.schema import is_study

    if is_study(recipe):
        from pipeline.cli.study import plan_study

        plan_study(recipe, out, overrides, quick, estimate=estimate)
        return

    from pipeline import adapting, facts, plan, preflight, recipe_files, runner

    loaded = adapting.adapted(recipe_files.load(recipe, overrides=overrides, quick=quick), say=say)
    found = facts.gather(loaded, say=say)
    preflight.check(loaded, load_weights=False)
    planned = plan.build(loaded, found)
    folder = run_folder(loaded, out)
    states = runner.stage_states(planned, folder)
    seconds: dict[str, float] = {}
    if estimate and any(state not in ("cached", "shared") for state in states.values()):
        from pipeline.estimate import estimate_seconds

        seconds = estimate_seconds(loaded)
    table = Table(title=f"{loaded.name} ({loaded.variant}) in {folder}", title_justify="left")
    for column in ("stage", "hash", "state", "about"):
        table.add_column(column)
    total_s = 0.0
    for stage in planned.stages:
        state = states[stage.name]
        to_do_s = 0.0 if state in ("cached", "shared") else seconds.get(stage.name, 0.0)
        total_s += to_do_s
        table.add_row(stage.name, stage.hash, state, duration(to_do_s) if seconds and to_do_s else "")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(f"data: {found['data']}   weights: {found['weights']}", highlight=False, markup=False)
    if seconds:
        console.print(f"to do: about {duration(total_s)} on this machine", highlight=False, markup=False)
