"""Builds the arm64 root that ``emulated-arm64`` runs: Debian's Python, the runtimes' real aarch64 wheels, and QEMU.

Nothing is installed on the machine and no root rights are needed: packages are unpacked, and QEMU is started with its
own loader. Every step leaves a mark, so that an interrupted build goes on where it was; apt and pip check what they
fetch, and a manifest keeps the SHA-256 of every package, wheel and of each file that is run.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from targets import debian_root
from targets.errors import SetupError
from targets.model_file import sha256_of

__all__ = ["EmulatedRoot", "find", "setup"]

OnStep = Callable[[float, str], None]
"""Called with the share of the work that is done, 0 to 1, and what comes next."""

_SUITE = "bookworm"
_GUEST_PACKAGES = ("libc6", "libgomp1", "libpython3.11-stdlib", "libstdc++6", "python3.11-minimal")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_DEFAULT_VERSIONS = {"ai-edge-litert": "2.3.0", "onnxruntime": "1.31.1", "numpy": "2.4.6"}
_PLUGIN_SOURCE = Path(__file__).parent / "qemu_plugin/count.c"
_PIP_TIMEOUT_S = 900.0
_COMPILER_TIMEOUT_S = 300.0
_DEB_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
_REVISION = 1

# What the runtimes read about the processor. It must agree with `-cpu cortex-a76`, or they choose instructions that the
# emulated processor does not have, and crash.
_CPU_FILES = {
    "proc/cpuinfo": (
        "processor\t: 0\nBogoMIPS\t: 100.00\n"
        "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
        "asimddp\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    ),
    "sys/devices/system/cpu/present": "0\n",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/online": "0\n",
    "sys/devices/system/cpu/kernel_max": "0\n",
    "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000414fd0b1\n",
    "sys/devices/system/cpu/cpu0/topology/physical_package_id": "0\n",
    "sys/devices/system/cpu/cpu0/topology/core_id": "0\n",
    "sys/devices/system/cpu/cpu0/topology/core_siblings": "1\n",
    "sys/devices/system/cpu/cpu0/topology/core_siblings_list": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
    "etc/layerfold-emulated": "cortex-a76\n",
}


@dataclass(frozen=True)
class EmulatedRoot:
    """A finished root.

    Attributes:
        folder: Where it is.
        versions: Version of each runtime in it.
        qemu: Version of QEMU's package.
    """

    folder: Path
    versions: Mapping[str, str]
    qemu: str

    @property
    def sysroot(self) -> Path:
        """The guest's root folder."""
        return self.folder / "sysroot"

    @property
    def site(self) -> Path:
        """The guest's Python packages."""
        return self.folder / "site"

    @property
    def plugin(self) -> Path:
        """The counting plugin."""
        return self.folder / "count.so"

    def command(self) -> list[str]:
        """Returns the command that starts QEMU for one guest program, with QEMU's own loader and libraries."""
        tools = self.folder / "qemu"
        libraries = next(iter(sorted(tools.glob("usr/lib/*-linux-gnu"))))
        loader = next(iter(sorted(tools.glob("lib*/ld-linux*"))), None) or next(tools.glob("lib/*/ld-linux*"))
        path = f"{libraries}:{tools / 'lib' / libraries.name}"
        return [str(loader), "--library-path", path, str(tools / "usr/bin/qemu-aarch64")]


def default_folder() -> Path:
    """Returns where the root is kept: in the user's cache, outside every checkout."""
    return platformdirs.user_cache_path("layerfold") / "emulated-arm64"


def find(folder: Path | None = None) -> EmulatedRoot:
    """Returns the finished root.

    Raises:
        SetupError: If it has not been built, or not by this version.
    """
    folder = folder or default_folder()
    hint = "run `layerfold targets setup emulated-arm64`"
    if not (folder / "manifest.json").exists():
        raise SetupError(f"the emulated arm64 root is not built in {folder}", hint=hint)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise SetupError(f"the manifest in {folder} is damaged, or of another version of layerfold", hint=hint)
    if manifest["revision"] != _REVISION or manifest["plugin_source"] != sha256_of(_PLUGIN_SOURCE):
        raise SetupError(f"the emulated arm64 root in {folder} is of another version of layerfold", hint=hint)
    return EmulatedRoot(folder, manifest["versions"], manifest["qemu"])


def setup(progress: OnStep | None = None, *, folder: Path | None = None) -> EmulatedRoot:
    """Builds the root, or finishes or repairs one that is there; about 300 MB, minutes the first time.

    Args:
        progress: Called before each step and at the end.
        folder: Where to build; the user's cache if `None`.

    Raises:
        SetupError: If a step fails; the next call goes on from there.
    """
    folder = (folder or default_folder()).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _build(folder, progress or (lambda share, what: None))
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{error.cmd[0]} took over {error.timeout:.0f} s", hint="try again: it resumes") from error
    except OSError as error:
        hint = "see that there are 700 MB of room and the right to write there"
        raise SetupError(f"cannot build in {folder}: {error.strerror or error}", hint=hint) from error
    return find(folder)


def _build(folder: Path, progress: OnStep) -> None:
    # The last figure is the share of the time that a step takes when nothing is there yet.
    steps: list[tuple[str, str, Callable[[Path], None], float]] = [
        ("guest", "fetch and unpack Debian's Python for arm64", _guest, 0.30),
        ("qemu", "fetch and unpack QEMU", _qemu, 0.30),
        ("wheels", "fetch and unpack the runtimes' aarch64 wheels", _wheels, 0.35),
        ("processor", "describe the processor", _processor, 0.01),
        ("plugin", "compile the counting plugin", _plugin, 0.04),
    ]
    lock = FileLock(folder / "setup.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(0.0, "wait for another setup that is at work")
        lock.acquire()
    try:
        done = folder / "done"
        done.mkdir(exist_ok=True)
        _drop_damaged(folder, done)
        share = 0.0
        for name, what, build, part in steps:
            mark = done / f"{name}-{_REVISION}"
            if name == "plugin":
                mark = done / f"{name}-{sha256_of(_PLUGIN_SOURCE)[:16]}"
            if not mark.exists():
                progress(share, what)
                build(folder)
                mark.touch()
            share += part
        _write_manifest(folder)
        progress(1.0, "done")
    finally:
        lock.release()


def _guest(folder: Path) -> None:
    packages = debian_root.fetch(_GUEST_PACKAGES, folder / "apt-guest", suite=_SUITE, arch="arm64")
    _unpack_afresh(packages, folder / "sysroot")
    _note(folder, "guest", {package.path.name: package.sha256 for package in packages})
    shutil.rmtree(folder / "apt-guest")


def _qemu(folder: Path) -> None:
    arch = _DEB_ARCH.get(os.uname().machine)
    if arch is None:
        raise SetupError(f"Debian has no QEMU for {os.uname().machine}", hint="use an x86-64 or arm64 machine")
    # Bookworm's QEMU loads plugins for user programs; that of the release after it does not.
    packages = debian_root.fetch(["qemu-user"], folder / "apt-qemu", suite=_SUITE, arch=arch)
    _unpack_afresh(packages, folder / "qemu")
    for other in (folder / "qemu/usr/bin").glob("qemu-*"):
        if other.name != "qemu-aarch64":
            other.unlink()
    _note(folder, "qemu", {package.path.name: package.sha256 for package in packages})
    shutil.rmtree(folder / "apt-qemu")


def _unpack_afresh(packages: list[debian_root.Package], root: Path) -> None:
    # A folder that an interrupted step left half full must not be mistaken for a whole one.
    shutil.rmtree(root, ignore_errors=True)
    debian_root.unpack(packages, root)


def _versions() -> dict[str, str]:
    """Takes the versions of this machine's runtimes, so that host and guest run the same code."""
    found = {}
    for name, fallback in _DEFAULT_VERSIONS.items():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = fallback
    return found


def _wheels(folder: Path) -> None:
    wheels, site = folder / "wheels", folder / "site"
    wanted = [f"{name}=={version}" for name, version in _versions().items()]
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    common = ["--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:", *platforms]
    _pip(["download", "--dest", str(wheels), *common, *wanted])
    shutil.rmtree(site, ignore_errors=True)
    offline = ["--no-index", "--find-links", str(wheels), "--no-compile"]
    _pip(["install", "--target", str(site), *offline, *common, *wanted])
    _note(folder, "wheels", {path.name: sha256_of(path) for path in sorted(wheels.glob("*.whl"))})
    shutil.rmtree(wheels)


def _pip(arguments: list[str]) -> None:
    argv = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", timeout=_PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"pip {arguments[0]} took over {_PIP_TIMEOUT_S:.0f} s", hint="try again") from error
    if done.returncode != 0:
        raise SetupError(f"pip {arguments[0]} failed: {done.stderr.strip()[-400:]}", hint="is pip in this environment?")


def _processor(folder: Path) -> None:
    for name, text in _CPU_FILES.items():
        path = folder / "sysroot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


def _plugin(folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SetupError("no C compiler is on this machine", hint="install gcc")
    made = folder / "count.so.part"
    argv = [compiler, "-std=c11", "-O2", "-fPIC", "-shared", "-o", str(made), str(_PLUGIN_SOURCE)]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", timeout=_COMPILER_TIMEOUT_S)
    if done.returncode != 0:
        raise SetupError(f"{Path(compiler).name} cannot compile {_PLUGIN_SOURCE.name}: {done.stderr[-400:]}")
    made.replace(folder / "count.so")


def _note(folder: Path, step: str, hashes: Mapping[str, str]) -> None:
    (folder / f"{step}.sha256.json").write_text(json.dumps(dict(hashes), indent=1), encoding="utf-8")


def _run_files(folder: Path) -> list[Path]:
    """Lists every file that a run may read: programs, libraries, and all of the guest's Python."""
    found = [folder / "count.so", folder / "qemu/usr/bin/qemu-aarch64"]
    found += list((folder / "qemu").rglob("*.so*"))
    for part in ("sysroot", "site"):
        # What Python compiles for itself comes and goes.
        found += [path for path in (folder / part).rglob("*") if path.suffix != ".pyc"]
    return sorted({path for path in found if path.is_file() and not path.is_symlink()})


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest; `None` if it is missing or not what this version's `_write_manifest` writes."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shape = {"revision": int, "plugin_source": str, "qemu": str, "versions": dict, "files": dict}
    whole = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in shape.items())
    return found if whole else None


def _write_manifest(folder: Path) -> None:
    packages = {
        step: json.loads((folder / f"{step}.sha256.json").read_text(encoding="utf-8"))
        for step in ("guest", "qemu", "wheels")
    }
    qemu = next(name for name in packages["qemu"] if name.startswith("qemu-user_"))
    manifest = {
        "revision": _REVISION,
        "plugin_source": sha256_of(_PLUGIN_SOURCE),
        "qemu": qemu.split("_")[1].replace("%3a", ":"),
        "versions": _versions(),
        "packages": packages,
        "files": {str(path.relative_to(folder)): sha256_of(path) for path in _run_files(folder)},
    }
    part = folder / "manifest.json.part"
    part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    part.replace(folder / "manifest.json")


def _drop_damaged(folder: Path, done: Path) -> None:
    """Takes back the marks of steps whose files are no longer what the manifest says, so that they are built again.

    The manifest goes last: interrupted before that, the next call finds out the same again.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return
    known = _read_manifest(folder)
    steps = {"sysroot": ("guest", "processor"), "qemu": ("qemu",), "site": ("wheels",), "count.so": ("plugin",)}
    if known is None:
        # Nothing can be trusted that cannot be checked.
        damaged = set(steps)
    else:
        damaged = {Path(name).parts[0] for name, value in known["files"].items() if not _is_whole(folder / name, value)}
        if known["versions"] != _versions():
            damaged.add("site")
    for top in damaged:
        for step in steps.get(top, ()):
            for mark in done.glob(f"{step}-*"):
                mark.unlink()
    manifest.unlink()


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256
