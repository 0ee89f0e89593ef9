"""Fixtures that many rooms share."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import Layerfold, call
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches tests and what they start as it would at a terminal.

    A job that a shell runs in the background ignores SIGINT, and so do its children: without this the tests of
    interrupts would wait forever there.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated folder in ImageNet's layout: 4 classes of coloured noise, 10 train and 6 val pictures each."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 6)):
        for label in range(4):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (80, 96, 3)) + 40 * np.array([label, 3 - label, label % 2])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.JPEG")
    return root


@pytest.fixture(scope="session")
def layerfold() -> Layerfold:
    """Runs the command line in a process of its own: `layerfold("plan", "quickstart", cwd=folder)`."""
    return call


@pytest.fixture(scope="session")
def quick_words() -> tuple[str, ...]:
    """The README's command that runs the quickstart quickly."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    return next(tuple(line.split()) for line in readme.splitlines() if line.startswith("layerfold run quickstart --q"))


@pytest.fixture(scope="session")
def quick_run(quick_words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of that command, made as a user would: from a shell, in a process from nothing."""
    cwd = tmp_path_factory.mktemp("quickstart")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        quick_words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (cwd / "runs").iterdir()
    assert "MACs" in done.stdout and f"report: runs/{folder.name}/report.html" in done.stdout
    return folder
