"""The machine and the devices at hand: processor, memory, disk, GPU, adb, emulation."""

__all__ = ["probe"]

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from pipeline.data import cache
from pipeline.probes import Finding
from targets import emulated

_TIMEOUT_S = 15
_MIN_MEMORY_GB, _MIN_DISK_GB = 2.0, 2.0


def probe() -> list[Finding]:
    """Examines this machine and what is attached to it; asks each outside program for 15 seconds at most."""
    return [_python(), _processor(), _memory(), *_disks(), _gpu(), *_adb(), _emulated()]


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("machine", "Python", "ok", detail)
    return Finding("machine", "Python", "broken", f"{detail}, expected 3.11 or 3.12", "make a .venv with python3.11")


def _processor() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return Finding("machine", "processor", "ok", f"{platform.machine()}, {usable} cores usable{load}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available / 1e9 >= _MIN_MEMORY_GB:
        return Finding("machine", "memory", "ok", detail)
    return Finding(
        "machine", "memory", "warning", f"{detail}; conversion needs {_MIN_MEMORY_GB:.0f} GB", "end other programs"
    )


def _disks() -> list[Finding]:
    return [_disk("disk, working folder", Path.cwd()), _disk("disk, cache", cache.folder())]


def _disk(name: str, folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    detail = f"{free_gb:.1f} GB free at {folder}"
    hint = "set LAYERFOLD_CACHE to a folder that can be written" if "cache" in name else "give --out another folder"
    if not os.access(there, os.W_OK):
        return Finding("machine", name, "broken", f"{detail}, not writable", hint)
    if free_gb < _MIN_DISK_GB:
        return Finding(
            "machine", name, "warning", f"{detail}; a run needs {_MIN_DISK_GB:.0f} GB", f"free some, or {hint}"
        )
    return Finding("machine", name, "ok", detail)


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("machine", "GPU", "optional", "no NVIDIA driver found; everything runs on the CPU")
    code, out = _ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if code != 0:
        return Finding("machine", "GPU", "optional", f"nvidia-smi fails: {out}", "check the NVIDIA driver")
    return Finding("machine", "GPU", "ok", "; ".join(out.splitlines()))


def _adb() -> list[Finding]:
    from targets.adb import find_adb

    adb = find_adb()
    if adb is None:
        fix = "apt-get install adb, or Android's platform-tools"
        return [Finding("device", "adb", "optional", "not on PATH: no Android device can be reached", fix)]
    code, out = _ask(adb, "devices", "-l")
    if code != 0:
        return [Finding("device", "adb", "warning", f"`adb devices` fails: {out}", "adb kill-server, then try again")]
    rows = [line.split() for line in out.splitlines() if line.strip() and not line.startswith(("*", "List of"))]
    if not rows:
        return [Finding("device", "adb", "optional", "no device attached", "attach a phone with USB debugging on")]
    return [_adb_device(row) for row in rows]


def _adb_device(row: list[str]) -> Finding:
    serial, state, *rest = row
    model = next((word.removeprefix("model:") for word in rest if word.startswith("model:")), "")
    fixes = {
        "unauthorized": "unlock the device and allow USB debugging",
        "offline": "reattach the device, or adb reconnect",
    }
    if state == "device":
        return Finding("device", serial, "ok", f"ready {model}".strip())
    return Finding("device", serial, "warning", f"state '{state}'", fixes.get(state, "reattach the device"))


def _emulated() -> Finding:
    (device,) = emulated.devices()
    if device.state == "ready":
        return Finding("device", "emulated-arm64", "ok", device.fingerprint)
    return Finding("device", "emulated-arm64", "optional", device.state, "layerfold targets setup emulated-arm64")


def _ask(*command: str) -> tuple[int, str]:
    """Exit code and first answer of a program: its output, or its last line of trouble."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {_TIMEOUT_S} s"
    except OSError as error:
        return -1, str(error)
    if done.returncode == 0:
        return 0, done.stdout.strip()
    lines = (done.stderr or done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"exit code {done.returncode}"
