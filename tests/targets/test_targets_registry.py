"""Targets by name, from here and from other packages; and what importing the package costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import targets
from targets.errors import OptionError, SetupError, UnknownTargetError
from targets.registry import ENTRY_POINT_GROUP, takes

SOURCES = sorted(Path(targets.__file__).parent.rglob("*.py"))


def test_the_documentation_names_every_target_and_variable() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/targets.md").read_text()
    assert [name for name in targets.names() if f"`{name}" not in text] == []
    code = "".join(path.read_text() for path in (root / "targets").glob("*.py"))
    assert set(re.findall(r"LAYERFOLD_[A-Z_]+", code)) == set(re.findall(r"LAYERFOLD_[A-Z_]+", text))


def test_every_name_but_those_that_need_a_device_makes_its_target() -> None:
    assert targets.names()[:2] == ["host-litert", "host-ort"]
    for name in ("host-litert", "host-ort"):
        assert targets.get(name, threads=1).name == name


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownTargetError, match="did you mean 'host-litert'"):
        targets.get("host-liter")
    with pytest.raises(UnknownTargetError, match="known targets: host-litert"):
        targets.get("zzz")


def test_an_option_that_the_target_does_not_take_is_named() -> None:
    with pytest.raises(OptionError, match=r"(?s)thread'.*threads, cores"):
        targets.get("host-litert", thread=1)
    with pytest.raises(OptionError, match="device"):
        targets.get("host-litert:serial")


def test_another_package_adds_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boards.py").write_text(
        "class Board:\n    name = 'board'\n    formats = ('tflite',)\n"
        "    def __init__(self, *, device='b0', threads=1):\n        self.seen = (device, threads)\n"
    )
    info = tmp_path / "boards-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boards\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\nboard = boards:Board\nhost-litert = boards:Board\nbroken = boards:None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert targets.names()[-2:] == ["board", "broken"]
    board = targets.get("board:b7", threads=2)
    assert board.seen == ("b7", 2)  # type: ignore[attr-defined]
    assert type(targets.get("host-litert")).__name__ == "HostTarget", "a package must not shadow a built-in target"
    assert takes("board:b7", "threads") and not takes("board", "cores")
    with pytest.raises(SetupError, match="broken of boards cannot be loaded"):
        targets.get("broken")


def test_it_is_known_which_target_takes_threads() -> None:
    for name in targets.names():
        assert takes(name, "threads") and not takes(name, "thread")


def test_listing_devices_names_this_machine() -> None:
    host = targets.devices()[0]
    assert (host.id, host.kind, host.state) == ("host", "host", "ready")
    assert host.cores >= 1 and host.memory_mb > 0


def test_importing_targets_loads_nothing_heavy() -> None:
    code = "import sys, targets, targets.base; print(sorted(m.partition('.')[0] for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("numpy", "torch", "ai_edge_litert", "onnxruntime", "psutil", "onnx"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_targets_know_nothing_of_the_pipeline(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in imported if name.partition(".")[0] == "pipeline"]


def test_the_worker_runs_on_a_device_of_its_own() -> None:
    """It is pushed alone to devices with Python 3.8, so it may import nothing from here and use no newer syntax."""
    source = next(path for path in SOURCES if path.name == "worker.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "targets"
