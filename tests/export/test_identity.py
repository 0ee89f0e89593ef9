"""Residual kernels without their identity: the same function, a finer scale, and a unit that keeps its name."""

from pathlib import Path

import pytest
import torch
from tiny_models import images, tiny_net
from torch import nn

from pipeline.export import inspect, onnx, quantize, sqnr, tflite
from pipeline.export.identity import split_identity
from pipeline.export.int8 import Int8Options, operate
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower

EXAMPLE = torch.from_numpy(images(1))
UNIT = "blocks.folded"


def residual_net() -> nn.Module:
    """The tiny network whose folded unit is what folding an inverted residual gives: the identity and a little."""
    model = tiny_net()
    with torch.no_grad():
        small = model.blocks["folded"].weight.mul(0.15)
        model.blocks["folded"].weight.copy_(small + nn.init.dirac_(torch.empty_like(small)))
    return model


def test_the_split_network_computes_the_same() -> None:
    network = lower(residual_net(), EXAMPLE)
    split, gains = split_identity(network)
    assert list(gains) == [UNIT] and gains[UNIT] > 4
    batch = torch.from_numpy(images(4, seed=3)).double()
    with torch.no_grad():
        expected, found = network.double()(batch), split.double()(batch)
    assert (expected - found).abs().max() <= 1e-6 * expected.abs().max()
    assert f"{UNIT}.apart" in weighted_layers(split) and UNIT not in weighted_layers(split)
    assert UNIT in weighted_layers(network), "the given network must not change"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 3, padding=0),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 8, 3, padding=1),
    ],
    ids=["strided", "not centred", "depthwise", "wider"],
)
def test_a_layer_without_an_identity_stays_whole(layer: nn.Conv2d) -> None:
    with torch.no_grad():
        layer.weight.mul_(0.01)
        nn.init.dirac_(layer.weight[:6]) if layer.groups == 1 else layer.weight[:, :, 1, 1].fill_(1.0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert split_identity(lower(model, EXAMPLE))[1] == {}


def test_small_gains_and_kept_units_stay_whole() -> None:
    assert split_identity(lower(tiny_net(), EXAMPLE))[1] == {}
    assert split_identity(lower(residual_net(), EXAMPLE), keep=["blocks"])[1] == {}


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_int8_keeps_more_of_a_residual_kernel_whose_identity_is_apart(form: str, tmp_path: Path) -> None:
    network = lower(residual_net(), EXAMPLE)
    calibration = [images(32, seed=1)]
    ready = operate(network, calibration, Int8Options(bias_correction=False))
    assert ready.reference is network and list(ready.identities) == [UNIT]
    export = {"tflite": tflite.export_fp32, "onnx": onnx.export_fp32}[form]
    quantise = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}[form]
    noise = {}
    for name, source in (("whole", network), ("split", ready.network)):
        export(source, EXAMPLE, tmp_path / f"{name}.{form}")
        quantise(tmp_path / f"{name}.{form}", tmp_path / f"{name}.int8.{form}", calibration)
        # One float file judges both: the sum of the split kernel has the whole layer's name.
        rows = sqnr.layer_noise(tmp_path / f"whole.{form}", tmp_path / f"{name}.int8.{form}", [images(12, seed=2)])
        noise[name] = {row.name: row.sqnr_db for row in rows}[UNIT]
        assert inspect.gate(inspect.census(tmp_path / f"{name}.int8.{form}")) == []
    sums = [inspect.census(tmp_path / f"{name}.int8.{form}").count("ADD", "Add") for name in noise]
    assert sums[1] == sums[0] + 1
    assert noise["split"] > noise["whole"] + 0.5
