"""Debian packages of another architecture: what the tools that unpack them say, in whatever letters."""

import os
from pathlib import Path

import pytest

from targets.debian_root import Package, unpack
from targets.errors import SetupError


def test_a_complaint_in_another_encoding_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "dpkg-deb"
    tool.write_bytes("#!/bin/sh\necho 'archive abîmé' >&2\nexit 2\n".encode("latin-1"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SetupError, match=r"cannot unpack x\.deb: archive ab.m."):
        unpack([Package("x", "1", tmp_path / "x.deb", "")], tmp_path / "root")
