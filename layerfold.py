"""The console script's door: makes sure that `pipeline` is layerfold's own package before opening it.

`pipeline` is a common name. Where another package of that name comes first on the path, every verb would fail with
a baffling import error; this module has a name of its own, so it can say what is wrong.
"""

__all__ = ["main"]

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Runs the command line, or exits with 2 and names the package that stands in the way."""
    spec = importlib.util.find_spec("pipeline")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not any(
        (Path(place) / "cli" / "options.py").is_file() and (Path(place) / "stages").is_dir() for place in places
    ):
        found = spec.origin or ", ".join(places) if spec is not None else "none at all"
        sys.stderr.write(
            f"error: the Python package 'pipeline' that comes first on the path is not layerfold's: {found}\n"
            "  fix: install layerfold into an environment of its own (`make install` makes .venv), and do not run it "
            "from a folder, or with a PYTHONPATH, that has another `pipeline`\n"
        )
        sys.exit(2)
    from pipeline.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
