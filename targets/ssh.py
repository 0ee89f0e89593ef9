"""Target ``ssh``: a Linux board (Raspberry Pi and the like) behind OpenSSH. Named ``ssh:user@board``.

The user's own OpenSSH does the connecting, with its configuration, keys and known hosts; it is never asked to guess a
password or to accept an unknown host.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from targets import options as options_
from targets.base import Device, DeviceKind, Measurement, OnProgress
from targets.errors import (
    DeviceError,
    DeviceFullError,
    DeviceLostError,
    DeviceNotFoundError,
    OptionError,
    RuntimeMissingError,
    TimeoutExpiredError,
    TransferError,
)
from targets.remote import NO_ROOM, Reply, quoted, sentinel_command, split_at_sentinel
from targets.remote_benchmark import RemoteSettings, ask, benchmark, describe
from targets.runners import PythonRunner

__all__ = ["SshRemote", "SshTarget"]

_ALIVE_TIMEOUT_S = 8.0
_FAILED = 255
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=6",
    # A board that loses power is noticed after three silent intervals, not after the TCP timeout of minutes.
    "ServerAliveInterval=3",
    "ServerAliveCountMax=3",
    # A master that stays in the background would keep our pipes open, and we would wait for it.
    "ControlMaster=no",
)
_HOST = re.compile(r"[A-Za-z0-9_.@:\[\]%-]+")
_UNREACHABLE = re.compile(r"could not resolve|connection refused|no route|timed out|permission denied|host key", re.I)


class SshRemote:
    """One board behind OpenSSH.

    Args:
        address: What ``ssh`` takes: ``board``, ``user@board``, or a name of the user's configuration.
        storage: Folder on the board for files.
        options: Further options of ``ssh`` and ``scp``, as a vector, such as ``["-F", "config"]``.

    Raises:
        OptionError: If the address could be taken for an option or a command.
    """

    def __init__(self, address: str, *, storage: str = "/tmp", options: Sequence[str] = ()) -> None:
        if not _HOST.fullmatch(address) or address.startswith("-"):
            raise OptionError(f"{address!r} is no address of a board", hint="write ssh:user@board")
        self.id = address
        self.kind: DeviceKind = "ssh"
        self.storage = storage.rstrip("/") or "/"
        self._options = [*options, *[word for option in _OPTIONS for word in ("-o", option)]]

    def shell(self, argv: Sequence[str], *, timeout_s: float) -> Reply:
        """Runs one command; see `targets.remote.Remote.shell`."""
        line, nonce = sentinel_command(argv)
        done = self._run([_program("ssh"), "-T", *self._options, "--", self.id, line], timeout_s, f"{argv[0]}")
        stdout, stderr = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        if done.returncode == _FAILED and nonce not in stdout:
            self._raise_unreachable(stderr)
        return split_at_sentinel(stdout, stderr, nonce, self.id)

    def push(self, local: Path, remote: str, *, timeout_s: float) -> None:
        """Sends a file; see `targets.remote.Remote.push`."""
        self._copy(str(local.resolve()), f"{self.id}:{remote}", timeout_s, f"sending {local.name}")

    def pull(self, remote: str, local: Path, *, timeout_s: float) -> None:
        """Fetches a file; see `targets.remote.Remote.pull`."""
        self._copy(f"{self.id}:{remote}", str(local.resolve()), timeout_s, f"fetching {local.name}")

    def stream(self, argv: Sequence[str]) -> list[str]:
        """Returns the local command for `argv`; see `targets.remote.Remote.stream`."""
        return [_program("ssh"), "-T", *self._options, "--", self.id, f"exec {quoted(argv)}"]

    def is_alive(self) -> bool:
        """Says whether the board still answers a command."""
        try:
            return self.shell(["true"], timeout_s=_ALIVE_TIMEOUT_S).code == 0
        except (DeviceError, TimeoutExpiredError):
            return False

    def _copy(self, source: str, place: str, timeout_s: float, what: str) -> None:
        done = self._run([_program("scp"), "-q", *self._options, "--", source, place], timeout_s, what)
        if done.returncode == 0:
            return
        says = done.stderr.decode(errors="replace").strip()[-300:]
        # OpenSSH's sftp knows no "disk full": a write to a full disk comes back as a bare "Failure".
        if NO_ROOM.search(says) or self._is_full():
            raise DeviceFullError(f"{self.id} has no room: {what}: {says}", hint=f"free some of {self.storage}")
        if not self.is_alive():
            raise DeviceLostError(f"{self.id} went away while {what}: {says}", hint="check power and network")
        raise TransferError(f"{what} failed on {self.id}: {says}")

    def _is_full(self) -> bool:
        try:
            reply = self.shell(["df", "-P", self.storage], timeout_s=_ALIVE_TIMEOUT_S)
        except (DeviceError, TimeoutExpiredError):
            return False
        words = reply.stdout.strip().splitlines()[-1].split() if reply.code == 0 else []
        return len(words) >= 4 and words[3].isdigit() and int(words[3]) < 64

    def _run(self, argv: Sequence[str], timeout_s: float, what: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(list(argv), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutExpiredError(f"{what} on {self.id} took over {timeout_s:.0f} s") from error

    def _raise_unreachable(self, says: str) -> None:
        tail = says.strip()[-300:]
        if _UNREACHABLE.search(says):
            hint = f"make `ssh {self.id} true` work without a question first"
            raise DeviceNotFoundError(f"cannot reach {self.id}: {tail}", hint=hint)
        raise DeviceLostError(f"{self.id} went away in the middle of a command: {tail}")


class SshTarget:
    """Runs models with Python on a board behind OpenSSH.

    Args:
        device: Address of the board.
        python: The board's interpreter, which has ai-edge-litert or onnxruntime.
        storage: Folder on the board for files.
        options: Further options of ``ssh`` and ``scp``.
        settings: Fields of `targets.remote_benchmark.RemoteSettings`, such as ``threads`` and ``cores``.

    Raises:
        OptionError: If an option has a value that makes no sense.
    """

    further_options: ClassVar = tuple(RemoteSettings.__dataclass_fields__)

    def __init__(
        self,
        *,
        device: str = "",
        python: str = "python3",
        storage: str = "/tmp",
        options: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.name = f"ssh:{device}"
        self.formats: tuple[str, ...] = ("tflite", "onnx")
        self._remote = SshRemote(
            device, storage=options_.place("storage", storage), options=options_.texts("options", options)
        )
        self._python = options_.place("python", python)
        try:
            self.settings = RemoteSettings(**settings)
        except TypeError as error:
            hint = f"it takes {', '.join(self.further_options)}"
            raise OptionError(f"target ssh: {error}", hint=hint) from error
        if self.settings.accelerator != "cpu":
            raise OptionError(f"accelerator is {self.settings.accelerator!r}, but Python on a board has only cpu")

    def device(self) -> Device:
        """Asks the board who it is."""
        return describe(self._remote, ask(self._remote))

    def benchmark(
        self,
        paths: Sequence[Path | str],
        *,
        warmup: int = 5,
        runs: int = 60,
        restarts: int = 3,
        quick: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[Measurement]:
        """Measures the files; see `targets.remote_benchmark.benchmark` for the errors."""
        formats = {Path(path).suffix.lower() for path in paths}
        if len(formats) > 1:
            raise OptionError(f"the files have several formats, {', '.join(sorted(formats))}: compare like with like")
        runner = PythonRunner("ort" if formats == {".onnx"} else "litert", python=self._python)
        return benchmark(
            self._remote, runner, self.settings, paths, name=self.name, warmup=warmup, runs=runs, restarts=restarts,
            quick=quick, on_progress=on_progress,
        )  # fmt: skip


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeMissingError(f"{name} is not on this machine", hint="install OpenSSH's client")
    return found
