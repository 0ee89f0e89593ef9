"""Fetches Debian's adbd, for this machine or inside a whole emulated ARM root, into the user's cache.

Only `tools/adb_device.py` starts it, in namespaces of its own: adbd is a root shell that asks nobody for a password.
"""

import os
import shutil
from pathlib import Path

import platformdirs
from filelock import FileLock

from targets import debian_root, emulated_setup
from targets.errors import SetupError

__all__ = ["command", "emulated", "host"]

_DEB_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


def host() -> Path:
    """Fetches and unpacks adbd for this machine once; returns the folder that holds it."""
    cache = platformdirs.user_cache_path("layerfold") / "adb-device"
    root, made = cache / "root", cache / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "setup.lock"):
        if not made.exists():
            arch = _DEB_ARCH.get(os.uname().machine)
            if arch is None:
                raise SetupError(f"Debian has no adbd for {os.uname().machine}", hint="use an x86-64 or arm64 machine")
            packages = debian_root.fetch(["adbd"], cache / "apt", suite="trixie", arch=arch)
            debian_root.unpack(packages, root)
            shutil.rmtree(cache / "apt")
            made.touch()
    return root


def command(root: Path) -> list[str]:
    """Returns the command that starts adbd with its own loader and libraries, not the machine's."""
    libraries = next(root.glob("usr/lib/*-linux-gnu"))
    loader = next(libraries.glob("ld-linux*"))
    path = f"{libraries / 'android'}:{libraries}"
    return [str(loader), "--library-path", path, str(root / "usr/lib/android-sdk/platform-tools/adbd")]


def emulated(progress: emulated_setup.OnStep | None = None) -> tuple[Path, Path]:
    """Builds the emulated device's root once: shell and tools, Python with the runtimes, adbd; returns it and QEMU."""
    cache = platformdirs.user_cache_path("layerfold") / "adb-device-arm64"
    root, made = cache / "root", cache / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "setup.lock"):
        if not made.exists():
            _build_emulated(cache, root, emulated_setup.setup(progress))
            made.touch()
    return root, cache / "qemu/usr/bin/qemu-aarch64-static"


def _build_emulated(cache: Path, root: Path, base: emulated_setup.EmulatedRoot) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base.sysroot, root, symlinks=True)
    shutil.copytree(base.site, root / "opt/site", symlinks=True)
    tools = debian_root.fetch(["dash", "coreutils"], cache / "apt", suite="bookworm", arch="arm64")
    debian_root.unpack(tools, root)
    if not (root / "bin/sh").is_symlink():
        (root / "bin/sh").symlink_to("dash")
    adbd = debian_root.fetch(["adbd"], cache / "apt-adbd", suite="trixie", arch="arm64")
    debian_root.unpack(adbd, root / "opt/adbd")
    # A dynamic QEMU could not start inside the device's root; the static one is opened before.
    host = _DEB_ARCH.get(os.uname().machine, "amd64")
    debian_root.unpack(
        debian_root.fetch(["qemu-user-static"], cache / "apt-qemu", suite="bookworm", arch=host), cache / "qemu"
    )
    python = root / "usr/local/bin/python3"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\nPYTHONPATH=/opt/site exec /usr/bin/python3.11 -B "$@"\n')
    python.chmod(0o755)
    for name in ("apt", "apt-adbd", "apt-qemu"):
        shutil.rmtree(cache / name)
