"""What the quantisers' options do to a file and to its predictions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_net

from pipeline.errors import ExportError
from pipeline.export import flatbuffer, inspect, precision, quantize, runtimes, sqnr
from pipeline.export.bias_correction import rounded_weight
from pipeline.export.layers import weighted_layers
from pipeline.export.lowering import lower

Files = dict[str, Path]
CALIBRATION = images(48, seed=1)
QUANTISERS = {"tflite": quantize.tflite_int8, "onnx": quantize.onnx_int8}


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_named_units_stay_float(files: Files, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"mixed.{form}"
    QUANTISERS[form](files[form], path, [CALIBRATION], float_layers=["blocks.first", "classifier"])
    found = inspect.census(path)
    inside = {name for name in found.float_tensors if name.startswith("blocks.first.")}
    assert inside >= {"blocks.first.depthwise.0", "blocks.first.project.0"}
    assert inspect.gate(found, float_tensors=["blocks.first", "classifier"]) == []
    assert "float inside a quantised file" in inspect.gate(found)[0]
    weights = {item.name: item for item in inspect.census(files[form]).weights}
    exact = {item.name: item for item in found.weights}
    assert exact["blocks.first.expand.0"].largest == weights["blocks.first.expand.0"].largest


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_an_unknown_unit_is_refused_and_leaves_no_file(files: Files, form: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no layer of the file is called 'blocks\.9'"):
        QUANTISERS[form](files[form], tmp_path / f"x.{form}", [CALIBRATION], float_layers=["blocks.9"])
    assert list(tmp_path.iterdir()) == []


def test_float_ends_cost_a_quantize_and_a_dequantize(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "float_io.tflite"
    quantize.tflite_int8(files["tflite"], path, [CALIBRATION], float_io=True)
    quantize.tflite_int8(files["tflite"], tmp_path / "int8_io.tflite", [CALIBRATION])
    found = inspect.census(path)
    assert (found.inputs[0].dtype, found.outputs[0].dtype) == ("float32", "float32")
    assert (found.count("QUANTIZE"), found.count("DEQUANTIZE")) == (1, 1)
    assert inspect.gate(found) == []
    batch = images(4, seed=2)
    int8 = runtimes.open_model(tmp_path / "int8_io.tflite").predict(batch)
    assert np.array_equal(runtimes.open_model(path).predict(batch), int8)


def test_stored_int8_weights_are_the_simulated_ones(files: Files) -> None:
    """Bias correction and the file must mean the same rounding."""
    network = lower(tiny_net(), torch.from_numpy(images(1)))
    model = flatbuffer.read(files["tflite_int8"])
    graph = model.subgraphs[0]
    for operator in graph.operators:
        if flatbuffer.operator_name(model, operator) != "CONV_2D":
            continue
        name = flatbuffer.tensor_name(graph.tensors[operator.outputs[0]])
        tensor = graph.tensors[operator.inputs[1]]
        scale = np.asarray(tensor.quantization.scale, dtype=np.float32).reshape(-1, 1, 1, 1)
        stored = (flatbuffer.constant(model, tensor) * scale).transpose(0, 3, 1, 2)
        simulated = rounded_weight(weighted_layers(network)[name]).numpy()
        assert np.abs(stored - simulated).max() <= 1e-6 * np.abs(simulated).max(), name


def test_per_channel_scales_beat_one_scale_where_ranges_are_uneven(files: Files, tmp_path: Path) -> None:
    batch = [images(16, seed=2)]
    for form, quantise in QUANTISERS.items():
        quantise(files[form], tmp_path / f"tensor.{form}", [CALIBRATION], per_channel=False)
        one = sqnr.layer_noise(files[form], tmp_path / f"tensor.{form}", batch)
        each = sqnr.layer_noise(files[form], files[f"{form}_int8"], batch)
        gain = np.mean([b.sqnr_db - a.sqnr_db for a, b in zip(one, each, strict=True)])
        assert gain > 1.0, form


@pytest.mark.parametrize("ranges", ["percentile", "mse"])
def test_range_methods_reach_both_formats(files: Files, ranges: str, tmp_path: Path) -> None:
    outputs = []
    for form, quantise in QUANTISERS.items():
        info = quantise(files[form], tmp_path / f"x.{form}", [CALIBRATION], ranges=ranges)
        assert f"{ranges} ranges" in info.notes
        outputs.append(runtimes.open_model(tmp_path / f"x.{form}").predict(images(16, seed=2)))
    assert np.abs(outputs[0] - outputs[1]).max() < 0.1


@pytest.mark.parametrize(
    ("convert", "form", "error"),
    [
        (precision.tflite_fp16, "tflite", 5e-3),
        (precision.onnx_fp16, "onnx", 5e-3),
        (precision.tflite_dynamic, "tflite", 0.1),
        (precision.onnx_dynamic, "onnx", 0.25),
    ],
)
def test_uncalibrated_precisions(
    files: Files,
    reference: Callable[[np.ndarray], np.ndarray],
    convert: Callable,
    form: str,
    error: float,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"small.{form}"
    info = convert(files[form], path)
    batch = images(16, seed=2)
    expected = reference(batch)
    found = runtimes.open_model(path).predict(batch)
    assert 0 < np.abs(found - expected).max() <= error * np.abs(expected).max()
    assert info.bytes == path.stat().st_size
    assert inspect.gate(inspect.census(path)) == []


def test_float16_weights_are_the_rounded_float32_ones(files: Files, tmp_path: Path) -> None:
    precision.tflite_fp16(files["tflite"], tmp_path / "half.tflite")
    model = flatbuffer.read(tmp_path / "half.tflite")
    halves = [
        flatbuffer.constant(model, tensor)
        for tensor in model.subgraphs[0].tensors
        if flatbuffer.type_name(tensor.type) == "FLOAT16"
    ]
    wanted = tiny_net().blocks["folded"].weight.detach().numpy().transpose(0, 2, 3, 1).astype(np.float16)
    assert any(half.shape == wanted.shape and np.array_equal(half, wanted) for half in halves)
