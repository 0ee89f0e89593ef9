"""What an exact border costs: MobileNetV2-1.0 with its five published units folded plainly and with bias maps.

    python tools/bench/border.py --out tools/bench/results/border.json

Both folded networks and the baseline as TFLite and ONNX files, float32, 224 px, one thread, interleaved on this
machine; ratios are to the plainly folded network, with their 95 % intervals.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

import targets
from pipeline.export import onnx, tflite
from pipeline.export.inspect import census
from pipeline.folding import find_units, fold, linearise
from pipeline.models import zoo
from targets.stats import ratio_interval

PUBLISHED = (2, 4, 8, 9, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = zoo.create("mobilenetv2_100", num_classes=1000).eval()
    for module in model.modules():  # norms as at birth shift nothing, and there would be no border to repair
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0, 0.2)
    units = [find_units(model)[index].name for index in PUBLISHED]
    linear, example = linearise(model, units), torch.randn(1, 3, 224, 224)
    plain = fold(linear, example, units=units)
    exact = fold(linear, example, units=units, border="exact")
    networks = {"plain": plain.model, "exact": exact.model, "baseline": model}
    rows = []
    with tempfile.TemporaryDirectory() as text:
        for form, export in (("tflite", tflite.export_fp32), ("onnx", onnx.export_fp32)):
            paths = [Path(text) / f"{name}.{form}" for name in networks]
            for network, path in zip(networks.values(), paths, strict=True):
                export(network, example, path)
            target = targets.get("host-litert" if form == "tflite" else "host-ort", threads=1)
            measured = target.benchmark(paths, runs=arguments.runs, restarts=arguments.restarts)
            for name, path, row in zip(networks, paths, measured, strict=True):
                rows.append({"network": name, "format": form, "median_ms": row.median_ms, "valid": row.valid})
                rows[-1]["operators"] = sum(census(path).ops.values())
                if name != "plain":
                    rows[-1]["ratio_to_plain"] = ratio_interval(measured[0], row).as_dict()
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python tools/bench/border.py --out tools/bench/results/border.json",
        "units": units,
        "error_to_linearised": {"plain": plain.max_abs_error, "exact": exact.max_abs_error},
        "left_unfolded_by_exact": [list(skip.names) for skip in exact.skipped],
        "load": round(os.getloadavg()[0], 2),
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
