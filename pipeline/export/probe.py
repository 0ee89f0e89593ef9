"""Runs a freshly converted file once, so that a converter that swaps or drops something is found out on the spot."""

__all__ = ["require_runs", "require_same"]

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ExportError
from pipeline.export import inspect
from pipeline.export.input_format import PixelInput, is_channels_last
from pipeline.export.runtimes import open_model

RELATIVE_TOLERANCE = 1e-4


def require_runs(path: Path, *, name: str) -> None:
    """Runs one batch of black images through a quantised file, since a quantiser checks its own work by its form only.

    Args:
        path: The file, under whatever temporary name.
        name: What to call the file in an error.

    Raises:
        ExportError: Its runtime cannot open it, or it answers with something that is not finite.
    """
    port = inspect.census(path).inputs[0]
    sizes = [int(size) for size in port.shape]
    if is_channels_last(path) or path.suffix == ".tflite":
        sizes = [sizes[0], sizes[3], sizes[1], sizes[2]]
    found = open_model(path).predict(np.zeros(sizes, dtype=np.float32))
    if not np.isfinite(found).all():
        raise ExportError(
            f"{name} predicts NaN or infinity", hint="keep the layers that int8 breaks in float32, or use 'dynamic'"
        )


def require_same(path: Path, network: nn.Module, example: Tensor, *, name: str, pixels: PixelInput | None) -> float:
    """Compares a float file with the network it was converted from, on one random batch.

    Args:
        path: The file, under whatever temporary name.
        network: The network over normalised float images.
        example: An input [N, C, H, W]; gives the shape.
        name: What to call the file in an error.
        pixels: The normalisation inside the file, when it takes pixels: the batch is then made of whole grey levels.

    Returns:
        The largest logit difference over the largest logit.

    Raises:
        ExportError: They differ by more than `RELATIVE_TOLERANCE`.
    """
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(example.shape, generator=chance)
    if pixels is not None:
        levels = torch.randint(0, 256, example.shape, generator=chance) / 255.0
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (pixels.mean, pixels.std))
        images = (levels - mean) / std
    with torch.no_grad():
        expected = network(images).numpy()
    found = open_model(path).predict(images.numpy())
    if found.shape != expected.shape:
        raise ExportError(f"{name} returns shape {found.shape}, the network {expected.shape}")
    error = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not error <= RELATIVE_TOLERANCE:
        raise ExportError(
            f"{name} computes something else than the network: logits differ by {error:.2g} of the largest, "
            f"{RELATIVE_TOLERANCE:g} allowed",
            hint="the converter mistook a weight or an operation: try the other format, and report the model",
        )
    return error
