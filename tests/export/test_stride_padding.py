"""Symmetric stride-2 padding as SAME padding: same function, no PAD operator."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import images, tiny_net
from torch import nn

from pipeline.export import inspect, quantize, tflite
from pipeline.export.lowering import lower
from pipeline.export.stride_padding import expected_pads, same_padding, without_pads

EXAMPLE = torch.from_numpy(images(1))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 4))
def test_same_padding_is_the_least_that_gives_every_output(size: int, kernel: int, stride: int) -> None:
    outputs = -(-size // stride)
    least = next(
        pad for pad in range(kernel + stride) if (size + pad - kernel) // stride + 1 >= outputs and size + pad >= kernel
    )
    assert sum(same_padding(size, kernel, stride)) == least
    before, after = same_padding(size, kernel, stride)
    assert after - before in (0, 1)


@settings(deadline=None, max_examples=8)
@given(st.integers(9, 34), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_the_enlarged_layer_computes_the_same(size: int, kernel: int, stride: int, depthwise: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 4, kernel, stride, kernel // 2, groups=4 if depthwise else 1)
    example = torch.randn(1, 4, size, size)
    network = lower(nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), example)
    enlarged, changed = without_pads(network, example)
    assert torch.allclose(enlarged(example), network(example), atol=1e-6)
    assert expected_pads(enlarged, example) == expected_pads(network, example) - len(changed)
    if stride == 2 and kernel == 3:
        assert len(changed) == (size % 2 == 0)


@pytest.fixture(scope="module")
def padless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, changed = without_pads(lower(tiny_net(), EXAMPLE), EXAMPLE)
    assert changed == ["stem.0"]
    path = tmp_path_factory.mktemp("padless") / "padless.tflite"
    tflite.export_fp32(network, EXAMPLE, path)
    return path


def test_the_files_hold_no_pad(padless: Path, files: dict[str, Path], tmp_path: Path) -> None:
    plain = lower(tiny_net(), EXAMPLE)
    assert inspect.census(files["tflite"]).count("PAD") == expected_pads(plain, EXAMPLE) == 1
    quantize.tflite_int8(padless, tmp_path / "int8.tflite", [images(8)])
    for path in (padless, tmp_path / "int8.tflite"):
        assert inspect.gate(inspect.census(path), max_pads=0) == []
