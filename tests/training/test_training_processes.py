"""Several processes: under torchrun the same curve as alone; killed without warning, the same weights after all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TrainingError
from pipeline.training import checkpoint
from pipeline.training.distributed import World

WORKER = Path(__file__).parent / "ddp_worker.py"
# Norms are frozen: with their statistics taken from a share of the batch, no two world sizes could agree.
CONFIG = {"epochs": 2, "lr": 0.05, "batch_size": 16, "freeze_bn": True, "grad_clip": 5.0}


def run(folder: Path, config: dict[str, Any], *launcher: str) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, *launcher, str(WORKER), str(folder), json.dumps(config)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(accumulate: int, tmp_path: Path) -> None:
    config = {**CONFIG, "accumulate": accumulate}
    alone = run(tmp_path / "alone", config)
    both = run(tmp_path / "both", config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert both["alphas"] == pytest.approx(alone["alphas"], abs=1e-4)
    assert both["weights"] == pytest.approx(alone["weights"], rel=1e-5)
    assert alone["losses"][-1] < alone["losses"][0]


def test_killed_at_any_moment_and_started_again(tmp_path: Path) -> None:
    config = {**CONFIG, "epochs": 40, "freeze_bn": False, "checkpoint_every_s": 0.0}
    whole = run(tmp_path / "whole", config)
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, str(WORKER), str(folder), json.dumps(config)]
    for kills in range(1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        before = _step(folder)
        while _step(folder) <= before + 5 * kills and time.monotonic() < deadline:
            assert process.poll() is None, "it finished before it could be killed: raise epochs"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < _step(folder) < 160
    again = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((folder / "report.json").read_text()) == whole


def _step(folder: Path) -> int:
    """The step of the newest readable checkpoint, while another process writes."""
    try:
        saved = checkpoint.load(folder / "checkpoints")
    except TrainingError:
        return -1
    return -1 if saved is None else int(saved["step"])


def test_a_batch_that_cannot_be_shared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    world = World()
    assert (world.rank, world.size) == (2, 3)
    torch.testing.assert_close(torch.cat(world.share(torch.arange(12), 2)), torch.arange(8, 12))
    with pytest.raises(TrainingError, match="16 cannot be shared by 3 processes"):
        world.share(torch.zeros(16), 1)
