"""Options that several verbs share, and how a recipe is read from them."""

__all__ = ["out_option", "quick_option", "recipe_argument", "run_folder", "say", "set_option"]

from pathlib import Path

import click

from pipeline.plan import run_folder_name
from pipeline.recipe import Recipe

recipe_argument = click.argument("recipe", metavar="RECIPE")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, e.g. data.root=photos.",
)
quick_option = click.option("--quick", is_flag=True, help="Apply the recipe's short variant; results are marked so.")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Run folder.  [default: runs/<recipe>-<hash>]",
)


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    """The run folder: the one asked for, else `runs/<recipe>-<hash>` below the current folder."""
    return out if out is not None else Path("runs") / run_folder_name(recipe)


def say(text: str) -> None:
    """A line on stderr, for what takes a while before the bars begin."""
    click.echo(text, err=True)
