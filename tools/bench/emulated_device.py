"""Benchmarks a run's baseline and folded files on a whole emulated ARM device, by the code path of a phone.

    layerfold run quickstart
    python tools/bench/emulated_device.py runs/quickstart-… --out tools/bench/results/emulated_device.json

The device is Debian's arm64 adbd, a shell, Python and the aarch64 runtimes under QEMU, in namespaces of its own (see
`tools/adb_device.py`). Its rows are marked as emulated: what they prove is the way there and back, the accelerator, and
that int8 output has the host's bytes; neither their milliseconds nor their ratio say anything of a phone.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import targets
from targets.base import Measurement, layerfold_version
from targets.bench import collect
from targets.stats import ratio_interval

TOOL = Path(__file__).parents[1] / "adb_device.py"
COUNTS = {"warmup": 1, "runs": 2, "restarts": 1}


def benchmark(models: Path, serial: str) -> list[dict[str, Any]]:
    """Benchmarks every pair of files that is there; returns a plain row for each."""
    device = targets.get(f"android:{serial}", runner="python", gate_wait_s=0, cooldown_s=0, timeout_s=900)
    found = []
    for form, host in (("tflite", "host-litert"), ("onnx", "host-ort")):
        for infix in ("", ".int8"):
            pair = [models / f"{which}{infix}.{form}" for which in ("baseline", "folded")]
            rows = collect({"android": device}, pair, **COUNTS)["android"]
            reference = targets.get(host, exact=True, gate_wait_s=0).benchmark(pair, warmup=0, runs=1, restarts=1)
            found.append(summary(rows, reference))
            print(json.dumps(found[-1]), flush=True)
    return found


def summary(rows: list[Measurement], reference: list[Measurement]) -> dict[str, Any]:
    """What is worth keeping of a pair of rows."""
    baseline, folded = rows
    if baseline.failure or folded.failure:
        return {"files": [row.model for row in rows], "failure": [row.invalid_reason for row in rows]}
    return {
        "files": [row.model for row in rows],
        "precision": baseline.precision,
        "runtime": f"{baseline.runtime} {baseline.runtime_version}",
        "target": baseline.target,
        "device_kind": baseline.device.kind,
        "device": f"{baseline.device.arch}, {baseline.device.cpu}, {baseline.device.os}",
        "actual_accelerator": baseline.actual_accelerator,
        "emulated_median_ms": [round(row.median_ms or 0.0, 3) for row in rows],
        "valid": baseline.valid,
        "invalid_reason": baseline.invalid_reason,
        "interleaved": bool(baseline.interleaved_with) and baseline.interleaved_with == folded.interleaved_with,
        "ratio_is_computed_from": ratio_interval(baseline, folded).metric,
        "output_bytes_are_the_hosts": [
            a.output_sha256 == b.output_sha256 for a, b in zip(rows, reference, strict=True)
        ],
    }


def main() -> int:
    """Raises the device, benchmarks, ends the device, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    # Whoever ends this must not leave the device behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="layerfold-") as folder:
        command = [sys.executable, str(TOOL), "--state", str(Path(folder) / "state")]
        up = subprocess.run([*command, "up", "--arch", "arm64"], stdout=subprocess.PIPE, text=True)
        if up.returncode != 0:
            return up.returncode
        try:
            raised = json.loads(up.stdout)
            os.environ["ADB_SERVER_SOCKET"] = raised["adb_server_socket"]
            rows = benchmark(chosen.run / "models", raised["serials"][0])
        finally:
            subprocess.run([*command, "down"], check=True)
    result = {
        "command": "python tools/bench/emulated_device.py RUN --out tools/bench/results/emulated_device.json",
        "layerfold": layerfold_version(),
        "recipe": json.loads((chosen.run / "report.json").read_text())["recipe"],
        "counts": COUNTS,
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    right = all(row.get("device_kind") == "adb-emulated" for row in rows)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
