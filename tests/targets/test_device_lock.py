"""Two runs of one user never hold a device at once, and never sweep each other's files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from targets.errors import DeviceBusyError, SetupError
from targets.locks import device_lock, lock_folder
from targets.remote import owner_tag


def test_runs_with_different_homes_still_exclude_each_other(tmp_path: Path) -> None:
    identity = f"serial of {tmp_path}"
    homes = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "s"), "TMPDIR": str(tmp_path)}
    code = (
        "import sys\nfrom targets.locks import device_lock\nfrom targets.remote import owner_tag\n"
        f"with device_lock({identity!r}):\n print(owner_tag({identity!r}), flush=True)\n sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **homes}, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline().strip() == owner_tag(identity)
        with pytest.raises(DeviceBusyError, match="another run holds"), device_lock(identity):
            pass
    finally:
        other.communicate()
    with device_lock(identity):
        assert lock_folder().stat().st_mode & 0o777 == 0o700


def test_runs_that_lock_elsewhere_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = owner_tag("S1")
    monkeypatch.setenv("LAYERFOLD_LOCK_FOLDER", str(tmp_path / "locks"))
    assert owner_tag("S1") != usual
    with device_lock("S1"):
        assert (tmp_path / "locks").is_dir()


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    monkeypatch.setenv("LAYERFOLD_LOCK_FOLDER", str(tmp_path / "locks"))
    with pytest.raises(SetupError, match="not this user's own"), device_lock("S1"):
        pass
