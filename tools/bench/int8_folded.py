"""What int8 costs a folded network, and which remedy helps: agreement of each int8 file with its own float file.

    python tools/bench/int8_folded.py BASELINE.pt FOLDED.pt --units blocks.1.1 blocks.3.1 blocks.3.2 \\
        --out tools/bench/results/int8_folded.json

BASELINE and FOLDED are files that `layerfold` wrote. Images are the photos of the packages (`layerfold doctor` says
where they are): calibration and training images from the training part, agreement over the held-out part. Every row is
a TFLite file run by LiteRT (and, for the plain methods, an ONNX file run by ONNX Runtime). `sqnr_db` is the
signal-to-noise ratio behind each folded unit.
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
from pipeline.export import onnx, qat, quantize, runtimes, sqnr, tflite
from pipeline.export.bias_correction import correct_biases
from pipeline.export.calibration import collect
from pipeline.export.equalise import equalise
from pipeline.export.lowering import lower
from pipeline.models import store

# Method, then the options of the quantiser and the surgery on the float network before it.
METHODS: dict[str, dict[str, Any]] = {
    "per-tensor": {"per_channel": False},
    "per-tensor, equalised": {"per_channel": False, "surgery": "equalise"},
    "per-tensor, equalised, biases corrected": {"per_channel": False, "surgery": "equalise+bias"},
    "per-channel": {},
    "per-channel, percentile 99.99": {"ranges": "percentile"},
    "per-channel, mse": {"ranges": "mse"},
    "per-channel, equalised": {"surgery": "equalise"},
    "per-channel, biases corrected": {"surgery": "bias"},
    "per-channel, folded units float": {"float_units": True},
    "per-channel, QAT": {"surgery": "qat"},
    "per-tensor, QAT": {"per_channel": False, "surgery": "qat"},
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
        self.float_files = {form: self._export(self.network, "float", form) for form in ("tflite", "onnx")}
        self.expected = {form: self._predict(path) for form, path in self.float_files.items()}

    def row(self, method: str, form: str) -> dict[str, Any]:
        """Makes and judges one int8 file."""
        options = dict(METHODS[method])
        started = time.perf_counter()
        surgery = options.pop("surgery", "")
        if options.pop("float_units", False):
            options["float_layers"] = self.units
        per_channel = options.get("per_channel", True)
        source = self.float_files[form]
        if surgery:
            source = self._export(self._operated(surgery, per_channel), "operated", form)
        out = self.folder / f"{self.name}.int8.{form}"
        quantise = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}[form]
        quantise(source, out, self.calibration, **options)
        found = self._predict(out)
        expected = self.expected[form]
        noise = sqnr.unit_noise(sqnr.layer_noise(source, out, [self.held_out[:16]]), self.units)
        return {
            "network": self.name,
            "runtime": form,
            "method": method,
            "agreement": round(float((found.argmax(1) == expected.argmax(1)).mean()), 4),
            "mean_abs_logit_error": round(float(np.abs(found - expected).mean()), 4),
            "sqnr_db": {row.name: round(row.sqnr_db, 1) for row in noise if row.name in [*self.units, "logits"]},
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _operated(self, surgery: str, per_channel: bool) -> fx.GraphModule:
        network = self.network
        if "equalise" in surgery:
            network, _ = equalise(network, self.calibration)
        if "bias" in surgery:
            network, _ = correct_biases(network, self.calibration[:4], per_channel=per_channel)
        if "qat" in surgery:
            prepared = qat.prepare(network, per_channel=per_channel).train()
            with torch.no_grad():
                for batch in self.calibration:
                    prepared(torch.from_numpy(batch))
            qat.distil(prepared, network, self._endless(), steps=self.chosen.steps, learning_rate=self.chosen.rate)
            network = qat.finish(prepared)
        return network

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


def main() -> None:
    """Runs every method on both networks and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("folded", type=Path)
    parser.add_argument("--units", nargs="+", required=True, help="the folded units")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--input-px", type=int, default=224)
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--steps", type=int, default=100, help="steps of quantisation-aware training")
    parser.add_argument("--rate", type=float, default=1e-5, help="its learning rate")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("baseline", chosen.baseline), ("folded", chosen.folded)):
            study = Study(name, path, chosen.units, Path(folder), chosen)
            for method in chosen.methods:
                for form in ("tflite", "onnx") if method in ONNX_TOO else ("tflite",):
                    rows.append(study.row(method, form))
                    print(rows[-1], flush=True)
            images = len(study.held_out)
    result = {
        "command": f"python tools/bench/int8_folded.py BASELINE.pt FOLDED.pt --units {' '.join(chosen.units)} "
        f"--images {chosen.images} --steps {chosen.steps} --rate {chosen.rate} "
        "--out tools/bench/results/int8_folded.json",
        "held_out_images": images,
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
