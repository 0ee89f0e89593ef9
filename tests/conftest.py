"""Fixtures that many rooms share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import QUICK, Layerfold, call, from_shell
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
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of the README's quick command, made as a user would."""
    cwd = tmp_path_factory.mktemp("quickstart")
    done = from_shell(("layerfold", "run", *QUICK), cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (cwd / "runs").iterdir()
    assert "MACs" in done.stdout and f"report: runs/{folder.name}/report.html" in done.stdout
    return folder
