"""Calls the command line as a user would, without paying for the imports of torch and timm each time.

Every call is a process of its own, forked off one that has imported them already. The tests of the README and those
that kill start from nothing instead.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

Layerfold = Callable[..., "subprocess.CompletedProcess[str]"]
QUICK = ("quickstart", "--quick", "--set", "prefold.lambda_c=0.5")
"""The run of the README that tests look at; `tests/readme` holds the two together."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pipeline.cli", "pipeline.preflight", "pipeline.runner"])


def call(*arguments: str, cwd: Path | None = None, timeout_s: float = 540) -> "subprocess.CompletedProcess[str]":
    """Runs `layerfold` with these arguments in a folder; its exit code and what it printed.

    Raises:
        subprocess.TimeoutExpired: If it takes longer; it is killed then.
    """
    command = ["layerfold", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = _FORKS.Process(target=_main, args=(command, cwd or Path.cwd(), streams, dict(os.environ)))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout_s)
        stdout, stderr = (stream.read_text() for stream in streams)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def from_shell(words: Sequence[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Runs a command as a user's shell would with the environment activated: in a process from nothing."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=580)


def _main(command: list[str], cwd: Path, streams: list[Path], environment: dict[str, str]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    # The process that this one was forked off has the environment of an earlier moment.
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    from pipeline.cli import main

    main()
