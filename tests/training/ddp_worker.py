"""Fine-tunes the tiny α student; one of the processes that a test starts. Arguments: output folder, JSON config."""

import json
import sys
from pathlib import Path

import torch
from tiny_source import TinySource, tiny_network

from pipeline import alpha
from pipeline.training.loop import FitConfig, fit


def main() -> None:
    torch.set_num_threads(1)
    folder, config = Path(sys.argv[1]), FitConfig(**json.loads(sys.argv[2]))
    student = alpha.set_values(alpha.attach(tiny_network(), ["2", "5"]), 0.4)
    losses: list[float] = []
    result = fit(
        student,
        TinySource(),
        config,
        checkpoint_dir=folder / "checkpoints",
        alpha=alpha.AlphaSchedule(lambda_c=0.3, alpha_lr=0.2, snap_at=0.7),
        on_progress=lambda progress: losses.append(progress.loss),
    )
    if losses:  # rank 0
        rows = [row for row in result.history if "epoch" in row]
        report = {"losses": [row["loss"] for row in rows], "alphas": rows[-1]["alphas"]}
        report["weights"] = float(sum(p.detach().double().abs().sum() for p in student.parameters()))
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
