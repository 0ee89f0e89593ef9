"""The command line: one verb per module, each imported only when it is called, so that `--help` stays quick."""

__all__ = ["main"]

import sys
from importlib import import_module

import click

import pipeline
from pipeline.errors import LayerfoldError, nearest
from targets.errors import TargetError

_VERBS = {
    "run": "run a recipe from pretrained network to table",
    "plan": "show a recipe's stages, what is cached, and the time it may take",
    "fold": "fold units of a model without a recipe",
    "export": "convert a folded model to TFLite and ONNX",
    "bench": "measure model files against each other on a target",
    "report": "print a finished run's table again",
    "devices": "list the targets and the devices attached",
    "targets": "list the targets, and set up what has to be built first",
    "inspect": "show what is inside a model file or a run folder",
    "doctor": "say what is installed, what is missing, and how to get it",
}
# Only this verb (recipes and studies) keeps what is done and goes on from there.
_RESUMING = "run"
INTERRUPTED = 130


class _Verbs(click.Group):
    """Loads `pipeline.cli.<verb>` when the verb is called and names the nearest verb when it is unknown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = import_module(f"pipeline.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            close = nearest(args[0], _VERBS)
            ctx.fail(f"no verb '{args[0]}'" + (f"; {close}" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: layerfold doctor; layerfold run quickstart",
)
@click.version_option(pipeline.__version__, prog_name="layerfold")
def _root() -> None:
    """Turn a pretrained CNN into a shallower, faster on-device model, and prove it with a table."""


def main() -> None:
    """Entry point of the console script `layerfold`.

    Exit codes: 0 done; 1 done, but a check failed (an exported file that predicts otherwise); 2 wrong input;
    130 stopped by Ctrl-C.
    """
    try:
        code = _root(prog_name="layerfold", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        resumes = sys.argv[1:2] == [_RESUMING]
        click.echo(
            "stopped; the same command resumes where this one stopped" if resumes else "stopped before it was done",
            err=True,
        )
        code = INTERRUPTED
    except (LayerfoldError, TargetError) as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except OSError as error:  # a path that cannot be read or written; whoever knows what it was for said so before
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}\n  fix: give a path that can be read or written", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
