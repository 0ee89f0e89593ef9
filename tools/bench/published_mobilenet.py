"""Writes MobileNetV2-1.0 and its published folding ([2, 4, 8, 9, 10] of 17 blocks) as model files to measure.

    python tools/bench/published_mobilenet.py FOLDER

Weights are random: what an inference costs does not depend on them. Int8 ranges come from random images.
Files: {baseline,folded}{,.int8}.{tflite,onnx}, 224 px, batch 1.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline.export import onnx, quantize, tflite
from pipeline.folding import count, find_units, fold, linearise
from pipeline.models import zoo

PUBLISHED = (2, 4, 8, 9, 10)


def write(folder: Path) -> None:
    """Writes the eight files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = zoo.create("mobilenetv2_100", num_classes=1000).eval()
    example = torch.randn(1, 3, 224, 224)
    units = [find_units(model)[index] for index in PUBLISHED]
    linear = linearise(model, [name for unit in units for name in unit.activations])
    folded = fold(linear, example, units=[unit.name for unit in units]).model
    for name, network in (("baseline", model), ("folded", folded)):
        print(name, count(network, example))
        generator = np.random.default_rng(0)
        images = [generator.standard_normal((4, 3, 224, 224), dtype=np.float32) for _ in range(4)]
        tflite.export_fp32(network, example, folder / f"{name}.tflite")
        quantize.tflite_int8(folder / f"{name}.tflite", folder / f"{name}.int8.tflite", images)
        onnx.export_fp32(network, example, folder / f"{name}.onnx")
        quantize.onnx_int8(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
