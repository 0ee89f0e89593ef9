"""Files that take uint8 pixels, against the float network on normalised images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_net
from torch import Tensor, nn

from pipeline.errors import ExportError
from pipeline.export import inspect, metadata, onnx, quantize, runtimes, tflite
from pipeline.export.input_format import PixelInput, read_pixel_input, with_pixel_input
from pipeline.export.lowering import lower

GREY = PixelInput.of((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = PixelInput.of((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EXAMPLE = torch.from_numpy(images(1))


def pixels(count: int, seed: int = 0) -> np.ndarray:
    shades = 127 + 40 * images(count, seed=seed)
    return shades.clip(0, 255).astype(np.uint8)


def normalised(raw: np.ndarray, spec: PixelInput) -> np.ndarray:
    mean, std = (np.array(values).reshape(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return ((raw / 255.0 - mean) / std).astype(np.float32)


@pytest.mark.parametrize("spec", [GREY, IMAGENET])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_normalisation_moves_in_exactly_borders_included(spec: PixelInput, padding: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=padding), nn.Flatten())
    network = lower(model, EXAMPLE)
    raw = pixels(4)
    with torch.no_grad():
        expected = network(torch.from_numpy(normalised(raw, spec)))
        found = with_pixel_input(network, spec)(torch.from_numpy(raw))
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_padding_before_the_first_layer_stays_exact() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(nn.functional.pad(image, (0, 1, 0, 1))).flatten(1)

    network = lower(Padded(), EXAMPLE)
    raw = pixels(4)
    with torch.no_grad():
        expected = network(torch.from_numpy(normalised(raw, IMAGENET)))
        found = with_pixel_input(network, IMAGENET)(torch.from_numpy(raw))
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.fixture(scope="module")
def pixel_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pixels")
    paths = {name: folder / f"pixels.{name}" for name in ("tflite", "onnx", "nhwc.onnx", "int8.tflite", "int8.onnx")}
    tflite.export_fp32(tiny_net(), EXAMPLE, paths["tflite"], pixels=IMAGENET)
    onnx.export_fp32(tiny_net(), EXAMPLE, paths["onnx"], pixels=IMAGENET)
    onnx.export_fp32(tiny_net(), EXAMPLE, paths["nhwc.onnx"], pixels=IMAGENET, channels_last=True)
    calibration = [normalised(pixels(48, seed=1), IMAGENET)]
    quantize.tflite_int8(paths["tflite"], paths["int8.tflite"], calibration)
    quantize.onnx_int8(paths["onnx"], paths["int8.onnx"], calibration)
    return paths


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tflite", (1, 32, 32, 3)),
        ("onnx", (1, 3, 32, 32)),
        ("nhwc.onnx", (1, 32, 32, 3)),
        ("int8.tflite", (1, 32, 32, 3)),
    ],
)
def test_the_file_takes_pixels_and_predicts_the_same(
    pixel_files: dict[str, Path], name: str, shape: tuple[int, ...]
) -> None:
    path = pixel_files[name]
    port = inspect.census(path).inputs[0]
    assert (port.dtype, port.shape) == ("uint8", shape)
    batch = normalised(pixels(16, seed=2), IMAGENET)
    with torch.no_grad():
        expected = tiny_net()(torch.from_numpy(batch)).numpy()
    found = runtimes.open_model(path).predict(batch)
    tolerance = 0.2 if "int8" in name else 1e-5
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_an_integer_file_holds_no_float_operator(pixel_files: dict[str, Path]) -> None:
    found = inspect.census(pixel_files["int8.tflite"])
    assert found.float_tensors == ()
    assert found.count("CAST", "DEQUANTIZE") == 0
    assert inspect.gate(found) == []


def test_both_integer_files_agree(pixel_files: dict[str, Path]) -> None:
    batch = normalised(pixels(16, seed=3), IMAGENET)
    one, other = (runtimes.open_model(pixel_files[name]).predict(batch) for name in ("int8.tflite", "int8.onnx"))
    assert np.abs(one - other).max() <= 0.1 * np.abs(one).max()


def test_a_raw_interpreter_on_raw_pixels_agrees_with_the_predictor(pixel_files: dict[str, Path]) -> None:
    """The predictor turns normalised images back into pixels; an app has the pixels."""
    import onnxruntime

    raw = pixels(1, seed=4)
    session = onnxruntime.InferenceSession(str(pixel_files["nhwc.onnx"]), providers=["CPUExecutionProvider"])
    direct = session.run(None, {"image": np.ascontiguousarray(raw.transpose(0, 2, 3, 1))})[0]
    through = runtimes.open_model(pixel_files["nhwc.onnx"]).predict(normalised(raw, IMAGENET))
    assert np.array_equal(direct, through)


def test_the_normalisation_survives_other_metadata(pixel_files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("tflite", "onnx", "int8.tflite", "int8.onnx"):
        path = tmp_path / pixel_files[name].name
        path.write_bytes(pixel_files[name].read_bytes())
        metadata.write(path, {"labels": ["a"]})
        assert read_pixel_input(path) == IMAGENET


def test_a_network_that_does_not_start_with_a_convolution_is_refused() -> None:
    network = lower(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Flatten()), EXAMPLE)
    with pytest.raises(ExportError, match="does not start with a convolution"):
        with_pixel_input(network, IMAGENET)


def test_a_nonsense_normalisation_is_refused() -> None:
    with pytest.raises(ExportError, match="do not describe a normalisation"):
        PixelInput.of((0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ExportError, match="do not describe a normalisation"):
        PixelInput.of((0.5,), (0.0,))


def test_a_first_layer_that_stays_float_keeps_its_cast(tmp_path: Path) -> None:
    """Fed with the bytes themselves it could not run: a file may be well formed and useless."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU6(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    batch = normalised(pixels(8), IMAGENET)
    tflite.export_fp32(model, EXAMPLE, tmp_path / "float.tflite", pixels=IMAGENET)
    path = tmp_path / "part.int8.tflite"
    quantize.tflite_int8(tmp_path / "float.tflite", path, [batch], float_layers=["0"])
    with torch.no_grad():
        expected = model(torch.from_numpy(batch)).numpy()
    assert inspect.census(path).ops["CAST"] == 1
    assert np.abs(runtimes.open_model(path).predict(batch) - expected).max() < 0.05 * np.abs(expected).max()
