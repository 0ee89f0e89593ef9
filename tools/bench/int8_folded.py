"""What int8 costs a folded network, and which remedy helps: agreement of each int8 file with its own float file.

    layerfold run efficientnet_lite/lite0_photos --out runs/three \\
        --set 'prefold.units=[blocks.1.1,blocks.3.1,blocks.3.2]'
    python tools/bench/int8_folded.py runs/three/models/baseline.pt runs/three/models/folded.pt \\
        --units blocks.1.1 blocks.3.1 blocks.3.2 --out tools/bench/results/int8_folded.json

Images are the photos of the packages (`layerfold doctor` says where they are): calibration and training images from the
training part, agreement over the held-out part. Every row is a TFLite file run by LiteRT (and, for the plain methods,
an ONNX file run by ONNX Runtime). `sqnr_db` is the signal-to-noise ratio behind each folded unit, `kept` a row's
agreement over the baseline's with the same method. Rows that OUT already holds are kept; `--methods` adds others.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.data import datasets
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.export import onnx, runtimes, sqnr, tflite
from pipeline.export.calibration import collect
from pipeline.export.int8 import Int8Options, operate, quantise
from pipeline.export.lowering import lower
from pipeline.models import store

PLAIN = {"split_identity": False, "equalise": False, "bias_correction": False}
EQUALISED = PLAIN | {"equalise": True}
METHODS: dict[str, dict[str, Any]] = {
    "per-tensor": PLAIN | {"per_channel": False},
    "per-tensor, equalised": EQUALISED | {"per_channel": False},
    "per-tensor, equalised, biases corrected": EQUALISED | {"per_channel": False, "bias_correction": True},
    "per-channel": PLAIN,
    "per-channel, percentile 99.99": PLAIN | {"ranges": "percentile"},
    "per-channel, mse": PLAIN | {"ranges": "mse"},
    "per-channel, equalised": EQUALISED,
    "per-channel, biases corrected": PLAIN | {"bias_correction": True},
    "per-channel, identity apart": PLAIN | {"split_identity": True},
    "per-channel, identity apart, biases corrected": PLAIN | {"split_identity": True, "bias_correction": True},
    "per-channel, mse, biases corrected": PLAIN | {"ranges": "mse", "bias_correction": True},
    "per-channel, folded units float": PLAIN | {"float_units": True},
    "per-channel, QAT": PLAIN | {"method": "qat"},
    "per-channel, identity apart, QAT": PLAIN | {"split_identity": True, "method": "qat"},
    "per-tensor, QAT": PLAIN | {"per_channel": False, "method": "qat"},
}
ONNX_TOO = ("per-tensor", "per-channel")


class Study:
    """One network, its float files, and the images."""

    def __init__(self, name: str, path: Path, units: list[str], folder: Path, chosen: argparse.Namespace) -> None:
        self.name, self.units, self.folder, self.chosen = name, units, folder, chosen
        stored = store.load(path)
        self.example = torch.zeros(1, 3, chosen.input_px, chosen.input_px)
        self.network = lower(stored.module, self.example)
        preprocessing = Preprocessing(input_px=chosen.input_px, mean=(0.5,) * 3, std=(0.5,) * 3)
        found = datasets.resolve("photos", None, None)
        self.train: ImageSource = datasets.open_split(found, "train", preprocessing)
        source = datasets.open_split(found, "calibration", preprocessing, limit=chosen.images, seed=0)
        self.calibration = collect(source, asked=chosen.images, seed=0).batches
        held_out = datasets.open_split(found, "eval", preprocessing)
        self.held_out = np.concatenate([images.numpy() for images, _ in held_out.batches(32)])
        self.float_files: dict[str, Path] = {}
        self.expected: dict[str, np.ndarray] = {}

    def row(self, method: str, form: str) -> dict[str, Any]:
        """Makes and judges one int8 file."""
        if form not in self.float_files:
            self.float_files[form] = self._export(self.network, "float", form)
            self.expected[form] = self._predict(self.float_files[form])
        given = dict(METHODS[method])
        if given.pop("float_units", False):
            given["float_units"] = tuple(self.units)
        options = Int8Options(**given, qat_steps=self.chosen.steps, qat_learning_rate=self.chosen.rate)
        started = time.perf_counter()
        ready = operate(self.network, self.calibration, options, training=self._endless())
        source = self.float_files[form]
        if ready.network is not self.network:
            source = self._export(ready.network, "operated", form)
        out = self.folder / f"{self.name}.int8.{form}"
        quantise(source, out, self.calibration, options)
        found = self._predict(out)
        expected = self.expected[form]
        # Without equalisation every unit keeps its scale, so the untouched float file is the judge of each.
        reference = source if options.equalise else self.float_files[form]
        noise = sqnr.unit_noise(sqnr.layer_noise(reference, out, [self.held_out[:16]]), self.units)
        row = {
            "network": self.name,
            "runtime": form,
            "method": method,
            "agreement": round(float((found.argmax(1) == expected.argmax(1)).mean()), 4),
            "mean_abs_logit_error": round(float(np.abs(found - expected).mean()), 4),
            "sqnr_db": {row.name: round(row.sqnr_db, 1) for row in noise if row.name in [*self.units, "logits"]},
            "options": options.as_dict(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if ready.losses:
            row["qat"] = ready.as_dict()["qat"]
        return row

    def _endless(self) -> Iterator[Tensor]:
        for epoch in itertools.count():
            for images, _ in self.train.batches(16, train=True, seed=0, epoch=epoch):
                yield images

    def _export(self, network: fx.GraphModule, name: str, form: str) -> Path:
        path = self.folder / f"{self.name}.{name}.{form}"
        {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}[form](network, self.example, path)
        return path

    def _predict(self, path: Path) -> np.ndarray:
        return runtimes.open_model(path).predict(self.held_out)


def with_kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row of the folded network what it keeps of the baseline's agreement with the same method."""
    own = {(row["method"], row["runtime"]): row["agreement"] for row in rows if row["network"] == "baseline"}
    for row in rows:
        same = own.get((row["method"], row["runtime"]))
        if row["network"] == "folded" and same:
            row["kept"] = round(row["agreement"] / same, 3)
    order = {(name, method): i for i, (method, name) in enumerate(itertools.product(METHODS, ("baseline", "folded")))}
    return sorted(rows, key=lambda row: (order[row["network"], row["method"]], row["runtime"] != "tflite"))


def main() -> None:
    """Runs the methods on both networks and writes the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("folded", type=Path)
    parser.add_argument("--units", nargs="+", required=True, help="the folded units")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--input-px", type=int, default=224)
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--steps", type=int, default=60, help="steps of quantisation-aware training, 16 images each")
    parser.add_argument("--rate", type=float, default=1e-5, help="its learning rate")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--networks", nargs="+", choices=["baseline", "folded"], default=["baseline", "folded"])
    chosen = parser.parse_args()
    result = {
        "command": f"python tools/bench/int8_folded.py BASELINE.pt FOLDED.pt --units {' '.join(chosen.units)} "
        f"--images {chosen.images} --steps {chosen.steps} --rate {chosen.rate:g} "
        "--out tools/bench/results/int8_folded.json",
        "held_out_images": 0,
        "rows": [],
    }
    if chosen.out.is_file():
        earlier = json.loads(chosen.out.read_text())
        if earlier["command"] != result["command"]:
            parser.error(f"{chosen.out} was made with other settings: {earlier['command']}; give another --out")
        result = earlier
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = result["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.networks:
            study = Study(name, getattr(chosen, name), chosen.units, Path(folder), chosen)
            result["held_out_images"] = len(study.held_out)
            for method in chosen.methods:
                for form in ("tflite", "onnx") if method in ONNX_TOO else ("tflite",):
                    if any((row["network"], row["method"], row["runtime"]) == (name, method, form) for row in rows):
                        continue
                    rows.append(study.row(method, form))
                    print(rows[-1], flush=True)
                    result["rows"] = with_kept(rows)
                    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
