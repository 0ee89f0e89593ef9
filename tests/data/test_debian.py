"""Debian packages without root: against a scripted apt, and once against the real one."""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from pipeline.data import debian
from pipeline.errors import DataError

DEB = b"the archive"

APT = """#!/bin/sh
# A stand-in for apt-get: lists are fresh once `update` ran; the archive is $DEB_FILE.
echo "$@" >> "$FAKE/calls"
for word in "$@"; do case "$word" in update|download) verb=$word ;; --print-uris) uris=1 ;; esac; done
case "$verb" in
  update)
    [ -e "$FAKE/offline" ] && { echo "W: Failed to fetch lists" >&2; exit 0; }
    touch "$FAKE/fresh"; exit 0 ;;
  download)
    [ -e "$FAKE/fresh" ] || { echo "E: Unable to locate package" >&2; exit 100; }
    [ -n "$uris" ] && { cat "$FAKE/uris"; exit 0; }
    [ -e "$FAKE/gone" ] && { rm "$FAKE/gone"; echo "E: 404 Not Found" >&2; exit 100; }
    [ -e "$FAKE/deny" ] && { echo "E: Failed to fetch: connection refused" >&2; exit 100; }
    cp "$FAKE/archive" tiny_1.0-1_all.deb; exit 0 ;;
esac
"""
DPKG = """#!/bin/sh
[ -e "$FAKE/full" ] && { echo "dpkg-deb: error: No space left on device" >&2; exit 2; }
mkdir -p "$3/usr/share/tiny" && cp "$2" "$3/usr/share/tiny/data"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that steers scripted apt-get and dpkg-deb, in front of a cache of its own."""
    tools, state = tmp_path / "tools", tmp_path / "state"
    tools.mkdir()
    state.mkdir()
    for name, script in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (state / "archive").write_bytes(DEB)
    promise(state, len(DEB), hashlib.sha256(DEB).hexdigest())
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(state))
    monkeypatch.setenv("LAYERFOLD_CACHE", str(tmp_path / "cache"))
    return state


def promise(state: Path, size: int, sha256: str) -> None:
    (state / "uris").write_text(f"'http://mirror/tiny_1.0-1_all.deb' tiny_1.0-1_all.deb {size} SHA256:{sha256}\n")


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "debian").iterdir() if path.name not in (".lock", "apt"))


def test_a_package_is_fetched_once(fake: Path, tmp_path: Path) -> None:
    said: list[str] = []
    package = debian.obtain("tiny", say=said.append)
    assert (package.root / "usr/share/tiny/data").read_bytes() == DEB
    assert (package.version, package.sha256) == ("1.0-1", hashlib.sha256(DEB).hexdigest())
    assert any("downloading the Debian package tiny" in text for text in said)
    calls = (fake / "calls").read_text()
    assert debian.obtain("tiny") == package == debian.unpacked("tiny")
    assert (fake / "calls").read_text() == calls
    assert left_over(tmp_path) == ["tiny"]


def test_apt_keeps_to_its_private_folder(fake: Path, tmp_path: Path) -> None:
    debian.obtain("tiny")
    private = str(tmp_path / "cache" / "debian" / "apt")
    for call in (fake / "calls").read_text().splitlines():
        for option in ("Dir::State=", "Dir::State::status=", "Dir::Cache="):
            assert f"{option}{private}" in call


def test_stale_lists_are_renewed_once(fake: Path) -> None:
    (fake / "fresh").touch()
    (fake / "gone").touch()
    assert debian.obtain("tiny").version == "1.0-1"
    assert sum(call.endswith("update") for call in (fake / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("size", "sha256", "message"),
    [
        (len(DEB), "0" * 64, "sha256"),
        (len(DEB) + 1, hashlib.sha256(DEB).hexdigest(), "has 11 bytes, the package list says 12"),
    ],
)
def test_an_archive_that_is_not_the_promised_one_is_never_unpacked(
    fake: Path, tmp_path: Path, size: int, sha256: str, message: str
) -> None:
    promise(fake, size, sha256)
    with pytest.raises(DataError, match=message):
        debian.obtain("tiny")
    assert debian.unpacked("tiny") is None and left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("offline", "no package tiny.*Failed to fetch lists"),
        ("deny", "connection refused"),
        ("full", "No space left on device"),
    ],
)
def test_trouble_is_told_and_leaves_nothing(fake: Path, tmp_path: Path, switch: str, message: str) -> None:
    (fake / switch).touch()
    with pytest.raises(DataError, match=message):
        debian.obtain("tiny")
    assert left_over(tmp_path) == []


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LAYERFOLD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="apt-get and dpkg-deb not on PATH"):
        debian.obtain("tiny")


def test_names_that_are_no_packages_never_reach_apt(fake: Path) -> None:
    for name in ("-o=evil", "a/b", "../x", ""):
        with pytest.raises(DataError, match="no name of a Debian package"):
            debian.obtain(name)
    assert not (fake / "calls").exists()


def test_a_half_written_record_counts_as_absent(fake: Path, tmp_path: Path) -> None:
    package = debian.obtain("tiny")
    (package.root.parent / "package.json").write_text("{")
    assert debian.unpacked("tiny") is None
    assert debian.obtain("tiny") == package


def test_the_real_apt_fetches_a_small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if debian.unavailable():
        pytest.skip(str(debian.unavailable()))
    try:
        socket.create_connection(("deb.debian.org", 80), timeout=5).close()
    except OSError as error:
        pytest.skip(f"no network to the Debian mirror: {error}")
    monkeypatch.setenv("LAYERFOLD_CACHE", str(tmp_path))
    package = debian.obtain("hello")
    assert (package.root / "usr/bin/hello").is_file()
    record = json.loads((package.root.parent / "package.json").read_text())
    assert record["version"] == package.version and len(record["sha256"]) == 64
    shutil.rmtree(tmp_path / "debian")
