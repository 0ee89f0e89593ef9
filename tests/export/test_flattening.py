"""Fully connected layers over feature maps: the same function, and no transpose in channels-last files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.export import inspect, quantize, runtimes, tflite
from pipeline.export.flattening import flatten_channels_last
from pipeline.export.lowering import lower


class Forked(nn.Module):
    """A feature map that two layers read flattened, or one layer and the outside world."""

    def __init__(self, channels: int, pixels: int, *, leak: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(channels * pixels, 5) for _ in range(2))
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        out: Tensor = self.first(flat) + self.second(flat)
        return torch.cat([out, flat[:, :2]], 1) if self.leak else out


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_columns_change_places_with_the_pixels(batch: int, channels: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Forked(channels, height * width, leak=False)
    example = torch.randn(batch, channels, height, width)
    network, changed = flatten_channels_last(lower(model, example), example)
    assert set(changed) == {"first", "second"}
    assert torch.allclose(network(example), model(example), atol=1e-5)
    # What the new first layer multiplies is the image in the order of its pixels.
    by_pixel = example.permute(0, 2, 3, 1).flatten(1)
    columns = network.get_submodule("first").weight
    assert torch.allclose(by_pixel @ columns.T + model.first.bias, model.first(example.flatten(1)), atol=1e-5)


def test_a_flattening_with_another_reader_keeps_its_order() -> None:
    example = torch.randn(1, 3, 4, 4)
    model = Forked(3, 16, leak=True)
    network, changed = flatten_channels_last(lower(model, example), example)
    assert changed == ()
    assert torch.equal(network.get_submodule("first").weight, model.first.weight)


def test_one_pixel_or_one_channel_has_only_one_order() -> None:
    for shape in [(1, 8, 1, 1), (1, 1, 3, 3)]:
        example = torch.randn(shape)
        model = nn.Sequential(nn.Flatten(), nn.Linear(example.numel(), 4))
        assert flatten_channels_last(lower(model, example), example)[1] == ()


NETWORKS = {
    "fully connected": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 10)),
    "convolutions first": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 10)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_files_hold_no_transpose(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = torch.randn(32, 3, 8, 8)
    path, small = tmp_path / "net.tflite", tmp_path / "net.int8.tflite"
    tflite.export_fp32(model, images[:1], path)
    quantize.tflite_int8(path, small, [images.numpy()])
    for file in (path, small):
        assert inspect.gate(inspect.census(file)) == []
        assert inspect.census(file).count("TRANSPOSE") == 0
    expected = model.double()(images.double()).detach().numpy()
    found = runtimes.open_model(path).predict(images.numpy())
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert (runtimes.open_model(small).predict(images.numpy()).argmax(1) == expected.argmax(1)).mean() >= 0.8
