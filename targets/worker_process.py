"""Starts `targets.worker`, here or behind a remote shell, and listens to it with a limit on every wait."""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from targets import errors
from targets.errors import RuntimeMissingError, TimeoutExpiredError, WorkerError

__all__ = ["WORKER_FILE", "run_worker"]

WORKER_FILE = Path(__file__).with_name("worker.py")
_EXTRAS = {"litert": "layerfold[tflite]", "ort": "layerfold[onnx]"}
_READ_BYTES = 1 << 16
_TAIL_CHARS = 600


def run_worker(
    argv: Sequence[str],
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    where: str = "this machine",
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Runs one request in one worker process.

    Args:
        argv: Command that starts the worker; it must pass standard input and output through untouched.
        request: The request of `targets.worker`.
        timeout_s: Longest time from start to result, in seconds; then the process group is killed.
        env: Environment of the process; the current one if `None`.
        where: Name of the device, for messages.
        on_done: Called with the number of timed runs done.

    Returns:
        The ``result`` reply joined with the ``ready`` reply: ``models``, ``runtime_version``, ``cores``.

    Raises:
        TimeoutExpiredError: If there is no result in time.
        WorkerError: If the process dies, or breaks the protocol.
        TargetError: The class that the worker names in its ``error`` reply.
    """
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                env=dict(env) if env is not None else None, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise WorkerError(f"cannot start {argv[0]}: {error.strerror}") from error
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise WorkerError(f"the worker on {where} ended at once: {_tail(stderr)}") from error
            return _listen(process, stderr, request, time.monotonic() + timeout_s, timeout_s, where, on_done)
        finally:
            _end(process)


def _listen(
    process: subprocess.Popen[bytes],
    stderr: IO[bytes],
    request: Mapping[str, Any],
    deadline: float,
    timeout_s: float,
    where: str,
    on_done: Callable[[int], None] | None,
) -> dict[str, Any]:
    assert process.stdout is not None
    ready: dict[str, Any] = {}
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                raise TimeoutExpiredError(
                    f"no result from the worker on {where} within {timeout_s:.0f} s",
                    hint="raise timeout_s, or lower runs",
                )
            chunk = os.read(process.stdout.fileno(), _READ_BYTES)
            if not chunk:
                raise WorkerError(f"the worker on {where} {_ending(process)} without a result: {_tail(stderr)}")
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                message = _decode(line, where)
                event = message.get("event")
                if event == "ready":
                    ready = message
                elif event == "progress" and on_done is not None:
                    on_done(int(message["done"]))
                elif event == "error":
                    raise _named(message, request)
                elif event == "result":
                    return {**ready, **message}


def _decode(line: bytes, where: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise WorkerError(f"the worker on {where} broke its protocol with {line[:200]!r}")
    return message


def _named(message: Mapping[str, Any], request: Mapping[str, Any]) -> errors.TargetError:
    kind = errors.by_name(str(message.get("kind")))
    hint = ""
    if kind is RuntimeMissingError:
        hint = f"pip install '{_EXTRAS.get(request['runtime'], 'layerfold')}'"
    return kind(str(message.get("message")), hint=hint)


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _tail(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    text = stderr.read().decode(errors="replace").strip()
    return text[-_TAIL_CHARS:] or "it printed nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets the worker end by itself for a moment, then kills its group, so that nothing outlives the call."""
    assert process.stdin is not None and process.stdout is not None
    # The worker may have ended before it had read everything; closing is all that is wanted.
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        # It may have ended between the two calls.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
