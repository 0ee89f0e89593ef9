"""What ExecuTorch files cost to make and what they keep, EfficientNet-lite0 with its ImageNet weights.

    python tools/bench/pte.py --out tools/bench/results/pte.json

Needs the extra `executorch` and the photos of the packages. Each file is made in a process of its own: `seconds` is the
conversion by the clock, `cpu_seconds` its processor time, `peak_mb` the largest resident set of the process, of which
`base_mb` was there before (Python, torch, the model, the photos). int8 follows the recipes' defaults: biases corrected,
`--images` calibration photos of the training part. `relative_error` is the largest logit difference from PyTorch in
float64 over the largest logit, `agreement` the share of held-out photos on which an int8 file names the class that the
float file names; the TFLite row stands beside it.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL, PX = "tf_efficientnet_lite0", 224
JOBS = ("executorch fp32", "executorch int8", "tflite int8")
PACKAGES = ("torch", "torchao", "executorch", "litert-torch", "ai-edge-litert", "ai-edge-quantizer")


def make(job: str, folder: Path, images: int, threads: int) -> dict[str, Any]:
    """Makes one file in this process and judges it."""
    import numpy as np
    import torch

    from pipeline.data import datasets
    from pipeline.data.preprocessing import Preprocessing
    from pipeline.export import inspect, runtimes
    from pipeline.export.calibration import collect
    from pipeline.export.conversion import EXPORTERS, file_name, to_int8
    from pipeline.export.int8 import Int8Options, operate
    from pipeline.export.lowering import lower
    from pipeline.models import weights, zoo

    torch.set_num_threads(threads)
    form, precision = job.split()
    model = zoo.create(MODEL, num_classes=1000, input_px=PX)
    weights.load(model, MODEL, "packaged", num_classes=1000)
    model.eval()
    example = torch.zeros(1, 3, PX, PX)
    network = lower(model, example)
    spec = Preprocessing(input_px=PX, mean=(0.5,) * 3, std=(0.5,) * 3)
    photos = datasets.resolve("photos", None, None)
    held_out = np.concatenate([batch.numpy() for batch, _ in datasets.open_split(photos, "eval", spec).batches(32)])
    float_file = folder / file_name("lite0", "fp32", form)
    path = folder / file_name("lite0", precision, form)
    options = Int8Options()
    if precision == "int8":
        taken = collect(datasets.open_split(photos, "calibration", spec, limit=images, seed=0), asked=images, seed=0)
        ready = operate(network, taken.batches, options)
        if not float_file.is_file():
            EXPORTERS[form](network, example, float_file)
    base, started, used = _peak_mb(), time.perf_counter(), time.process_time()
    if precision == "int8":
        scratch = folder / f"operated.{form}"
        to_int8(form, network, ready, float_file, path, taken.batches, options, example=example, pixels=None,
                scratch=scratch)  # fmt: skip
    else:
        EXPORTERS[form](network, example, path)
    seconds, cpu_seconds, peak = time.perf_counter() - started, time.process_time() - used, _peak_mb()
    found = runtimes.open_model(path).predict(held_out)
    census = inspect.census(path)
    row: dict[str, Any] = {"file": job, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2),
                           "peak_mb": round(peak), "base_mb": round(base),
                           "file_mb": round(census.bytes / 1e6, 2), "photos": len(held_out)}  # fmt: skip
    if precision == "int8":
        expected = runtimes.open_model(float_file).predict(held_out)
        row["agreement"] = round(float((found.argmax(1) == expected.argmax(1)).mean()), 4)
        row["mean_abs_logit_error"] = round(float(np.abs(found - expected).mean()), 4)
    else:
        model = model.double()
        with torch.no_grad():
            exact = np.concatenate(
                [model(torch.from_numpy(part).double()).numpy() for part in np.array_split(held_out[:64], 8)]
            )
        row["relative_error"] = float(f"{np.abs(found[:64] - exact).max() / np.abs(exact).max():.2g}")
    return row | {"ops": census.ops, "fused": census.fused_activations, "findings": inspect.gate(census)}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Makes every file and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(make(chosen.one[0], Path(chosen.one[1]), chosen.images, chosen.threads)))
        return
    if chosen.out is None:
        parser.error("--out is missing")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            command = [sys.executable, __file__, "--one", job, folder, "--images", str(chosen.images)]
            done = subprocess.run(
                [*command, "--threads", str(chosen.threads)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{job} failed:\n{done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    result = {
        "command": f"python tools/bench/pte.py --images {chosen.images} --threads {chosen.threads} "
        "--out tools/bench/results/pte.json",
        "model": MODEL,
        "input_px": PX,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "calibration_images": chosen.images,
        "rows": rows,
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
