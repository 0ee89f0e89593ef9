"""What `layerfold devices` says of adb, from what a program in its place prints."""

from pathlib import Path

import pytest

from targets.adb import choose
from targets.android import devices
from targets.errors import DeviceError

LISTING = """List of devices attached
R5CT1          device usb:1-1 product:p model:Model_7 device:d transport_id:1
R5CT2          unauthorized usb:1-2 transport_id:2
R5CT3          no permissions (user in plugdev group; are your udev rules wrong?); see [http://x] usb:1-3
"""


def stand_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "adb"
    program.write_text(f"#!/bin/sh\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("LAYERFOLD_ADB", str(program))


def test_every_state_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "listing").write_text(LISTING)
    stand_in(tmp_path, f"cat {tmp_path}/listing", monkeypatch)
    ready, locked, refused = devices()
    assert (ready.id, ready.name, ready.state) == ("R5CT1", "Model_7", "ready")
    assert locked.state.startswith("unauthorized: unlock the device")
    assert refused.state.startswith("no permissions: ") and "udev" in refused.state
    with pytest.raises(DeviceError, match=r"(?s)R5CT3 is no permissions.*plugdev"):
        choose("R5CT3")


def test_an_adb_that_is_missing_or_broken_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo cannot bind >&2; exit 1", monkeypatch)
    (row,) = devices()
    assert "not ready: adb devices failed: cannot bind" in row.state
    monkeypatch.setenv("LAYERFOLD_ADB", str(tmp_path / "none"))
    (row,) = devices()
    assert "cannot be started" in row.state and "LAYERFOLD_ADB" in row.state
