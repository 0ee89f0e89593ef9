"""What the files of a tiny network compute and hold, against float64 PyTorch and against each other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyNet, images

from pipeline.errors import ExportError
from pipeline.export import inspect, metadata, runtimes

Files = dict[str, Path]
Reference = Callable[[np.ndarray], np.ndarray]
CONVOLUTIONS = 6


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_float_files_predict_as_float64_torch(files: Files, reference: Reference, kind: str) -> None:
    batch = images(9, seed=5)
    expected = reference(batch)
    found = runtimes.open_model(files[kind]).predict(batch)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["tflite_int8", "onnx_int8"])
def test_int8_files_predict_within_a_few_steps_of_the_logits(files: Files, reference: Reference, kind: str) -> None:
    batch = images(64, seed=6)
    expected = reference(batch)
    found = runtimes.open_model(files[kind]).predict(batch)
    noise = ((found - expected) ** 2).mean()
    signal = expected.var(axis=0).mean()
    assert 10 * np.log10(signal / noise) > 15
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.8


@pytest.mark.parametrize("kind", ["tflite_int8", "onnx_int8"])
def test_int8_logits_are_multiples_of_one_step(files: Files, kind: str) -> None:
    logits = np.unique(runtimes.open_model(files[kind]).predict(images(32, seed=7)))
    steps = np.diff(logits)
    step = steps[steps > 1e-6].min()
    assert np.allclose(logits / step - np.rint(logits / step), 0, atol=1e-2)
    assert len(logits) > 10


@pytest.mark.parametrize("kind", ["tflite", "onnx", "tflite_int8", "onnx_int8"])
def test_batches_are_predicted_image_by_image(files: Files, kind: str) -> None:
    model = runtimes.open_model(files[kind])
    batch = images(5, seed=8)
    one_by_one = np.concatenate([model.predict(batch[i : i + 1]) for i in range(5)])
    assert np.array_equal(model.predict(batch), one_by_one)
    assert model.predict(batch[:0]).shape == (0, 10)


def test_the_census_of_the_float_tflite_file(files: Files) -> None:
    found = inspect.census(files["tflite"])
    assert found.ops == {
        "ADD": 1,
        "CONV_2D": CONVOLUTIONS - 1,
        "DEPTHWISE_CONV_2D": 1,
        "FULLY_CONNECTED": 1,
        "MEAN": 1,
        "PAD": 1,
    }
    assert found.fused_activations == {"RELU6": 4}
    assert found.inputs == (inspect.Port("image", (1, 32, 32, 3), "float32"),)
    assert not found.quantized
    assert inspect.gate(found, max_pads=1) == []


def test_the_census_of_the_int8_files_shows_no_float_islands(files: Files) -> None:
    for kind in ("tflite_int8", "onnx_int8"):
        found = inspect.census(files[kind])
        assert found.quantized
        assert found.float_tensors == ()
        assert inspect.gate(found) == []
    assert inspect.census(files["tflite_int8"]).inputs[0].dtype == "int8"


def test_weight_ranges_are_those_of_the_folded_weights(files: Files, network: TinyNet) -> None:
    largest = float(network.blocks["folded"].weight.detach().abs().max())
    for kind, tolerance in [("tflite", 1e-6), ("onnx", 1e-6), ("tflite_int8", 0.01), ("onnx_int8", 0.01)]:
        ranges = {item.name: item for item in inspect.census(files[kind]).weights}
        assert len(ranges) == CONVOLUTIONS + 1
        assert ranges["blocks.folded"].largest == pytest.approx(largest, rel=tolerance)
        assert ranges["blocks.folded"].channels == 8


def test_the_gate_names_what_is_wrong(files: Files) -> None:
    found = inspect.census(files["tflite"])
    assert "operators outside the target's set: MEAN" in inspect.gate(found, allowed=set(found.ops) - {"MEAN"})[0]
    assert "1 padding operators, expected at most 0" in inspect.gate(found, max_pads=0)[0]


@pytest.mark.parametrize("kind", ["tflite", "onnx", "tflite_int8", "onnx_int8"])
def test_metadata_is_read_back_and_changes_no_prediction(files: Files, kind: str, tmp_path: Path) -> None:
    path = tmp_path / files[kind].name
    path.write_bytes(files[kind].read_bytes())
    assert metadata.read(path) == {}
    before = runtimes.open_model(path).predict(images(3, seed=9))
    metadata.write(path, {"labels": ["café", "b"], "version": 1})
    metadata.write(path, {"labels": ["café"], "mean": [0.5, 0.25]})
    assert metadata.read(path) == {"labels": ["café"], "mean": [0.5, 0.25]}
    assert np.array_equal(runtimes.open_model(path).predict(images(3, seed=9)), before)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_metadata_that_is_not_json_is_refused(files: Files) -> None:
    with pytest.raises(ExportError, match="not JSON"):
        metadata.write(files["onnx"], {"path": Path("x")})
    with pytest.raises(ExportError, match="not JSON"):
        metadata.write(files["onnx"], {"mean": float("nan")})


def test_no_file_names_the_building_machine(files: Files) -> None:
    for path in files.values():
        content = path.read_bytes()
        assert str(Path.cwd()).encode() not in content
        assert b"site-packages" not in content


def test_wrong_images_are_refused(files: Files) -> None:
    model = runtimes.open_model(files["tflite"])
    with pytest.raises(ExportError, match=r"takes images of \[H, W, C\] \(32, 32, 3\), was given \(32, 32, 1\)"):
        model.predict(images(1, channels=1))
    with pytest.raises(ExportError, match=r"given shape \(3, 32, 32\)"):
        model.predict(images(1)[0])


def test_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    for function in (runtimes.open_model, inspect.census, metadata.read):
        with pytest.raises(ExportError, match=r"\.bin"):
            function(path)
