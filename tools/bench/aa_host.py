"""Tries the host target on the same file twice, and on files that differ: how often is its verdict right?

    python tools/bench/aa_host.py BASELINE FASTER --out tools/bench/results/aa_host.json

An A/A trial gives BASELINE and a copy of it, and is right when it says "no difference shown". An A/B trial gives
BASELINE and FASTER, which must differ by 5% or more, and is right when the interval leaves out 1 on the right side.
Each trial is a whole benchmark of several process restarts.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import targets
from targets.base import layerfold_version
from targets.gates import busy_fractions
from targets.stats import ratio_interval


def trial(target: Any, pair: list[Path], counts: dict[str, int]) -> dict[str, Any]:
    """Runs one trial and keeps what its verdict rests on."""
    started = time.monotonic()
    a, b = target.benchmark(pair, **counts)
    found = ratio_interval(a, b)
    return {
        "ratio": round(found.ratio, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "verdict": found.verdict,
        "a_median_ms": round(a.median_ms, 3),
        "busy_before": a.gates_before.busy_fraction,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Runs the trials and writes them all, with the two tallies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("faster", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--restarts", type=int, default=5)
    chosen = parser.parse_args()
    name = {".tflite": "host-litert", ".onnx": "host-ort"}[chosen.baseline.suffix]
    target = targets.get(name, threads=1, gate_wait_s=0.0)
    counts = {"warmup": chosen.warmup, "runs": chosen.runs, "restarts": chosen.restarts}
    same: list[dict[str, Any]] = []
    different: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"copy{chosen.baseline.suffix}"
        shutil.copyfile(chosen.baseline, copy)
        for number in range(chosen.trials):
            same.append(trial(target, [chosen.baseline, copy], counts))
            different.append(trial(target, [chosen.baseline, chosen.faster], counts))
            print(number + 1, same[-1], different[-1], flush=True)
    result = {
        "command": f"python tools/bench/aa_host.py BASELINE FASTER --trials {chosen.trials} --warmup {chosen.warmup} "
        f"--runs {chosen.runs} --restarts {chosen.restarts} --out tools/bench/results/aa_host.json",
        "layerfold": layerfold_version(),
        "target": name,
        "files": [chosen.baseline.name, chosen.faster.name],
        "device": target.device().cpu,
        "busy_fractions_after": busy_fractions(),
        "aa_no_difference_shown": sum(row["verdict"] == "no difference shown" for row in same),
        "ab_difference_found": sum(row["high"] < 1 for row in different),
        "trials": chosen.trials,
        "aa": same,
        "ab": different,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"A/A right {result['aa_no_difference_shown']}, A/B right {result['ab_difference_found']} of {chosen.trials}")


if __name__ == "__main__":
    main()
