"""The console script's door: makes sure that `pipeline` and `targets` are layerfold's own before opening them.

Both are common names. Where another package of that name comes first on the path, every verb would fail with a
baffling import error; this module has a name of its own, so it can say what is wrong.
"""

__all__ = ["main"]

import importlib.util
import sys
from pathlib import Path

# What only layerfold's package of that name holds.
_MARKS = {"pipeline": ("cli/options.py", "stages/workbench.py"), "targets": ("registry.py", "gates.py")}


def main() -> None:
    """Runs the command line, or exits with 2 and names the package that stands in the way."""
    for name, marks in _MARKS.items():
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        if any(all((Path(place) / mark).is_file() for mark in marks) for place in places):
            continue
        found = spec.origin or ", ".join(places) if spec is not None else "none at all"
        sys.stderr.write(
            f"error: the Python package '{name}' that comes first on the path is not layerfold's: {found}\n"
            "  fix: install layerfold into an environment of its own (`make install` makes .venv), and do not run it "
            f"from a folder, or with a PYTHONPATH, that has another `{name}`\n"
        )
        sys.exit(2)
    from pipeline.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
