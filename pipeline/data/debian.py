"""Fetches a Debian package's files without installing it, as any user.

apt works in a state folder of our own below the cache, with the machine's own sources and keys, so neither root nor
the system's package lists are needed. Size and SHA-256 are checked against apt's signed metadata before the archive
is opened.
"""

__all__ = ["Package", "obtain", "unavailable", "unpacked"]

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from pipeline.data import cache
from pipeline.errors import DataError

_TIMEOUT_S = 900
_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?:SHA256:(?P<sha256>[0-9a-f]{64}))?$", re.MULTILINE)
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


@dataclass(frozen=True)
class Package:
    """A package's files, unpacked.

    Attributes:
        name: The package.
        version: Its version.
        sha256: Of the `.deb`.
        root: Folder that stands for `/`: files lie at `root / 'usr/share/…'`.
    """

    name: str
    version: str
    sha256: str
    root: Path


def unavailable() -> str | None:
    """Why packages cannot be fetched on this machine, in a few words; None where they can."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not on PATH (not a Debian-like machine)" if missing else None


def unpacked(name: str) -> Package | None:
    """The package as an earlier `obtain` left it in the cache; None where there is none."""
    record = _folder(name) / "package.json"
    if not record.is_file():
        return None
    try:
        raw = json.loads(record.read_text(encoding="utf-8"))
        return Package(raw["name"], raw["version"], raw["sha256"], _folder(name) / "root")
    except (ValueError, KeyError, TypeError):
        return None


def obtain(name: str, *, say: Callable[[str], None] | None = None) -> Package:
    """Fetches and unpacks a package, or finds it in the cache.

    Args:
        name: The package, e.g. `dataset-fashion-mnist`.
        say: Is told before something is downloaded.

    Raises:
        DataError: There is no apt, the package is unknown to the machine's sources, the network or the disk fails, or
            the archive is not what the metadata promises.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"'{name}' is no name of a Debian package")
    found = unpacked(name)
    if found is not None:
        return found
    reason = unavailable()
    if reason is not None:
        raise DataError(f"cannot fetch the Debian package {name}: {reason}", hint="give the data's folder as data.root")
    place = cache.folder("debian")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place / ".lock", timeout=_TIMEOUT_S):
            return unpacked(name) or _fetch(name, place, say or (lambda text: None))
    except filelock.Timeout as error:
        raise DataError(f"another process has held {place}/.lock for {_TIMEOUT_S} s") from error
    except OSError as error:
        raise DataError(
            f"cannot fetch the Debian package {name} into {place}: {error}",
            hint="free some disk, or set LAYERFOLD_CACHE to a writable folder",
        ) from error


def _fetch(name: str, place: Path, say: Callable[[str], None]) -> Package:
    apt = _PrivateApt(place / "apt")
    listed = apt.locate(name)
    if listed is None:
        say("updating the package lists (apt, private folder)")
        trouble = apt.update()
        listed = apt.locate(name)
        if listed is None:
            raise DataError(
                f"the machine's apt sources have no package {name}" + (f" ({trouble})" if trouble else ""),
                hint="check the network and /etc/apt/sources.list*",
            )
    with tempfile.TemporaryDirectory(dir=place, prefix=".fetch-") as text:
        work = Path(text)
        say(f"downloading the Debian package {name} ({int(listed['size']) / 1e6:.0f} MB)")
        archive, listed = apt.download(name, listed, work)
        _unpack(archive, work / "new" / "root")
        package = Package(name, _version(listed["file"]), listed["sha256"], _folder(name) / "root")
        record = {key: value for key, value in asdict(package).items() if key != "root"}
        (work / "new" / "package.json").write_text(
            json.dumps({**record, "uri": listed["uri"]}, indent=1), encoding="utf-8"
        )
        shutil.rmtree(_folder(name), ignore_errors=True)
        (work / "new").rename(_folder(name))
    return package


class _PrivateApt:
    """apt with lists and archives of its own and the machine's sources."""

    def __init__(self, root: Path) -> None:
        for part in ("state/lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True, exist_ok=True)
        (root / "state/status").touch()
        options = {
            "Dir::State": root / "state",
            "Dir::State::status": root / "state/status",
            "Dir::Cache": root / "cache",
            # Root would drop to the user _apt, who may not write below a private folder.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
        }
        self._command = ["apt-get", "-q"] + [
            part for key, value in options.items() for part in ("-o", f"{key}={value}")
        ]

    def update(self) -> str:
        """Refreshes the lists; says what went wrong, which need not matter: one dead source does not spoil another."""
        done = self._run("update")
        return _last_error(done.stderr)

    def locate(self, name: str) -> dict[str, str] | None:
        """Address, file, size and sha256 of the newest version; None where the lists do not have it."""
        done = self._run("--print-uris", "download", name)
        match = _LINE.search(done.stdout) if done.returncode == 0 else None
        return match.groupdict() if match else None

    def download(self, name: str, listed: dict[str, str], work: Path) -> tuple[Path, dict[str, str]]:
        """Downloads and checks the archive; renews the lists once where they are out of date."""
        done = self._run("download", name, cwd=work)
        if done.returncode != 0:
            self.update()
            listed = self.locate(name) or listed
            done = self._run("download", name, cwd=work)
        if done.returncode != 0:
            raise DataError(
                f"apt cannot download {name}: {_last_error(done.stderr) or 'no reason given'}",
                hint="check the network and /etc/apt/sources.list*",
            )
        archives = list(work.glob("*.deb"))
        if len(archives) != 1:
            raise DataError(f"apt said it downloaded {name}, but left {len(archives)} archives")
        check(archives[0], int(listed["size"]), listed["sha256"])
        return archives[0], listed

    def _run(self, *arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                [*self._command, *arguments],
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"apt-get {arguments[0]} took longer than {_TIMEOUT_S} s", hint="check the network"
            ) from error


def check(archive: Path, size: int, sha256: str | None) -> None:
    """Compares an archive with what the package lists promise.

    Raises:
        DataError: Size or SHA-256 differ, or the lists have no SHA-256.
    """
    found = archive.stat().st_size
    if found != size:
        raise DataError(f"{archive.name} has {found} bytes, the package list says {size}", hint="try again")
    if sha256 is None:
        raise DataError(f"the package list has no SHA-256 for {archive.name}", hint="use a source that is not ancient")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise DataError(f"{archive.name} has sha256 {digest}, the package list says {sha256}", hint="try again")


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir(parents=True)
    done = subprocess.run(
        ["dpkg-deb", "-x", str(archive), str(target)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise DataError(
            f"dpkg-deb cannot unpack {archive.name}: {_last_error(done.stderr) or done.stderr.strip()}",
            hint="free some disk, or set LAYERFOLD_CACHE to a folder with more room",
        )


def _folder(name: str) -> Path:
    return cache.folder("debian", name)


def _version(file: str) -> str:
    return file.split("_")[1].replace("%3a", ":")


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.startswith(("E:", "W:", "dpkg-deb:"))]
    return lines[-1] if lines else ""
