"""Weights in channels-last memory order convert to the same file content as in the usual order."""

import numpy as np
import torch
from torch import nn

from pipeline.export import onnx, runtimes, tflite


def test_layers_of_one_shape_keep_their_own_weights(tmp_path) -> None:
    # Five layers of one shape: a converter that takes a constant for another of the same shape is found out.
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1)] + [nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(2, 3, 12, 12)
    expected = model(images).detach().numpy()
    model = model.to(memory_format=torch.channels_last)
    for export, suffix in ((tflite.export_fp32, ".tflite"), (onnx.export_fp32, ".onnx")):
        path = tmp_path / f"model{suffix}"
        export(model, images[:1], path)
        got = runtimes.open_model(path).predict(images.numpy())
        np.testing.assert_allclose(got, expected, atol=1e-5)
