"""Tries the host target on the same file twice, and on files that differ: how often is its verdict right?

    python tools/bench/aa_host.py BASELINE FASTER --out tools/bench/results/aa_host.json
    python tools/bench/aa_host.py --layers 19 18 --out tools/bench/results/aa_host_small.json

An A/A trial gives BASELINE and a copy of it, and is right when it says "no difference shown". An A/B trial gives
BASELINE and FASTER, which must differ by 5% or more, and is right when the interval leaves out 1 on the right side.
Each trial is a whole benchmark of several process restarts. --layers makes the two files: chains of so many equal
convolutions, whose difference in work is therefore known beforehand and not from the clock that is on trial.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import targets
from targets.base import layerfold_version
from targets.gates import busy_fractions
from targets.stats import ratio_interval

CHAIN_CHANNELS, CHAIN_SIDE_PX = 64, 28


def write_chain(path: Path, layers: int) -> Path:
    """Writes an ONNX file of `layers` equal 3x3 convolutions, each 28.9 M MACs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    size = (CHAIN_CHANNELS, CHAIN_CHANNELS, 3, 3)
    # Variance 1 / fan-in keeps the values of a deep chain within bounds.
    kernels = [generator.normal(0, (9 * CHAIN_CHANNELS) ** -0.5, size).astype(np.float32) for _ in range(layers)]
    nodes = [
        helper.make_node("Conv", [f"x{index}", f"w{index}"], [f"x{index + 1}"], pads=[1, 1, 1, 1])
        for index in range(layers)
    ]
    shape = [1, CHAIN_CHANNELS, CHAIN_SIDE_PX, CHAIN_SIDE_PX]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{layers}")]
    constants = [numpy_helper.from_array(kernel, f"w{index}") for index, kernel in enumerate(kernels)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def trial(target: Any, pair: list[Path], counts: dict[str, int]) -> dict[str, Any]:
    """Runs one trial and keeps what its verdict rests on."""
    started = time.monotonic()
    a, b = target.benchmark(pair, **counts)
    found = ratio_interval(a, b)
    return {
        "ratio": round(found.ratio, 4),
        "low": round(found.low, 4) if found.low else None,
        "high": round(found.high, 4) if found.high else None,
        "metric": found.metric,
        "verdict": found.verdict,
        "a_median_ms": round(a.median_ms, 3),
        "busy_before": a.gates_before.busy_fraction,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Runs the trials and writes them all, with the two tallies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="BASELINE and FASTER")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("BASELINE", "FASTER"), help="make chains of so many")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--gate-wait-s", type=float, default=0.0, help="how long to wait for an idle core (0)")
    chosen = parser.parse_args()
    if (len(chosen.files) == 2) == bool(chosen.layers):
        parser.error("give either BASELINE and FASTER, or --layers")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if chosen.layers:
            pair = [write_chain(folder / f"chain{layers}.onnx", layers) for layers in chosen.layers]
            what = "--layers {} {}".format(*chosen.layers)
        else:
            pair, what = chosen.files, "BASELINE FASTER"
        result = run_trials(pair, folder, chosen)
    command = f"python tools/bench/aa_host.py {what} --trials {chosen.trials} --warmup {chosen.warmup} "
    result["command"] = f"{command}--runs {chosen.runs} --restarts {chosen.restarts} --out {chosen.out}"
    if chosen.layers:
        result["true_ratio_of_work"] = round(chosen.layers[1] / chosen.layers[0], 4)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"A/A right {result['aa_no_difference_shown']}, A/B right {result['ab_difference_found']} of {chosen.trials}")


def run_trials(pair: list[Path], folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Alternates A/A and A/B trials and tallies them."""
    name = {".tflite": "host-litert", ".onnx": "host-ort"}[pair[0].suffix]
    target = targets.get(name, threads=1, gate_wait_s=chosen.gate_wait_s)
    counts = {"warmup": chosen.warmup, "runs": chosen.runs, "restarts": chosen.restarts}
    copy = folder / f"copy{pair[0].suffix}"
    shutil.copyfile(pair[0], copy)
    same: list[dict[str, Any]] = []
    different: list[dict[str, Any]] = []
    for number in range(chosen.trials):
        same.append(trial(target, [pair[0], copy], counts))
        different.append(trial(target, pair, counts))
        print(number + 1, same[-1], different[-1], flush=True)
    return {
        "layerfold": layerfold_version(),
        "target": name,
        "files": [file.name for file in pair],
        "device": target.device().cpu,
        "busy_fractions_after": busy_fractions(),
        "aa_no_difference_shown": sum(row["verdict"] == "no difference shown" for row in same),
        "ab_difference_found": sum(row["high"] < 1 for row in different),
        "trials": chosen.trials,
        "aa": same,
        "ab": different,
    }


if __name__ == "__main__":
    main()
