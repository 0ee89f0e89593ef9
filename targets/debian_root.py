"""Unpacks Debian packages of any release and architecture into a folder, without touching the machine's own.

apt does the work (resolving, fetching, checking signatures and hashes) with private lists, state and cache, so that it
needs no root rights and installs nothing. The archive's address is the one that the machine's own apt is set up with.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from targets.errors import SetupError
from targets.model_file import sha256_of

__all__ = ["Package", "fetch", "unpack"]

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TIMEOUT_S = 900.0
_LOCAL_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Package:
    """One fetched package file.

    Attributes:
        name: Package name.
        version: Its version.
        path: The .deb file.
        sha256: SHA-256 of the file, in hex.
    """

    name: str
    version: str
    path: Path
    sha256: str


def fetch(
    packages: Sequence[str], folder: Path, *, suite: str, arch: str, exclude: Sequence[str] = ()
) -> list[Package]:
    """Downloads packages and what they depend on; a file that is already there is not fetched again.

    Args:
        packages: Package names.
        folder: Private apt root, made if missing; the files end up in ``cache/archives``.
        suite: Debian release, such as ``trixie``.
        arch: Debian's name of the architecture, such as ``arm64``.
        exclude: Packages that must not come along, as prefixes of their names.

    Raises:
        SetupError: If apt is missing, refuses, or takes too long.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(f"{tool} is not on this machine", hint="run this on a Debian machine")
    for name in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d", "etc/trusted.gpg.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state/status").touch()
    sources = folder / "etc/sources.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {_archive()} {suite} main\n")
    config = folder / "etc/apt.conf"
    config.write_text(_config(folder.resolve(), arch))
    # A configuration of our own must be read instead of the machine's, whose hooks belong to the machine.
    env = {**os.environ, "APT_CONFIG": str(config), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    _apt(["apt-get", "update"], env)
    refused = [f"{name}-" for name in exclude]
    _apt(["apt-get", "install", "--download-only", "--yes", "--no-install-recommends", *packages, *refused], env)
    found = []
    for path in sorted((folder / "cache/archives").glob("*.deb")):
        name, version, _ = path.stem.split("_")
        found.append(Package(name, version, path, sha256_of(path)))
    missing = set(packages) - {package.name for package in found}
    if missing:
        raise SetupError(f"apt said yes but did not fetch {sorted(missing)}", hint=f"delete {folder} and try again")
    return found


def unpack(packages: Sequence[Package], root: Path) -> None:
    """Unpacks package files into `root`, running none of their scripts.

    Raises:
        SetupError: If a file is damaged.
    """
    root.mkdir(parents=True, exist_ok=True)
    for package in packages:
        argv = ["dpkg-deb", "-x", str(package.path), str(root)]
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", timeout=_LOCAL_TIMEOUT_S)
        if done.returncode != 0:
            raise SetupError(f"cannot unpack {package.path.name}: {done.stderr.strip()}", hint="delete that file")


def _archive() -> str:
    """Finds where this machine gets Debian's main archive from."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, encoding="utf-8", errors="replace", timeout=_LOCAL_TIMEOUT_S,
    )  # fmt: skip
    for line in listing.stdout.splitlines():
        origin, _, rest = line.partition("|")
        label, _, uri = rest.partition("|")
        if origin == label == "Debian":
            return uri
    raise SetupError(
        "apt on this machine knows no Debian archive",
        hint="run it on Debian itself, after `apt-get update`: its children, such as Ubuntu, have other archives",
    )


def _config(folder: Path, arch: str) -> str:
    values: Mapping[str, str] = {
        "Dir": str(folder),
        "Dir::State": str(folder / "state"),
        "Dir::State::status": str(folder / "state/status"),
        "Dir::Cache": str(folder / "cache"),
        "Dir::Etc": str(folder / "etc"),
        "Dir::Etc::sourcelist": str(folder / "etc/sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::main": "-",
        "Dir::Etc::parts": "-",
        "Dir::Bin::methods": "/usr/lib/apt/methods",
        "Dir::Log": str(folder / "log"),
        "APT::Architecture": arch,
        "APT::Get::List-Cleanup": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        # Else a machine without a network is told that it has no such package.
        "APT::Update::Error-Mode": "any",
        "Debug::NoLocking": "true",
    }
    lines = [f'{key} "{value}";' for key, value in values.items()]
    return "\n".join(["#clear APT::Architectures;", f'APT::Architectures {{ "{arch}"; }};', *lines, ""])


def _apt(argv: Sequence[str], env: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            argv, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{' '.join(argv[:2])} took over {_TIMEOUT_S:.0f} s", hint="try again: it resumes") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        raise SetupError(f"{' '.join(argv[:2])} failed: {' '.join(complaints) or done.stderr[-400:]}")
