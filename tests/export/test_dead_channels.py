"""A channel without weights must stay as silent, or as constant, in int8 as it is in float."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_net

from pipeline.export import flatbuffer, observe, quantize, tflite
from pipeline.export.dead_channels import widen_dead_channels
from pipeline.export.ranges import Range, activation_ranges

SILENT, CONSTANT = 3, 5


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with one channel that decayed to silence and one that decayed to a constant."""
    model = tiny_net()
    convolution, norm = model.stem[0], model.stem[1]
    with torch.no_grad():
        for channel, bias in [(SILENT, -4.0), (CONSTANT, 2.0)]:
            convolution.weight[channel] *= 1e-10
            norm.bias[channel] = bias
            norm.running_mean[channel] = 0.0
    path = tmp_path_factory.mktemp("dead") / "dead.tflite"
    tflite.export_fp32(model, torch.from_numpy(images(1)), path)
    return path


def stem(path: Path) -> np.ndarray:
    return observe.observe_tflite(path).watch(images(1, seed=3))["stem.0"]


def test_dead_channels_keep_their_value_in_int8(dead: Path, tmp_path: Path) -> None:
    info = quantize.tflite_int8(dead, tmp_path / "int8.tflite", [images(32)])
    found = stem(tmp_path / "int8.tflite")
    assert np.abs(found[..., SILENT]).max() == 0.0
    assert found[..., CONSTANT] == pytest.approx(2.0, abs=0.02)
    assert any("widened 2 dead channels" in note and "stem.0" in note for note in info.notes)


def test_without_widening_the_quantiser_breaks_them(
    dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the guard is needed: when a newer quantiser no longer needs it, this test says so."""
    nothing: Callable[..., dict[str, int]] = lambda model, spans: {}  # noqa: E731
    monkeypatch.setattr(quantize, "widen_dead_channels", nothing)
    quantize.tflite_int8(dead, tmp_path / "int8.tflite", [images(32)])
    found = stem(tmp_path / "int8.tflite")
    assert np.abs(found[..., CONSTANT] - 2.0).max() > 0.5 or np.abs(found[..., SILENT]).max() > 0.5


def test_widening_changes_the_float_function_by_less_than_a_step(dead: Path, tmp_path: Path) -> None:
    ranges = activation_ranges(observe.observe_tflite(dead), [images(32)])
    model = flatbuffer.read(dead)
    assert widen_dead_channels(model, ranges) == {"stem.0": 2}
    flatbuffer.write(model, tmp_path / "widened.tflite")
    step = (ranges["stem.0"].high - ranges["stem.0"].low) / 255
    assert np.abs(stem(dead) - stem(tmp_path / "widened.tflite")).max() < 0.05 * step


def test_living_channels_are_not_touched(files: dict[str, Path]) -> None:
    ranges = activation_ranges(observe.observe_tflite(files["tflite"]), [images(8)])
    assert widen_dead_channels(flatbuffer.read(files["tflite"]), ranges) == {}
    assert isinstance(ranges["image"], Range)
