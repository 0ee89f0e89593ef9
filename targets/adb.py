"""The Android Debug Bridge, as a `targets.remote.Remote`: argument vectors in, typed errors out, a limit on all."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from targets.base import DeviceKind
from targets.errors import (
    DeviceAmbiguousError,
    DeviceError,
    DeviceFullError,
    DeviceLostError,
    DeviceNotFoundError,
    RuntimeMissingError,
    TimeoutExpiredError,
    TransferError,
)
from targets.remote import NO_ROOM, Reply, quoted, sentinel_command, split_at_sentinel

__all__ = ["HINTS", "AdbRemote", "Attached", "attached", "choose", "find_adb"]

STORAGE = "/data/local/tmp"
_QUERY_TIMEOUT_S = 15.0
_ALIVE_TIMEOUT_S = 5.0
# What adb says when the device, not the command, is the trouble.
_GONE = re.compile(
    r"device (?:'[^']*' )?(?:not found|offline|still connecting)|no devices/emulators found|error: closed|"
    r"protocol fault|connect failed|connection reset|failed to read command|EOF"
)
# What to do about a device in a state that `adb devices` names.
HINTS = {
    "unauthorized": "unlock the device and accept this computer's key",
    "offline": "unplug the device and plug it in again, or run `adb reconnect`",
    "no permissions": "the user may not open the USB device: add a udev rule, or join the group plugdev",
}


@dataclass(frozen=True)
class Attached:
    """One line of ``adb devices -l``: serial, state (``device`` when usable) and model name if it says one."""

    serial: str
    state: str
    model: str


def find_adb() -> str | None:
    """The adb that is used: ``LAYERFOLD_ADB``, else the one on PATH, if any."""
    return os.environ.get("LAYERFOLD_ADB") or shutil.which("adb")


def _adb_program() -> str:
    program = find_adb()
    if not program:
        raise RuntimeMissingError("adb is not on this machine", hint="install Android's platform tools (Debian: adb)")
    return program


def _run(arguments: Sequence[str], *, timeout_s: float, what: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [_adb_program(), *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutExpiredError(
            f"{what} took over {timeout_s:.0f} s", hint="see whether the device is awake and answers `adb shell true`"
        ) from error
    except OSError as error:
        raise RuntimeMissingError(f"adb cannot be started: {error}", hint="check LAYERFOLD_ADB") from error


def attached() -> list[Attached]:
    """Lists what adb sees.

    Raises:
        RuntimeMissingError: If adb is missing.
        DeviceError: If adb fails.
        TimeoutExpiredError: If adb's server does not answer.
    """
    done = _run(["devices", "-l"], timeout_s=_QUERY_TIMEOUT_S, what="listing the devices")
    if done.returncode != 0:
        raise DeviceError(f"adb devices failed: {done.stderr.decode(errors='replace').strip()}")
    found = []
    for line in done.stdout.decode(errors="replace").splitlines()[1:]:
        words = line.split()
        if len(words) >= 2:
            model = next((word.partition(":")[2] for word in words if word.startswith("model:")), "")
            state = "no permissions" if words[1:3] == ["no", "permissions"] else words[1]
            found.append(Attached(words[0], state, model))
    return found


def choose(serial: str | None) -> str:
    """Returns the serial to use: the one asked for, or the only one there.

    Raises:
        DeviceNotFoundError: If it, or any, is not attached.
        DeviceAmbiguousError: If none was named and several are attached.
        DeviceError: If it is attached but cannot be used.
    """
    found = {item.serial: item for item in attached()}
    usable = [item.serial for item in found.values() if item.state == "device"]
    if serial is None:
        if len(usable) > 1:
            raise DeviceAmbiguousError(
                f"{len(usable)} devices are attached: {', '.join(usable)}", hint=f"name one: android:{usable[0]}"
            )
        if usable:
            return usable[0]
        if not found:
            raise DeviceNotFoundError("no device is attached", hint="plug one in, and enable USB debugging on it")
        serial = next(iter(found))
    if serial not in found:
        known = ", ".join(found) or "none"
        raise DeviceNotFoundError(f"no device has serial {serial!r}; attached: {known}", hint="run `layerfold devices`")
    state = found[serial].state
    if state != "device":
        raise DeviceError(f"device {serial} is {state}", hint=HINTS.get(state, "see `adb devices -l`"))
    return serial


class AdbRemote:
    """One device behind adb.

    Args:
        serial: Its serial, as `choose` returned it.
        storage: Folder on it for files.
    """

    def __init__(self, serial: str, *, storage: str = STORAGE) -> None:
        self.id = serial
        self.kind: DeviceKind = "adb"
        self.storage = storage.rstrip("/") or "/"

    def shell(self, argv: Sequence[str], *, timeout_s: float) -> Reply:
        """Runs one command; see `targets.remote.Remote.shell`."""
        line, nonce = sentinel_command(argv)
        done = self._adb(["shell", "-T", line], timeout_s=timeout_s, what=f"{argv[0]} on {self.id}")
        stdout, stderr = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        return split_at_sentinel(stdout, stderr, nonce, self.id)

    def push(self, local: Path, remote: str, *, timeout_s: float) -> None:
        """Sends a file; see `targets.remote.Remote.push`."""
        self._transfer(["push", str(local.resolve()), remote], timeout_s=timeout_s, what=f"sending {local.name}")

    def pull(self, remote: str, local: Path, *, timeout_s: float) -> None:
        """Fetches a file; see `targets.remote.Remote.pull`."""
        self._transfer(["pull", remote, str(local.resolve())], timeout_s=timeout_s, what=f"fetching {local.name}")

    def stream(self, argv: Sequence[str]) -> list[str]:
        """Returns the local command for `argv`; see `targets.remote.Remote.stream`."""
        return [_adb_program(), "-s", self.id, "shell", "-T", f"exec {quoted(argv)}"]

    def is_alive(self) -> bool:
        """Says whether the device still answers a command."""
        try:
            return self.shell(["true"], timeout_s=_ALIVE_TIMEOUT_S).code == 0
        except (DeviceError, TimeoutExpiredError):
            return False

    def _adb(self, arguments: Sequence[str], *, timeout_s: float, what: str) -> subprocess.CompletedProcess[bytes]:
        return _run(["-s", self.id, *arguments], timeout_s=timeout_s, what=what)

    def _transfer(self, arguments: Sequence[str], *, timeout_s: float, what: str) -> None:
        done = self._adb(arguments, timeout_s=timeout_s, what=f"{what} ({self.id})")
        if done.returncode == 0:
            return
        says = (done.stderr + done.stdout).decode(errors="replace").strip()[-300:]
        if NO_ROOM.search(says):
            raise DeviceFullError(f"{self.id} has no room: {what}: {says}", hint=f"free some of {self.storage}")
        if _GONE.search(says) and not self.is_alive():
            raise DeviceLostError(f"{self.id} went away while {what}: {says}", hint="check the cable")
        raise TransferError(f"{what} failed on {self.id}: {says}")
