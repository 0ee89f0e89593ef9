"""Options that several verbs share, and how a recipe is read from them."""

__all__ = [
    "duration",
    "out_option",
    "quick_option",
    "recipe_argument",
    "run_folder",
    "say",
    "set_option",
    "terminated_as_interrupt",
]

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

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


def duration(seconds: float) -> str:
    """A rough duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM end a run as Ctrl-C does: after a checkpoint, to be resumed."""
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _as_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
