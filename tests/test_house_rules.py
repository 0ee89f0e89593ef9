"""The arrows between the rooms, the package list, and a quick command line, held by machine."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} uses a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# Room -> rooms that it may import; everything not named is forbidden.
ARROWS = {
    "targets": {"targets"},
    "pipeline/folding": {"pipeline.folding", "pipeline.errors", "pipeline.models"},
    "pipeline/report": {"pipeline.report", "pipeline.results", "pipeline.errors"},
    "pipeline/results": {
        "pipeline.results",
        "pipeline.artifacts",
        "pipeline.errors",
        "pipeline.recipe",
        "pipeline.versions",
    },
    "pipeline/data": {"pipeline.data", "pipeline.errors", "pipeline.models.torchvision_repair"},
    "pipeline/models": {"pipeline.models", "pipeline.artifacts", "pipeline.errors"},
    "pipeline/alpha": {"pipeline.alpha", "pipeline.errors", "pipeline.folding", "pipeline.models"},
}


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_data_flows_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            if name.split(".")[0] in ("pipeline", "targets"):
                allowed = any(name == room_ok or name.startswith(room_ok + ".") for room_ok in ARROWS[room])
                assert allowed or name == "pipeline", f"{path.relative_to(ROOT)} imports {name}"


def test_the_package_list_is_complete() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("pipeline", "targets")
        for p in (ROOT / top).rglob("__init__.py")
    }
    recipes = {
        "pipeline." + p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for p in (ROOT / "recipes").rglob("__init__.py")
    }
    assert set(settings["packages"]) == found | recipes
    assert {p.parent for p in (ROOT / "recipes").rglob("*.yaml")} <= {
        p.parent for p in (ROOT / "recipes").rglob("*.py")
    }


def test_help_imports_nothing_heavy() -> None:
    """Half a second for `--help` is kept by what is not imported (a timed test would be flaky)."""
    code = (
        "import sys\n"
        "sys.argv = ['layerfold', '--help']\n"
        "from pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "import targets.base\n"
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'onnxruntime', 'litert_torch', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_vague_file_names_and_no_overgrown_files() -> None:
    for path in [
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "targets").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
    ]:
        assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}, path
        assert len(path.read_text().splitlines()) <= 350, f"{path} has grown into two rooms"
