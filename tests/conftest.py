"""Fixtures that many rooms share."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
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


Layerfold = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def layerfold() -> Layerfold:
    """Runs the command line in a process of its own, as a user would."""

    def call(*arguments: str, cwd: Path | None = None, timeout_s: float = 540) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)

    return call
