"""Damage to the emulated root is found and built again, also when the repair itself was interrupted."""

import json
from pathlib import Path

import pytest

from targets import emulated_setup
from targets.errors import SetupError
from targets.model_file import sha256_of

STEPS = ("guest", "processor", "qemu", "wheels", "plugin")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished root in small: one file of each kind, all marks, and the manifest that fits."""
    for name in ("site/numpy/__init__.py", "sysroot/usr/lib/python3.11/os.py", "sysroot/usr/lib/libc.so.6"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("qemu/usr/bin/qemu-aarch64", "count.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "done").mkdir()
    for step in STEPS:
        (tmp_path / f"done/{step}-1").touch()
    manifest = {
        "revision": 1, "plugin_source": "", "qemu": "7.2", "versions": emulated_setup._versions(),
        "files": {str(p.relative_to(tmp_path)): sha256_of(p) for p in emulated_setup._run_files(tmp_path)},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def marks(root: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in (root / "done").iterdir()}


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("site/numpy/__init__.py", {"wheels"}),
        ("sysroot/usr/lib/python3.11/os.py", {"guest", "processor"}),
        ("qemu/usr/bin/qemu-aarch64", {"qemu"}),
        ("count.so", {"plugin"}),
    ],
)
def test_a_damaged_file_of_any_kind_is_built_again(root: Path, name: str, again: set[str]) -> None:
    (root / name).write_text("damaged")
    emulated_setup._drop_damaged(root, root / "done")
    assert marks(root) == set(STEPS) - again


def test_a_whole_root_keeps_its_marks(root: Path) -> None:
    emulated_setup._drop_damaged(root, root / "done")
    assert marks(root) == set(STEPS)


def test_an_interrupted_repair_blesses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "site/numpy/__init__.py").write_text("damaged")

    def interrupt(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(emulated_setup, "sha256_of", interrupt)
        emulated_setup._drop_damaged(root, root / "done")
    emulated_setup._drop_damaged(root, root / "done")
    assert "wheels" not in marks(root)


@pytest.mark.parametrize("text", ["{}", "[]", '{"revision": 0}', "{", '{"revision": 1, "files": []}', "\x00"])
def test_a_damaged_manifest_is_said_so_and_everything_is_built_again(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text)
    with pytest.raises(SetupError, match="damaged"):
        emulated_setup.find(root)
    emulated_setup._drop_damaged(root, root / "done")
    assert marks(root) == set()
