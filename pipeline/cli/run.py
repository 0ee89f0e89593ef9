"""`layerfold run`: a recipe from pretrained network to table."""

__all__ = ["command"]

import os
from pathlib import Path

import click

from pipeline.cli.options import (
    out_option,
    quick_option,
    recipe_argument,
    run_folder,
    say,
    set_option,
    terminated_as_interrupt,
)
from pipeline.errors import TrainingError, VerifyError

_EPILOG = """\b
Examples:
  layerfold run quickstart
  layerfold run efficientnet_lite/lite0_photos --out runs/lite0
  layerfold run mobilenet_v2/imagenet_100 --set data.root=/data/imagenet
  layerfold run my_recipe.yaml --quick --set prefold.lambda_c=0.5
  layerfold run study/ednl --quick
"""


@click.command(epilog=_EPILOG)
@recipe_argument
@out_option
@set_option
@quick_option
def command(recipe: str, out: Path | None, overrides: tuple[str, ...], quick: bool) -> None:
    """Run RECIPE (a shipped name or a YAML file; a study too) and print its table.

    Finished stages are kept and never run again; a stopped or killed run resumes with the same command.
    """
    _refuse_several_processes()
    from pipeline.study.schema import is_study

    if is_study(recipe):
        from pipeline.cli.study import run_study

        run_study(recipe, out, overrides, quick)
        return
    from pipeline import adapting, facts, plan, preflight, recipe_files, runner
    from pipeline.cli.progress import TerminalEvents
    from pipeline.results.collect import load_report

    loaded = adapting.adapted(recipe_files.load(recipe, overrides=overrides, quick=quick), say=say)
    folder = run_folder(loaded, out)
    planned = plan.build(loaded, facts.gather(loaded, say=say))
    states = runner.stage_states(planned, folder)
    done = ("cached", "shared")
    if any(state not in done for state in states.values()):
        preflight.check(loaded, load_weights=states["baseline"] not in done)
    with terminated_as_interrupt(), TerminalEvents(len(planned.stages)) as events:
        outcome = runner.execute(planned, folder, events)
    report = load_report(outcome.folder / "report.json")
    from pipeline.report.table import terminal_table

    terminal_table(report)
    click.echo(f"report: {outcome.folder / 'report.html'}")
    if report.failures:
        raise VerifyError(
            "; ".join(report.failures),
            hint=f"see the red rows of {outcome.folder / 'report.html'}; the files are kept for inspection",
        )


def _refuse_several_processes() -> None:
    """Stops before every process of a `torchrun` begins the same run: all of them would want the run folder.

    Raises:
        TrainingError: This is one of several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise TrainingError(
            f"this is one of {size} processes (WORLD_SIZE), and `layerfold run` is one process",
            hint="start it without torchrun; what trains on several processes is a script of your own that calls "
            "pipeline.training.loop.fit (docs/training.md)",
        )
