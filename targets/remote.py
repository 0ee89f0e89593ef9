"""What a device behind a wire can do, and a folder on it that is always cleaned up.

`adb` and `ssh` are two kinds of `Remote`; everything above this module is the same for both.
"""

import hashlib
import os
import re
import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from targets.base import DeviceKind
from targets.errors import DeviceError, DeviceFullError, DeviceLostError, TargetError, TransferError
from targets.locks import lock_folder
from targets.model_file import sha256_of

__all__ = [
    "NO_ROOM",
    "Remote",
    "Reply",
    "Workspace",
    "quoted",
    "sentinel_command",
    "split_at_sentinel",
    "workspace",
]

PREFIX = "layerfold"
NO_ROOM = re.compile(r"no space left on device|quota exceeded", re.IGNORECASE)
_CLEANUP_TIMEOUT_S = 8.0
_PUSH_ATTEMPTS = 2
# Removes the folders whose path begins with $1, and first ends what still runs from a program in one: a tool outlives
# the adb or ssh that was waiting for it.
_SWEEP = """
ls -l /proc/[0-9]*/exe 2>/dev/null | while read -r line; do
  case "$line" in *" -> $1"*) pid=${line##*/proc/}; kill -9 "${pid%%/exe*}" 2>/dev/null;; esac
done
for d in "$1"*; do
  case "$d" in "$1"*/*) ;; *) rm -rf "$d" || exit 1;; esac
done
"""


@dataclass(frozen=True)
class Reply:
    """What a command on the device answered: decoded output and its exit status."""

    stdout: str
    stderr: str
    code: int


class Remote(Protocol):
    """A device that commands can be run on and files be sent to.

    Attributes:
        id: Serial or address; names the device in messages and locks.
        kind: Kind of the device.
        storage: Folder on the device where a folder of our own can be made.
    """

    id: str
    kind: DeviceKind
    storage: str

    def shell(self, argv: Sequence[str], *, timeout_s: float) -> Reply:
        """Runs one command; raises `DeviceLostError` if its end was not seen, `TimeoutExpiredError` if too slow."""
        ...

    def push(self, local: Path, remote: str, *, timeout_s: float) -> None:
        """Sends a file; raises `DeviceFullError`, `DeviceLostError` or `TransferError`."""
        ...

    def pull(self, remote: str, local: Path, *, timeout_s: float) -> None:
        """Fetches a file; raises `DeviceLostError` or `TransferError`."""
        ...

    def stream(self, argv: Sequence[str]) -> list[str]:
        """Returns the local command that runs `argv` there with standard input and output passed through."""
        ...

    def is_alive(self) -> bool:
        """Says whether the device still answers, within a few seconds."""
        ...


def quoted(argv: Sequence[str]) -> str:
    """Turns an argument vector into the one line that a remote shell takes apart again, every word quoted."""
    return " ".join(shlex.quote(word) for word in argv)


def sentinel_command(argv: Sequence[str]) -> tuple[str, str]:
    """Returns the line that runs `argv` and then says so with its status, and the word that it will say.

    A device that dies in the middle of a command can look like one that ended well, with its output cut.
    """
    nonce = f"end-{uuid.uuid4().hex}"
    return f"{quoted(argv)} </dev/null; code=$?; echo; echo {nonce} $code", nonce


def split_at_sentinel(stdout: str, stderr: str, nonce: str, device: str) -> Reply:
    """Takes the end mark off the output.

    Raises:
        DeviceLostError: If the mark is missing or cut.
    """
    found = re.search(rf"\n{nonce} (\d+)\r?\n\Z", stdout)
    if not found:
        tail = (stderr or stdout).strip()[-200:]
        raise DeviceLostError(f"{device} went away in the middle of a command: {tail or 'no output'}")
    return Reply(stdout[: found.start()], stderr, int(found[1]))


def owner_tag(device: str) -> str:
    """Names this machine's user on a device, so that left-over folders are recognised and others' are left alone.

    A device under another address has another tag, since the lock that guards the folders is by address too; and so
    has a run that keeps its locks elsewhere, as it would not be kept from running at the same time.
    """
    identity = f"{os.uname().nodename}/{os.getuid()}/{device}/{lock_folder()}"
    machine_id = Path("/etc/machine-id")
    if machine_id.exists():
        identity += machine_id.read_text(encoding="ascii", errors="replace")
    return f"{PREFIX}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


class Workspace:
    """A folder on a device; made by `workspace`."""

    def __init__(self, remote: Remote, folder: str, *, push_timeout_s: float, shell_timeout_s: float) -> None:
        self.remote = remote
        self.folder = folder
        self.push_timeout_s = push_timeout_s
        self.shell_timeout_s = shell_timeout_s
        self.left_behind = ""

    def put(self, local: Path, name: str, *, executable: bool = False) -> str:
        """Sends a file under `name`, checks what arrived, and returns its path on the device.

        Raises:
            TransferError: If what arrived differs, also at the second try.
            DeviceFullError: If there is no room.
            DeviceLostError: If the device went away.
        """
        path = f"{self.folder}/{name}"
        wanted = sha256_of(local)
        for attempt in range(1, _PUSH_ATTEMPTS + 1):
            try:
                self.remote.push(local, path, timeout_s=self.push_timeout_s)
                found = self._sha256(path)
                if found != wanted:
                    raise TransferError(f"{name} arrived on {self.remote.id} with SHA-256 {found}, sent {wanted}")
                break
            except TransferError:
                # Sending a file again does no harm, so a cut transfer gets one more try.
                if attempt == _PUSH_ATTEMPTS or not self.remote.is_alive():
                    raise
        if executable:
            self.check(["chmod", "700", path])
        return path

    def check(self, argv: Sequence[str], *, timeout_s: float | None = None) -> Reply:
        """Runs a command that must succeed.

        Raises:
            DeviceFullError: If there is no room for what it makes.
            DeviceError: If it does not.
        """
        reply = self.remote.shell(argv, timeout_s=timeout_s or self.shell_timeout_s)
        if reply.code != 0:
            says = (reply.stderr or reply.stdout).strip()[-300:]
            if NO_ROOM.search(says):
                hint = f"free some of {self.remote.storage}"
                raise DeviceFullError(f"{self.remote.id} has no room: {argv[0]}: {says}", hint=hint)
            raise DeviceError(f"{argv[0]} failed on {self.remote.id} with status {reply.code}: {says}")
        return reply

    def _sha256(self, path: str) -> str:
        for tool in (["sha256sum"], ["toybox", "sha256sum"]):
            reply = self.remote.shell([*tool, path], timeout_s=self.push_timeout_s)
            if found := re.match(r"\\?([0-9a-f]{64})\s", reply.stdout):
                return found[1]
        raise TransferError(f"{self.remote.id} cannot say the SHA-256 of {path}: {reply.stderr.strip()[-200:]}")


@contextmanager
def workspace(remote: Remote, *, push_timeout_s: float = 300.0, shell_timeout_s: float = 30.0) -> Iterator[Workspace]:
    """Makes a folder on the device and removes it in the end, whatever happens; call it with the device locked.

    Where that fails after all went well, `Workspace.left_behind` says so.

    Folders that an earlier run of this user could not remove (the device was gone, or this machine) go first.

    Raises:
        DeviceFullError: If there is no room for the folder.
        DeviceError: If the folder cannot be made.
    """
    tag = owner_tag(remote.id)
    space = Workspace(
        remote, f"{remote.storage}/{tag}-{uuid.uuid4().hex[:12]}",
        push_timeout_s=push_timeout_s, shell_timeout_s=shell_timeout_s,
    )  # fmt: skip
    _sweep(space, f"{remote.storage}/{tag}-")
    space.check(["mkdir", "-m", "700", space.folder])
    try:
        yield space
    except BaseException as error:
        try:
            _remove(space)
        except TargetError as left:
            # The first error is the one to report; the next run on the device sweeps the folder.
            error.add_note(f"{space.folder} is left on {remote.id} until the next run there: {left.what}")
        raise
    else:
        try:
            _remove(space)
        except TargetError as left:
            # The work is done and must not be lost over this; the caller says it, and the next run sweeps.
            space.left_behind = f"{space.folder} is left on {remote.id} until the next run there: {left.what}"


def _remove(space: Workspace) -> None:
    _sweep(space, space.folder, timeout_s=_CLEANUP_TIMEOUT_S)


def _sweep(space: Workspace, prefix: str, *, timeout_s: float | None = None) -> None:
    space.check(["sh", "-c", _SWEEP, "sh", prefix], timeout_s=timeout_s)
