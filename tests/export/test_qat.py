"""Quantisation-aware training: the simulated rounding is the file's, and training reduces what it costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_net
from torch import fx

from pipeline.errors import TrainingError
from pipeline.export import qat, quantize, runtimes, tflite
from pipeline.export.bias_correction import rounded_weight
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower

EXAMPLE = torch.from_numpy(images(1))
CALIBRATION = images(64, seed=1)


@pytest.fixture(scope="module")
def lowered() -> fx.GraphModule:
    return lower(tiny_net(), EXAMPLE)


def calibrated(network: fx.GraphModule, per_channel: bool = True) -> fx.GraphModule:
    prepared = qat.prepare(network, per_channel=per_channel).train()
    with torch.no_grad():
        # The first batch sets the ranges; later ones would move them.
        prepared(torch.from_numpy(CALIBRATION))
    return prepared.eval()


def test_simulated_weights_are_those_of_int8(lowered: fx.GraphModule) -> None:
    for per_channel in (True, False):
        prepared = qat.prepare(lowered, per_channel=per_channel)
        for name, layer in weighted_layers(lowered).items():
            wanted = rounded_weight(layer, per_channel=per_channel)
            found = prepared.get_submodule(name).weight
            # A value on the edge of two steps may fall either way.
            assert ((found - wanted).abs() > 1e-6).float().mean() < 1e-3


def test_the_simulation_predicts_what_the_int8_file_predicts(lowered: fx.GraphModule, files: dict[str, Path]) -> None:
    batch = images(32, seed=2)
    with torch.no_grad():
        simulated = calibrated(lowered)(torch.from_numpy(batch)).numpy()
        exact = lowered(torch.from_numpy(batch)).numpy()
    real = runtimes.open_model(files["tflite_int8"]).predict(batch)
    noise = ((real - exact) ** 2).mean()
    assert ((simulated - real) ** 2).mean() < noise


def test_ranges_move_in_training_only(lowered: fx.GraphModule) -> None:
    prepared = calibrated(lowered)
    batch = torch.from_numpy(images(4, seed=3))
    with torch.no_grad():
        before = prepared(batch)
        prepared(100 * batch)
        assert torch.equal(prepared(batch), before)
        qat.freeze_ranges(prepared)
        prepared.train()(100 * batch)
        assert torch.equal(prepared.eval()(batch), before)


def test_finishing_without_training_gives_the_network_back(lowered: fx.GraphModule) -> None:
    finished = qat.finish(calibrated(lowered))
    batch = torch.from_numpy(images(4, seed=3))
    assert torch.equal(finished(batch), lowered(batch))
    assert [str(node.target) for node in finished.graph.nodes] == [str(node.target) for node in lowered.graph.nodes]
    assert not any("rounding" in name or "parametrizations" in name for name, _ in finished.named_modules())


def test_training_reduces_the_loss_of_per_tensor_rounding(lowered: fx.GraphModule, tmp_path: Path) -> None:
    held_out = images(128, seed=9)
    with torch.no_grad():
        exact = lowered(torch.from_numpy(held_out)).numpy()

    def error(network: fx.GraphModule, name: str) -> float:
        tflite.export_fp32(network, EXAMPLE, tmp_path / f"{name}.tflite")
        out = tmp_path / f"{name}.int8.tflite"
        quantize.tflite_int8(tmp_path / f"{name}.tflite", out, [CALIBRATION], per_channel=False)
        return float(((runtimes.open_model(out).predict(held_out) - exact) ** 2).mean())

    prepared = calibrated(lowered, per_channel=False)
    batches = [torch.from_numpy(images(8, seed=100 + i)) for i in range(50)]
    losses = qat.distil(prepared, lowered, batches, steps=50, learning_rate=1e-3)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert error(qat.finish(prepared), "trained") < 0.8 * error(lowered, "plain")


def test_too_few_images_are_an_error(lowered: fx.GraphModule) -> None:
    with pytest.raises(TrainingError, match="ran out after 1 of 5 steps"):
        qat.distil(qat.prepare(lowered), lowered, [EXAMPLE], steps=5)
